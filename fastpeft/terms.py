"""The vocabulary: what a method may add to a frozen linear layer, as data.

    y = gain * ( x W^T + sum of terms(x) ) + bias + sum of Bias          x [tokens, in]   W [out, in]   y [tokens, out]

A method returns a list of these, made anew in each forward (slots, not frozen: a frozen one takes three times as long to
make), and nobody changes one; kernels, merge, export and the test oracles read them. Nobody writes a backward twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Mid = Callable[[Tensor, Tensor | None, Tensor], Tensor]
Post = Callable[[Tensor], Tensor]
Choose = Callable[[Tensor | None, Tensor], tuple[Tensor, Tensor | None]]


class KhatriRao(NamedTuple):
    """The factor that two of one shape make: every row of `a` times every row of `b` as A, every column as B.

    As A, a and b [r, in] stand for [r*r, in], whose row i*r + j is a[i] * b[j]; as B, a and b [out, r] for [out, r*r].
    B A is then (Ba Aa) * (Bb Ab), elementwise.
    """

    a: Tensor
    b: Tensor

    def rows(self) -> Tensor:
        return (self.a[:, None] * self.b).flatten(0, 1)

    def columns(self) -> Tensor:
        return (self.a[:, :, None] * self.b[:, None]).flatten(1)


@dataclass(eq=False, slots=True)
class LowRank:
    """scale * post( mid(drop(x) A^T, x rows^T, x) B^T )

    A [R, in] or [n, r, in/n] with `blocks=n` (block-diagonal, R = n*r).   B [out, R'] or [n, out/n, r].
    A and B may both be a KhatriRao; the term is then plain (no mid, rows, post, dropout or blocks), and nothing of rank r*r
    is kept for backward.
    rows [P, in]: router or gate rows; they read x *before* dropout.
    mid(u, p, x) -> [..., R']: any torch function of the token; it sees x's leading dimensions; p is None without rows.
        Constants belong in A or B instead, so that merge works.
    post: pointwise on [tokens, out] with post(0) = 0, recomputed in backward.
    dropout: probability in [0, 1), applied to what A reads.
    scale multiplies the whole term.
    """

    A: Tensor | KhatriRao
    B: Tensor | KhatriRao
    scale: float = 1.0
    mid: Mid | None = None
    rows: Tensor | None = None
    post: Post | None = None
    dropout: float = 0.0
    blocks: int = 1


@dataclass(eq=False, slots=True)
class Gain:
    """x W^T + (g - 1) * (drop(x) W^T) + g * sum of terms;   g [out].

    Without dropout that is g times everything but the bias. With dropout it costs a second base product: the law of
    DoRA in PEFT and in its authors' code. At most one per site.
    over: g is divided by the norm of each row of W + over, which is held constant in backward; 1 where that norm is zero.
    (Said here, and not by the method, so that the norm can be taken inside the fused call.)
    """

    g: Tensor
    dropout: float = 0.0
    over: LowRank | None = None


@dataclass(eq=False, slots=True)
class Bias:
    """b [out], added after the gain."""

    b: Tensor


@dataclass(eq=False, slots=True)
class Kron:
    """scale * x (C o D)^T, o the Kronecker product: C [a, c], D [b, d], out = a*b, in = c*d.

    Entry (i*b + k, j*d + l) of the update is scale * C[i, j] * D[k, l]. It is never formed: x is read as [tokens, c, d].
    """

    C: Tensor
    D: Tensor
    scale: float = 1.0


@dataclass(eq=False, slots=True)
class Sparse:
    """values[k] at row index[0, k] and column index[1, k] of the update, zero elsewhere.

    values [nnz], fp32 on a 16-bit base.   index: int32 [2, nnz], in row-major order without repetition.
    apply: how the base product gets it. "copy": a copy of W with the entries W + value, in one workspace, made anew in
        forward and in backward. "window": W's own entries are changed while the product runs and put back bit for bit, which
        nobody else may read meanwhile. "overlay" (with `overlay`, a fastpeft.overlay.Overlay): they stay changed. "exact": a sparse product of its own beside the base's, so that no value is rounded to
        W's dtype.
    """

    values: Tensor
    index: Tensor
    apply: str = "copy"
    overlay: Any = None


class Composed(NamedTuple):
    """The update [out, in] that compose(*tensors) makes with ordinary PyTorch, made again wherever it is used.

    Nothing of it is kept for backward; tensors get the gradients that autograd gives through compose.
    """

    compose: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def whole(self) -> Tensor:
        return self.compose(*self.tensors)


@dataclass(eq=False, slots=True)
class Dense:
    """scale * x delta^T, delta [out, in]: the materialised update, where no other term says it.

    A delta of no storage (all strides zero) adds nothing and collects dW as its gradient.
    """

    delta: Tensor | Composed
    scale: float = 1.0


@dataclass(eq=False, slots=True)
class Grouped:
    """scale * sum_j w_j (x A_e^T) B_e^T, e = index[.., j] and w = weight[.., j]: each token uses k of the experts.

    A [R, in], B [out, R]: the experts one after another along the rank, `ranks` of each; R = sum(ranks). Rank 0 adds nothing.
    choose(p, x) -> (index int64 [.., k], weight [.., k], or None for 1): any torch function of the token; it sees x's leading
        dimensions, and gradients go through weight. p = x rows^T in y's dtype; None without rows.
    rows [P, in]: router or gate rows.
    Tokens are grouped by expert and only experts that they use are computed (fastpeft.ops.grouped). Code that torch.compile
    traces takes the equal LowRank term of all R ranks instead, for grouping depends on the data (fastpeft.grouped.as_low_rank).
    index: 0 to len(ranks) - 1, ValueError otherwise; on a GPU, which nobody waits for, an index outside adds nothing.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    choose: Choose
    scale: float = 1.0
    rows: Tensor | None = None


def collector(like: Tensor, shape: tuple[int, int], take: Callable[[Tensor], None]) -> Tensor:
    """A delta of no storage, in like's dtype and on its device, whose gradient [out, in] goes to `take`."""
    leaf = like.detach().new_zeros(()).expand(shape).requires_grad_()
    leaf.register_post_accumulate_grad_hook(functools.partial(_hand_over, take))
    return leaf


def _hand_over(take: Callable[[Tensor], None], leaf: Tensor) -> None:
    grad, leaf.grad = leaf.grad, None
    take(grad)  # type: ignore[arg-type]


Term = LowRank | Gain | Bias | Kron | Sparse | Dense | Grouped
APPLY = ("copy", "window", "exact")


def delta_weight(term: LowRank | Kron | Sparse | Dense | Grouped, dtype: torch.dtype = torch.float32, *, shape: Any = None) -> Tensor:
    """The dense [out, in] matrix that a term adds, in `dtype`. shape: (out, in), which a Sparse term does not know itself.

    Raises ValueError for a term with `mid`, `post` or `choose`: what depends on the token is no matrix.
    """
    refuse_tokenwise([term], "delta_weight")
    match term:
        case Kron():
            return term.scale * kron(term.C.to(dtype), term.D.to(dtype))
        case Dense():
            return term.scale * plain_delta(term).to(dtype)
        case Sparse():
            rows, cols = term.index.long()
            return term.values.new_zeros(shape, dtype=dtype).index_put((rows, cols), term.values.to(dtype))
    A, B = (t.to(dtype) for t in plain_factors(term))
    if term.blocks == 1:
        return term.scale * (B @ A)
    return torch.block_diag(*(term.scale * (b @ a) for a, b in zip(A, B, strict=True)))


def kron(C: Tensor, D: Tensor) -> Tensor:
    """The Kronecker product; C [a, c], D [b, d] -> [a*b, c*d]. (torch.kron 2.13 raises for some transposed matrices.)"""
    return (C[:, None, :, None] * D[None, :, None, :]).reshape(C.shape[0] * D.shape[0], C.shape[1] * D.shape[1])


def plain_factors(term: LowRank) -> tuple[Tensor, Tensor]:
    """A and B as tensors."""
    A = term.A.rows() if isinstance(term.A, KhatriRao) else term.A
    return A, term.B.columns() if isinstance(term.B, KhatriRao) else term.B


def plain_delta(term: Dense) -> Tensor:
    """delta as a tensor."""
    return term.delta.whole() if isinstance(term.delta, Composed) else term.delta


def refuse_tokenwise(terms: Sequence[Term], who: str) -> None:
    """Raise ValueError if some term depends on the token and therefore has no single weight."""
    for term in terms:
        part = _tokenwise(term)
        if part:
            raise ValueError(
                f"{who}: the adapter has a token-dependent part (`{part}`), so no single weight stands for it; "
                "keep it unmerged and use the adapted model as it is."
            )


def is_linear(terms: Sequence[Term]) -> bool:
    """True if a single weight and bias stand for the terms (so they can be merged)."""
    return not any(_tokenwise(t) for t in terms)


def _tokenwise(term: Term) -> str:
    """The field that makes a term depend on the token; empty where none does."""
    if isinstance(term, Grouped):
        return "choose"
    if isinstance(term, LowRank):
        return "mid" if term.mid is not None else "post" if term.post is not None else ""
    return ""


def effective_weight(weight: Tensor, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in] that base and terms stand for without dropout, in `dtype`.

    Merge, export and the test oracles use it. Raises ValueError where no single weight exists.
    """
    refuse_tokenwise(terms, "effective_weight")
    total = weight.to(dtype)
    for term in terms:
        if not isinstance(term, (Gain, Bias)):
            total = total + delta_weight(term, dtype, shape=weight.shape)
    for term in terms:
        if isinstance(term, Gain):
            g = term.g.to(dtype)
            if term.over is not None:
                norm = (weight.to(dtype) + delta_weight(term.over, dtype)).norm(dim=1).detach()
                g = torch.where(norm == 0, 1.0, g / torch.where(norm == 0, 1.0, norm))
            total = g[:, None] * total
    return total


def effective_bias(bias: Tensor | None, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Base bias plus every Bias term, in `dtype`; None if there is neither."""
    total = None if bias is None else bias.to(dtype)
    for term in terms:
        if isinstance(term, Bias):
            total = term.b.to(dtype) if total is None else total + term.b.to(dtype)
    return total
