"""The Hadamard family in torch: y = scale * ((b1 a1) * (b2 a2)) x, elementwise *, as one low-rank product of rank r*r.

    A [r*r, in] rows a1[i] * a2[j]     B [out, r*r] columns b1[:, i] * b2[:, j]     u = x A^T     y = scale * u B^T

a1, a2 [r, in]; b1, b2 [out, r]; tensors is (a1, a2, b1, b2) throughout. A and B are composed where they are used and
nothing of rank r*r is kept: u is computed again in backward, and the gradients of A and B are contracted to the factors'.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import dense, lowrank

ON_BASE = False
# any rank
RANKS = math.inf


def fresh(x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
    """scale * term(x) + bias, [t, out] in x's dtype; x [t, in], bias [out]."""
    A, B = _composed(tensors)
    return lowrank.up(_u(x, A), B, scale, 1, bias)


def add(y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
    """y += scale * term(x) in place; y [t, out] in x's dtype."""
    A, B = _composed(tensors)
    lowrank.up_add(y, _u(x, A), B, scale, 1)


def back(
    dz: Tensor,
    x: Tensor | None,
    tensors: Sequence[Tensor],
    scale: float,
    dx: Tensor | None,
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """dx [t, in], onto the given one or fresh, and the gradients of a1, a2, b1, b2, of their shapes and dtypes."""
    A, B = _composed(tensors)
    a1, a2, b1, b2 = tensors
    need_a, need_b = needs[0] or needs[1], needs[2] or needs[3]
    u = _u(x, A) if need_b and x is not None else None
    du, dB = lowrank.du_db(dz, u, B, scale, 1, need_du=need_x or need_a, need_db=need_b)
    if need_x and du is not None:
        if dx is None:
            dx = lowrank.dx(du, A, seed=None, p=0.0, blocks=1)
        else:
            lowrank.dx_add(dx, du, A, seed=None, p=0.0, blocks=1)
    grads: list[Tensor | None] = [None, None, None, None]
    r = a1.shape[0]
    if need_a and x is not None and du is not None:
        dA = lowrank.da(x, du, A, seed=None, p=0.0, blocks=1).view(r, r, -1)
        grads[0] = (dA * a2).sum(1) if needs[0] else None
        grads[1] = (dA * a1[:, None]).sum(0) if needs[1] else None
    if dB is not None:
        dB = dB.view(-1, r, r)
        grads[2] = (dB * b2[:, None]).sum(2) if needs[2] else None
        grads[3] = (dB * b1[:, :, None]).sum(1) if needs[3] else None
    return dx, tuple([g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)])


def delta(tensors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """The dense update [out, in], formed in the factors' dtype and rounded once to `dtype`."""
    a1, a2, b1, b2 = (t.detach() for t in tensors)
    return (b1 @ a1).mul_(b2 @ a2).mul_(scale).to(dtype)


def back_dense(
    G: Tensor, tensors: Sequence[Tensor], scale: float, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of a1, a2, b1, b2 from the dense update's own, G [out, in] (overwritten)."""
    a1, a2, b1, b2 = (t.detach().to(G.dtype) for t in tensors)
    G.mul_(scale)
    first = G * (b2 @ a2) if needs[0] or needs[2] else None
    second = G.mul_(b1 @ a1) if needs[1] or needs[3] else None
    grads: tuple[Any, ...] = (
        b1.T @ first if needs[0] else None,
        b2.T @ second if needs[1] else None,
        first @ a1.T if needs[2] else None,
        second @ a2.T if needs[3] else None,
    )
    return tuple([g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)])


def _u(x: Tensor, A: Tensor) -> Tensor:
    return lowrank.down(x, A, x.dtype, seed=None, p=0.0, blocks=1)


def _composed(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    a1, a2, b1, b2 = tensors
    return (a1[:, None] * a2).flatten(0, 1), (b1[:, :, None] * b2[:, None]).flatten(1)


def materialises(out_features: int, in_features: int, rank: int, on_base: bool) -> bool:
    """Whether the dense update costs fewer products of tokens than the low-rank one of rank r*r.

    Dense: one of [out, in] for the gradient; where the update may not be added to W, two more, and the gradient is summed in
    fp32, which on a CPU costs as much as three 16-bit ones. Low-rank: three of [r*r, out], four of [r*r, in] (one of them
    again in backward). Measured on a CPU (bench.structured); on a GPU it is a model.
    """
    dense_cost = out_features * in_features * (1 if on_base else 5)
    return rank * rank * (3 * out_features + 4 * in_features) > dense_cost


class OnBase:
    """The update formed as a whole and added to a copy of W: for ranks above the crossover."""

    ON_BASE = True

    @staticmethod
    @contextlib.contextmanager
    def change(base: Any, tensors: Sequence[Tensor], scale: float) -> Iterator[Any]:
        yield base.plus(delta(tensors, scale, base.dtype))

    @staticmethod
    def back(dz, x, tensors, scale, dx, need_x, needs):
        return dx, _grads(dz, x, tensors, scale, needs)


class Own:
    """The update formed as a whole, with a product of its own: where W has 16 bits, which would round it away."""

    ON_BASE = False

    @staticmethod
    def fresh(x, tensors, scale, bias):
        return dense.Own.fresh(x, (delta(tensors, scale, x.dtype),), 1.0, bias)

    @staticmethod
    def add(y, x, tensors, scale):
        dense.Own.add(y, x, (delta(tensors, scale, x.dtype),), 1.0)

    @staticmethod
    def back(dz, x, tensors, scale, dx, need_x, needs):
        if need_x:
            dx, _ = dense.Own.back(dz, None, (delta(tensors, scale, dz.dtype),), 1.0, dx, True, (False,))
        return dx, _grads(dz, x, tensors, scale, needs)


def _grads(dz: Tensor, x: Tensor | None, tensors: Sequence[Tensor], scale: float, needs: Sequence[bool]):
    if x is None or not any(needs):
        return (None,) * 4
    return back_dense(dense.grad(dz, x, tensors[0].dtype), tensors, scale, needs)
