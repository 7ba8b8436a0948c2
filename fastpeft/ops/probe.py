"""What a router reads, by itself: p = x rows^T, where it must be known before the seam begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.slabs import once


def probe(x: Tensor, rows: Tensor, dtype: torch.dtype, ops: Any) -> Tensor:
    """x rows^T, [..., P] in `dtype`, differentiable; x [..., in], rows [P, in]. ops: the low-rank family."""
    p: Tensor = _Probe.apply(x, rows, dtype, ops)
    return p


class _Probe(torch.autograd.Function):
    """The products of the low-rank family, so that fp32 rows of a 16-bit layer get sums in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, dtype: torch.dtype, ops: Any) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, rows)
        ctx.ops, ctx.x_shape, ctx.x_dtype = ops, x.shape, x.dtype
        p = ops.down(x.reshape(-1, x.shape[-1]), rows, dtype, seed=None, p=0.0, blocks=1)
        return p.view(*x.shape[:-1], rows.shape[0])

    @staticmethod
    @once
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        x, rows = ctx.saved_tensors
        dp = dp.reshape(-1, rows.shape[0])
        dx = drows = None
        if ctx.needs_input_grad[0]:
            dx = ctx.ops.dx(dp, rows, seed=None, p=0.0, blocks=1).view(ctx.x_shape).to(ctx.x_dtype)
        if x is not None:
            drows = ctx.ops.da(x.reshape(-1, x.shape[-1]), dp, rows, seed=None, p=0.0, blocks=1)
        return dx, drows, None, None
