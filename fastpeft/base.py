"""Frozen views of a weight: the only thing of the base layer that ops and methods see.

A storage format (dense here; NF4, int8 and factored later) is one class with these few methods, so that no method and no
op is written once per format.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft.ops.rownorm import row_sq_norm
from fastpeft.ops.slabs import quiet_autocast


class Plain:
    """A dense weight W [out, in] of any strides (a Transformers Conv1D passes its weight transposed)."""

    __slots__ = ("W",)

    def __init__(self, weight: Tensor):
        self.W = weight

    @property
    def out_features(self) -> int:
        return self.W.shape[0]

    @property
    def in_features(self) -> int:
        return self.W.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.W.dtype

    @property
    def device(self) -> torch.device:
        return self.W.device

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] -> x W^T (+ bias) [tokens, out] in x's dtype; no autograd (ops call it)."""
        return torch.nn.functional.linear(x, self.W.to(x.dtype), bias)

    def grad_linear(self, dz: Tensor) -> Tensor:
        """dz [tokens, out] -> dz W [tokens, in] in dz's dtype; no autograd (ops call it)."""
        return dz @ self.W.to(dz.dtype)

    def linear(self, rows: Tensor) -> Tensor:
        """rows [R, in] -> rows W^T [R, out] in rows' dtype, differentiable in rows. For methods: W A^T is linear(A)^T."""
        return _BaseLinear.apply(rows, self)

    def row_sq_norm(self, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        """||W + B A||^2 of each row, [out]; fp32 (fp64 if W or A is), differentiable in A [R, in] and B [out, R].

        One pass over W in slabs of rows; W + B A is never formed as a whole and never expanded into
        ||W||^2 + 2<B, W A^T> + ..., which loses every digit where a row nearly cancels.
        """
        if self.W.requires_grad and A is not None and A.requires_grad:
            raise ValueError(
                "row_sq_norm: W trains, and the norm's gradient in W is not computed; freeze W, or hold the norm constant "
                "(dora: grad='simple')."
            )
        return row_sq_norm(self.W.detach(), A, B)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of W [out, in] in `dtype`."""
        return self.W.detach().to(dtype, copy=True)


class _BaseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, base: Plain) -> Tensor:
        ctx.base = base
        return base.forward(rows)

    @staticmethod
    @once_differentiable
    @quiet_autocast
    def backward(ctx, d: Tensor):
        return ctx.base.grad_linear(d), None
