"""Grouped experts in torch: the pairs of a token and one of its k experts, sorted by expert; the CPU path, and the kernels' reference.

    y[token] += s * w * (x[token] A_e^T) B_e^T      du = s * w * dz[token] B_e      dw = s * (dz[token] B_e) . (x[token] A_e^T)
    dx[token] += du A_e                             dA_e = sum of du^T x[token]     dB_e = s * sum of dz[token]^T (w x[token] A_e^T)

x [t, i]  dz [t, o]  A [R, i]  B [o, R], expert e the next ranks[e] of R; pair n is token n // k and its expert number n % k.
tensors is (A, B, order, ends) or (A, B, order, ends, w): order and ends of `segments`, w [t * k] in any float dtype.

Nothing is saved but x, w and the sorted pairs: what a pair computes at its expert's rank is computed again in backward. Rows of
x, y and dz are gathered for one expert at a time, and at most CHUNK numbers of them; not at all where it has every token.
Every sum has one order. The bounds are read on the host: on a GPU that waits for the sort (the kernels do not).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastpeft.ops import lowrank

# numbers that the rows gathered at a time may hold: 16 MiB in fp32
CHUNK = 1 << 22
ONCE = {"seed": None, "p": 0.0, "blocks": 1}


def segments(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(order int64 [t * k], ends int32 [(experts + 1) * k + 1]) of index [t, k]: pairs sorted by (expert, place), tokens ascending.

    Those of expert e and place j are order[ends[e * k + j] : ends[e * k + j + 1]]; an expert outside of 0 to experts - 1 is number
    `experts`. A token is there once, so that rows can be written without a race. No host sync.
    """
    k = index.shape[1]
    known = torch.where((index >= 0) & (index < experts), index, experts)
    keys, order = (known * k + torch.arange(k, device=index.device)).flatten().sort(stable=True)
    bounds = torch.arange((experts + 1) * k + 1, device=index.device)
    return order, torch.searchsorted(keys, bounds, out_int32=True)


class Family:
    """ranks: of each expert.   k: experts of a token."""

    ON_BASE = False

    def __init__(self, ranks: Sequence[int], k: int):
        self.ranks, self.k = tuple(ranks), k

    def fresh(self, x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
        """scale * term(x) + bias, [t, o] in x's dtype; bias [o]."""
        out = tensors[1].shape[0]
        y = x.new_zeros(x.shape[0], out) if bias is None else bias.to(x.dtype).repeat(x.shape[0], 1)
        self.add(y, x, tensors, scale)
        return y

    def add(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
        """y += scale * term(x) in place; y [t, o] in x's dtype."""
        A, B, _, _, *w = tensors
        for span, pairs in self._runs(tensors, x.shape[0]):
            tokens = None if pairs is None else pairs // self.k
            u = lowrank.down(_rows(x, tokens), A[span], x.dtype, **ONCE)
            v = _times(u, _weight(w, pairs))
            if tokens is None:
                lowrank.up_add(y, v, B[:, span], scale, 1)
            else:
                y.index_add_(0, tokens, lowrank.up(v, B[:, span], scale, 1, None))

    def back(
        self,
        dz: Tensor,
        x: Tensor | None,
        tensors: Sequence[Tensor],
        scale: float,
        dx: Tensor | None,
        need_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """dx [t, i], onto the given one or fresh, and the gradients of the tensors in their dtypes, summed in fp32 at least."""
        A, B, _, _, *w = tensors
        need_a, need_b, need_w = needs[0], needs[1], len(needs) > 4 and needs[4]
        if need_x and dx is None:
            dx = dz.new_zeros(dz.shape[0], A.shape[1])
        dA, dB = (torch.zeros_like(F, dtype=_wide(F)) if n else None for F, n in ((A, need_a), (B, need_b)))
        dw = torch.zeros_like(w[0], dtype=_wide(w[0])) if need_w else None
        for span, pairs in self._runs(tensors, dz.shape[0]):
            tokens = None if pairs is None else pairs // self.k
            a, b, own = A[span].to(_wide(A)), B[:, span].to(_wide(B)), _weight(w, pairs)
            xs = None if x is None else _rows(x, tokens)
            u = lowrank.down(xs, a, dz.dtype, **ONCE) if xs is not None and (need_b or need_w) else None
            v = None if u is None else _times(u, own)
            need_u = need_x or need_a or need_w
            du, found = lowrank.du_db(_rows(dz, tokens), v, b, scale, 1, need_du=need_u, need_db=need_b)
            if dB is not None:
                dB[:, span] += found
            if dw is not None:
                per_pair = (du.to(dw.dtype) * u.to(dw.dtype)).sum(1)
                dw.copy_(per_pair) if pairs is None else dw.index_copy_(0, pairs, per_pair)
            du = None if du is None else _times(du, own)
            if need_x and tokens is None:
                lowrank.dx_add(dx, du, a, **ONCE)
            elif need_x:
                dx.index_add_(0, tokens, lowrank.dx(du, a, **ONCE))
            if dA is not None:
                dA[span] += lowrank.da(xs, du, a, **ONCE)
        grads = [None if g is None else g.to(t.dtype) for g, t in ((dA, A), (dB, B), *((dw, t) for t in w))]
        return dx, (*grads[:2], None, None, *grads[2:])

    def _runs(self, tensors: Sequence[Tensor], tokens: int) -> Iterator[tuple[slice, Tensor | None]]:
        """(ranks of an expert, pairs that use it), some of them at a time; None for all pairs in their order."""
        A, B, order, ends, *_ = tensors
        # on a GPU index_add_ is ordered only where no row repeats: one place at a time
        step = 1 if order.is_cuda else self.k
        bounds = ends[::step].tolist()
        starts = [0, *itertools.accumulate(self.ranks)]
        most = max(1, CHUNK // max(A.shape[1], B.shape[0]))
        for z, rank in enumerate(self.ranks):
            for n in range(z * self.k // step, (z + 1) * self.k // step):
                low, high = bounds[n], bounds[n + 1]
                if not rank or low == high:
                    continue
                span = slice(starts[z], starts[z + 1])
                if self.k == 1 and high - low == tokens:
                    yield span, None
                    continue
                for at in range(low, high, most):
                    yield span, order[at : min(high, at + most)]


def _rows(t: Tensor, tokens: Tensor | None) -> Tensor:
    return t if tokens is None else t.index_select(0, tokens)


def _weight(w: Sequence[Tensor], pairs: Tensor | None) -> Tensor | None:
    """The weights of these pairs as a column, or None where every one is 1."""
    return _rows(w[0], pairs)[:, None] if w else None


def _times(u: Tensor, w: Tensor | None) -> Tensor:
    """u * w in u's dtype, rounded once."""
    return u if w is None else (u * w.to(_wide(u))).to(u.dtype)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
