"""Groups of weight updates, folded to tensors that small factors make: what SuperLoRA is composed of.

A group is a stretch of the vector of all updates, row by row, one after another. Of K splits and M modes,

    X = X_1 o .. o X_K        o the Kronecker product along every mode
    X_k = C_k x_1 A_k1 .. x_M A_kM   (Tucker), or the sum over r of A_k1[:, r] .. A_kM[:, r] (CP)        A_km [d_km, rank]

and the group is vec(X), row-major and trimmed, then optionally P vec(X) with a fixed P, then optionally permuted.
factors: A_11 .. A_1M, A_21 .. A_KM; cores: C_1 .. C_K, or none for CP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.fastfood import permutation, project
from fastpeft.terms import kron

Sizes = tuple[tuple[int, ...], ...]


def divisors(n: int, parts: int) -> tuple[int, ...]:
    """n as a product of `parts` numbers, each as near an equal share as a divisor can be from below, ascending."""
    if parts == 1:
        return (n,)
    low = max(d for d in range(1, _root(n, parts) + 1) if n % d == 0 and d**parts <= n)
    return low, *divisors(n // low, parts - 1)


def shares(n: int, parts: int) -> tuple[int, ...]:
    """`parts` numbers whose product is at least n: divisors of n where the smallest is half an equal share or more, else
    equal shares rounded up."""
    exact, share = divisors(n, parts), _root(n, parts)
    return exact if 2 * exact[0] >= share else (share,) * parts


def _root(n: int, parts: int) -> int:
    """The smallest integer whose power `parts` is n or more."""
    root = round(n ** (1 / parts))
    while root**parts < n:
        root += 1
    while root > 1 and (root - 1) ** parts >= n:
        root -= 1
    return root


def vector_sizes(n: int, order: int, splits: int) -> Sizes:
    """d_km by k and m for a vector of n numbers: two modes as `shares`, more as equal shares rounded up."""
    modes = shares(n, 2) if order == 2 else (_root(n, order),) * order
    return tuple(zip(*(shares(d, splits) for d in modes), strict=True))


def matrix_sizes(out: int, into: int, order: int, splits: int) -> Sizes:
    """d_km for one weight with its sides apart: the first order // 2 modes make `out` and the others `into`, exactly."""
    modes = (*divisors(out, order // 2), *divisors(into, order - order // 2))
    return tuple(zip(*(divisors(d, splits) for d in modes), strict=True))


def entries(factors: Sequence[Tensor], cores: Sequence[Tensor], splits: int, low: int, high: int) -> Tensor:
    """Numbers low to high of vec(X); no more of X is composed than the slices of its first mode that hold them."""
    order = len(factors) // splits
    heads = [factors[k * order].shape[0] for k in range(splits)]
    width = math.prod([f.shape[0] for n, f in enumerate(factors) if n % order])
    first, last = low // width, -(-high // width)
    rows = torch.arange(first, last, device=factors[0].device)
    made = []
    for k in range(splits):
        head, *others = factors[k * order : (k + 1) * order]
        head = head[first:last] if splits == 1 else head[rows // math.prod(heads[k + 1 :]) % heads[k]]
        made.append(tucker(head, others, cores[k]) if cores else canonical(head, others))
    return functools.reduce(_kron_rows, made).reshape(-1)[low - first * width : high - first * width]


def tucker(head: Tensor, others: Sequence[Tensor], core: Tensor) -> Tensor:
    """core x_1 head x_2 others ..; head [n, r], others [d_m, r], core [r, ..] -> [n, d_2, ..]."""
    made = torch.tensordot(head, core, dims=1)
    for factor in others:
        made = torch.tensordot(made, factor, dims=([1], [1]))
    return made


def canonical(head: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The sum over r of head[:, r] others[0][:, r] ..; [n, d_2, ..]."""
    left = functools.reduce(khatri_rao, others[:-1], head)
    return torch.mm(left, others[-1].t()).view(head.shape[0], *(f.shape[0] for f in others))


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Columns of a [m, r] and b [n, r], Kronecker product by pairs: [m*n, r]."""
    return (a[:, None] * b).flatten(0, 1)


def _kron_rows(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of a[i] and b[i] along every mode; a [n, p, ..], b [n, q, ..] -> [n, p*q, ..]."""
    shape = [p * q for p, q in zip(a.shape[1:], b.shape[1:], strict=True)]
    for m in range(1, b.dim()):
        a, b = a.unsqueeze(2 * m), b.unsqueeze(2 * m - 1)
    return (a * b).reshape(a.shape[0], *shape)


def sides(factors: Sequence[Tensor], core: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R] of one split whose first modes make `out` (matrix_sizes): R is rank for CP, rank^(order // 2)
    for Tucker, whose core goes to A."""
    outs, ins = factors[: len(factors) // 2], factors[len(factors) // 2 :]
    if core is None:
        return functools.reduce(khatri_rao, ins).t(), functools.reduce(khatri_rao, outs)
    U, V = functools.reduce(kron, outs), functools.reduce(kron, ins)
    return core.reshape(U.shape[1], V.shape[1]) @ V.t(), U


@dataclass(frozen=True)
class Group:
    """One group: numbers start to start + length of the vector, made from `kept` numbers of X with d_km `sizes`.

    Projected by P where kept < length. key: of what is random.
    """

    start: int
    length: int
    kept: int
    sizes: Sizes
    shuffle: bool
    key: int

    @property
    def direct(self) -> bool:
        """Whether the group is vec(X) itself, so that a stretch of it needs no more than that stretch."""
        return self.kept == self.length and not self.shuffle

    def values(self, factors: Sequence[Tensor], cores: Sequence[Tensor], low: int, high: int) -> Tensor:
        """Numbers low to high of the group."""
        splits = len(self.sizes)
        if self.direct:
            return entries(factors, cores, splits, low, high)
        z = entries(factors, cores, splits, 0, self.kept)
        if self.kept < self.length:
            z = project(z, self.length, self.key)
        if self.shuffle:
            z = z[permutation(self.key, self.length, 2, z.device)]
        return z[low:high]


@dataclass(frozen=True)
class Layout:
    """The groups of a set of layers, and where each layer's update [out, in] lies in their vector: name -> (start, out, in)."""

    groups: tuple[Group, ...]
    order: int
    core: bool
    spans: dict[str, tuple[int, int, int]]

    def update(self, name: str, *tensors: Tensor) -> Tensor:
        """The update [out, in] of a layer; tensors: every group's factors, one group after another, then every group's cores."""
        start, out, into = self.spans[name]
        return torch.cat(list(self._stretches(start, start + out * into, tensors))).view(out, into)

    def updates(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Every layer's update, in the order of `spans`; each group is composed once."""
        end = sum(g.length for g in self.groups)
        vector = torch.cat(list(self._stretches(0, end, tensors)))
        return tuple([vector[a : a + out * into].view(out, into) for a, out, into in self.spans.values()])

    def _stretches(self, low: int, high: int, tensors: Sequence[Tensor]):
        at, core_at = 0, sum(len(g.sizes) * self.order for g in self.groups)
        for g in self.groups:
            splits = len(g.sizes)
            factors, cores = tensors[at : at + splits * self.order], tensors[core_at : core_at + splits * self.core]
            at, core_at = at + len(factors), core_at + len(cores)
            a, b = max(low, g.start), min(high, g.start + g.length)
            if a < b:
                yield g.values(factors, cores, a - g.start, b - g.start)
