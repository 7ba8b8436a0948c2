"""||W + B A||^2 of each row in one pass over W: DoRA's norm (arXiv 2402.09353, the magnitude's denominator).

W: a tensor [out, in], or a base of fastpeft.base, which is asked for its weight in each direction and so keeps none of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import lowrank
from fastpeft.ops import lowrank_cpu as cpu
from fastpeft.ops.family import resolve
from fastpeft.ops.rownorm_triton import row_sq_norm_forward
from fastpeft.ops.slabs import once, slabs


def row_sq_norm(W: Any, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """W [out, in], A [R, in], B [out, R] -> [out] in fp32 (fp64 if W or A is fp64); differentiable in A and B.

    The forward runs C++ on the CPU and Triton where the low-rank family does (fastpeft.ops.family).
    Saves nothing but A and B: the backward forms each slab of W + B A again.
    """
    if (A is None) != (B is None):
        raise ValueError("row_sq_norm: A and B come together; got only one of them.")
    return _RowSqNorm.apply(W, A, B)


def row_gain(m: Tensor, W: Any, A: Tensor, B: Tensor, scale: float, through_norm: bool) -> Tensor:
    """m / ||W + scale B A|| of each row, [out] in m's dtype; 1 where a row's norm is zero, and no gradient is NaN there.

    Differentiable in m [out], and with through_norm in A and B, which the norm is a constant of otherwise.
    """
    if through_norm:
        return _RowGain.apply(m, W, A, B, scale)
    inverse, rest = _inverse_norm(_read(W), A.detach(), B.detach(), scale)
    return torch.addcmul(rest, m, inverse).to(m.dtype)


def _read(W: Any, after: Tensor | None = None) -> Tensor:
    """The weight itself. after: the gradient of the pass that asks, if it is a backward."""
    return W if isinstance(W, Tensor) else W.weight(after)


def _accumulator(W: Tensor, A: Tensor | None) -> torch.dtype:
    wide = W.dtype == torch.float64 or (A is not None and A.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def _slab(W: Tensor, A: Tensor | None, B: Tensor | None, rows: slice, acc: torch.dtype, scale: float) -> Tensor:
    """A fresh [slab, in] tensor W[rows] + scale * B[rows] A in `acc`."""
    if A is None or B is None:
        return W[rows].to(acc, copy=True)
    return torch.addmm(W[rows].to(acc), B[rows].to(acc), A.to(acc), alpha=scale)


def _sq_norm(W: Tensor, A: Tensor | None, B: Tensor | None, scale: float = 1.0) -> Tensor:
    """||W + scale B A||^2 of each row."""
    acc = _accumulator(W, A)
    if resolve(None, W.device.type, acc) is not lowrank:
        return row_sq_norm_forward(W, A, B if B is None or scale == 1.0 else B * scale)
    if acc is torch.float32 and A is not None and B is not None and cpu.runs(W, 0):
        return cpu.norm(W, A, B, scale)
    parts = [
        _slab(W, A, B, s, acc, scale).square_().sum(1) for s in slabs(W.shape[0], W.shape[1], acc.itemsize)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else W.new_zeros(0, dtype=acc)


def _inverse_norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """1 / ||W + scale B A|| of each row and 0; where that norm is zero, 0 and 1. So m / norm is m * first + second."""
    if A.dtype is torch.float32 and cpu.runs(W, 0) and resolve(None, "cpu") is lowrank:
        return cpu.inverse_norm(W, A, B, scale)
    square = _sq_norm(W, A, B, scale)
    zero = square == 0
    return square.rsqrt().masked_fill(zero, 0.0), zero.to(square.dtype)


def _sq_norm_backward(
    W: Tensor, A: Tensor, B: Tensor, scale: float, d: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB of _sq_norm for a gradient d [out]."""
    acc = _accumulator(W, A)
    a = A.to(acc)
    dA = torch.zeros_like(a) if need_a else None
    dB = []
    for s in slabs(W.shape[0], W.shape[1], acc.itemsize):
        dV = _slab(W, A, B, s, acc, scale).mul_((2 * scale) * d[s, None].to(acc))
        if dA is not None:
            dA.addmm_(B[s].to(acc).T, dV)
        if need_b:
            dB.append(dV @ a.T)
    return None if dA is None else dA.to(A.dtype), torch.cat(dB).to(B.dtype) if dB else None


class _RowSqNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W: Any, A: Tensor | None, B: Tensor | None) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.W = W
        return _sq_norm(_read(W), A, B)

    @staticmethod
    @once
    def backward(ctx, d: Tensor):
        A, B = ctx.saved_tensors
        if A is None:
            return None, None, None
        return None, *_sq_norm_backward(_read(ctx.W, d), A, B, 1.0, d, *ctx.needs_input_grad[1:])


class _RowGain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m: Tensor, W: Any, A: Tensor, B: Tensor, scale: float) -> Tensor:
        inverse, rest = _inverse_norm(_read(W), A, B, scale)
        ctx.save_for_backward(inverse, m, A, B)
        ctx.W, ctx.scale = W, scale
        return torch.addcmul(rest, m, inverse).to(m.dtype)

    @staticmethod
    @once
    def backward(ctx, d: Tensor):
        inverse, m, A, B = ctx.saved_tensors
        dm = d * inverse
        # d (m / sqrt(q)) / dq = -m / (2 q^1.5)
        d_square = dm * m * inverse.square() * -0.5
        dA, dB = _sq_norm_backward(_read(ctx.W, d), A, B, ctx.scale, d_square, *ctx.needs_input_grad[2:4])
        return dm.to(d.dtype), None, dA, dB, None
