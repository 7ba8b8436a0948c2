"""||W + B A||^2 of each row in one pass over W: DoRA's norm (arXiv 2402.09353, the magnitude's denominator)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft.ops.slabs import quiet_autocast, slabs


def row_sq_norm(W: Tensor, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """W [out, in], A [R, in], B [out, R] -> [out] in fp32 (fp64 if W or A is fp64); differentiable in A and B.

    Saves nothing but A and B: the backward forms each slab of W + B A again.
    """
    if (A is None) != (B is None):
        raise ValueError("row_sq_norm: A and B come together; got only one of them.")
    return _RowSqNorm.apply(W, A, B)


def _accumulator(W: Tensor, A: Tensor | None) -> torch.dtype:
    wide = W.dtype == torch.float64 or (A is not None and A.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def _slab(W: Tensor, A: Tensor | None, B: Tensor | None, rows: slice, acc: torch.dtype) -> Tensor:
    """A fresh [slab, in] tensor W[rows] + B[rows] A in `acc`."""
    if A is None or B is None:
        return W[rows].to(acc, copy=True)
    return torch.addmm(W[rows].to(acc), B[rows].to(acc), A.to(acc))


class _RowSqNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
        acc = _accumulator(W, A)
        ctx.save_for_backward(W, A, B)
        parts = [_slab(W, A, B, s, acc).square_().sum(1) for s in slabs(W.shape[0], W.shape[1], acc.itemsize)]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else W.new_zeros(0, dtype=acc)

    @staticmethod
    @once_differentiable
    @quiet_autocast
    def backward(ctx, d: Tensor):
        W, A, B = ctx.saved_tensors
        if A is None:
            return None, None, None
        acc = _accumulator(W, A)
        a = A.to(acc)
        dA = torch.zeros_like(a) if ctx.needs_input_grad[1] else None
        dB = []
        for s in slabs(W.shape[0], W.shape[1], acc.itemsize):
            dV = _slab(W, A, B, s, acc).mul_(2 * d[s, None].to(acc))
            if dA is not None:
                dA.addmm_(B[s].to(acc).T, dV)
            if ctx.needs_input_grad[2]:
                dB.append(dV @ a.T)
        return (
            None,
            None if dA is None else dA.to(A.dtype),
            torch.cat(dB).to(B.dtype) if ctx.needs_input_grad[2] else None,
        )
