"""What an adapted layer should give: every term by its definition, dense, in ordinary PyTorch and any dtype.

Slow, and keeps everything; autograd makes its gradients. `fastpeft.verify` holds the fused path against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastpeft.ops.dropout import dropout_mask
from fastpeft.terms import (
    Bias,
    Composed,
    Dense,
    Gain,
    Grouped,
    KhatriRao,
    Kron,
    LowRank,
    Sparse,
    Term,
    delta_weight,
    plain_factors,
)


def reference(x: Tensor, W: Tensor, bias: Tensor | None, terms: Sequence[Term], seed: Tensor | None = None) -> Tensor:
    """gain * (x W^T + sum of terms(x)) + bias + sum of Bias, of fastpeft.terms; x [..., in], W [out, in] -> [..., out] in x's dtype.

    Terms, W and bias have x's dtype.   seed: of the dropout masks, needed where a term drops in this call (ValueError without).
    """
    base = linear(x, W)
    added = [_added(x, t, W, seed) for t in terms if not isinstance(t, (Gain, Bias))]
    total = torch.stack(added).sum(0) if added else torch.zeros_like(base)
    gain = next((t for t in terms if isinstance(t, Gain)), None)
    if gain is None:
        y = base + total
    else:
        g = _gain(gain, W)
        dropped = base if gain.dropout == 0.0 else linear(_drop(x, gain.dropout, seed), W)
        y = base + (g - 1) * dropped + g * total
    for b in [bias, *(t.b for t in terms if isinstance(t, Bias))]:
        if b is not None:
            y = y + b
    return y


def _added(x: Tensor, term: Term, W: Tensor, seed: Tensor | None) -> Tensor:
    if isinstance(term, Grouped):
        return _experts(x, term)
    if not isinstance(term, LowRank):
        return linear(x, delta_weight(term, x.dtype, shape=W.shape))  # type: ignore[arg-type]
    read = _drop(x, term.dropout, seed)
    if term.blocks > 1:
        return linear(read, delta_weight(term, x.dtype))
    A, B = plain_factors(term)
    u = linear(read, A)
    if term.mid is not None:
        u = term.mid(u, None if term.rows is None else linear(x, term.rows), x)
    z = linear(u, B)
    return term.scale * (z if term.post is None else term.post(z))


def _experts(x: Tensor, term: Grouped) -> Tensor:
    """Every expert for every token, times its weight there, zero where it was not chosen."""
    index, weight = term.choose(None if term.rows is None else linear(x, term.rows), x)
    z = x.new_zeros(*x.shape[:-1], term.B.shape[0])
    start = 0
    for e, rank in enumerate(term.ranks):
        A, B = term.A[start : start + rank], term.B[:, start : start + rank]
        used = (index == e).to(x.dtype) if weight is None else torch.where(index == e, weight.to(x.dtype), 0)
        z = z + used.sum(-1, keepdim=True) * linear(linear(x, A), B)
        start += rank
    return term.scale * z


def _gain(gain: Gain, W: Tensor) -> Tensor:
    if gain.over is None:
        return gain.g
    norm = (W + delta_weight(gain.over, W.dtype)).norm(dim=1).detach()
    return torch.where(norm == 0, 1.0, gain.g / torch.where(norm == 0, 1.0, norm))


def _drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError("reference: a term drops what it reads; give the seed of its mask.")
    return x * dropout_mask(seed, x.shape, p, dtype=x.dtype).to(x.device)


def in_dtype(term: Term, dtype: torch.dtype) -> Term:
    """The same term with its tensors in `dtype`, through which gradients go back to them."""

    def to(t: Tensor | KhatriRao) -> Tensor | KhatriRao:
        return KhatriRao(t.a.to(dtype), t.b.to(dtype)) if isinstance(t, KhatriRao) else t.to(dtype)

    match term:
        case LowRank():
            return replace(term, A=to(term.A), B=to(term.B), rows=None if term.rows is None else term.rows.to(dtype))
        case Grouped():
            return replace(term, A=term.A.to(dtype), B=term.B.to(dtype), rows=None if term.rows is None else term.rows.to(dtype))
        case Gain():
            return replace(term, g=term.g.to(dtype), over=None if term.over is None else in_dtype(term.over, dtype))  # type: ignore[arg-type]
        case Bias():
            return replace(term, b=term.b.to(dtype))
        case Kron():
            return replace(term, C=term.C.to(dtype), D=term.D.to(dtype))
        case Sparse():
            return replace(term, values=term.values.to(dtype))
        case Dense():
            if isinstance(term.delta, Composed):
                return replace(term, delta=Composed(_then(term.delta.compose, dtype), term.delta.tensors))
            return replace(term, delta=term.delta.to(dtype))


def _then(compose: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *tensors: compose(*tensors).to(dtype)
