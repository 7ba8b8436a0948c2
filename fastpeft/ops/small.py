"""One fp32 low-rank term on a small layer and few tokens: the whole forward, and the whole backward, in one C++ call each.

There a call costs what it takes to get from one operator to the next, not what they compute. The arithmetic is that of
fastpeft.ops.seam.One, with the norm of a `Gain(..., over=...)` taken inside; test_seam.py holds both against the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import lowrank_cpu as cpu
from fastpeft.ops.dropout import _EXTENSION
from fastpeft.ops.slabs import once

# products of tokens, in and out up to which a core computes them all in the time of a few operator calls
LARGEST = 1 << 18


def takes(x: Tensor, W: Tensor | None, A: Tensor, B: Tensor, bias: Tensor | None, gain: Tensor | None) -> bool:
    """Whether Small computes x [..., in] under W [out, in], A [r, in], B [out, r]: all fp32, on the CPU, contiguous, small.

    Not where a factor or the gain is frozen while the others train: Small would keep what nobody reads. W is None where the
    base is stored in another form.
    """
    if W is None or not cpu.runs(W, 1) or x.numel() * W.shape[0] > LARGEST or x.dim() < 2 or x.numel() == 0:
        return False
    tensors = [t for t in (x, W, A, B, bias, gain) if t is not None]
    if torch.is_grad_enabled() and not (A.requires_grad and B.requires_grad and (gain is None or gain.requires_grad)):
        return False
    return all([t.dtype is torch.float32 and type(t) in cpu.OWN and t.is_contiguous() for t in tensors])


class Small(torch.autograd.Function):
    """y [*lead, out]; bias [out], gain [out] fp32 or None. over: gain is divided by the row norms of W + scale B A."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        W: Tensor,
        scale: float,
        over: bool,
    ) -> Tensor:
        (o, i), r = W.shape, A.shape[0]
        t = x.numel() // i
        # y, u, and with a gain z, the gain itself and what a magnitude was multiplied by: one piece of memory
        y = x.new_empty((*x.shape[:-1], o))
        kept = x.new_empty(t * r if gain is None else t * r + t * o + 2 * o)
        _EXTENSION.small_forward(
            x.data_ptr(), W.data_ptr(), A.data_ptr(), B.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if gain is None else gain.data_ptr(), y.data_ptr(), kept.data_ptr(), t, i, o, r, scale, over,
        )  # fmt: skip
        ctx.save_for_backward(x, W, A, B, kept)
        ctx.scale, ctx.has_gain = scale, gain is not None
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, kept = ctx.saved_tensors
        need_x, need_a, need_b, need_bias, need_gain, *_ = ctx.needs_input_grad
        dy = dy.contiguous()
        (o, i), r = W.shape, A.shape[0]
        dx = dA = dB = dbias = dgain = None
        dx_at = da_at = db_at = dbias_at = dgain_at = 0
        if need_x:
            dx = torch.empty_like(x)
            dx_at = dx.data_ptr()
        if need_a:
            dA = torch.empty_like(A)
            da_at = dA.data_ptr()
        if need_b:
            dB = torch.empty_like(B)
            db_at = dB.data_ptr()
        if need_bias:
            dbias = x.new_empty(o)
            dbias_at = dbias.data_ptr()
        if need_gain:
            dgain = x.new_empty(o)
            dgain_at = dgain.data_ptr()
        _EXTENSION.small_backward(
            x.data_ptr(), W.data_ptr(), A.data_ptr(), B.data_ptr(), kept.data_ptr(), dy.data_ptr(),
            dx_at, da_at, db_at, dbias_at, dgain_at, x.numel() // i, i, o, r, ctx.scale, ctx.has_gain,
        )  # fmt: skip
        return dx, dA, dB, dbias, dgain, None, None, None
