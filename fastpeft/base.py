"""Frozen views of a weight: the only thing of the base layer that ops and methods see.

A storage format (dense here; NF4 and int8 in fastpeft.quantised) is one class with these few methods, so that no method and
no op is written once per format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastpeft.ops.gain import scale_columns, scale_rows
from fastpeft.ops.rownorm import row_gain, row_sq_norm
from fastpeft.ops.slabs import fewer, once, row_blocks
from fastpeft.ops.sparse import scatter
from fastpeft.ops.workspace import workspace

_W_TRAINS = (
    "{}: W trains, and the norm's gradient in W is not computed; freeze W, or hold the norm constant (dora: grad='simple')."
)
# rows of dz that meet W at a time: fewer, and the product packs W too often
GEMM_ROWS = 512


def _cast(W: Tensor, dtype: torch.dtype) -> Tensor:
    return W if W.dtype is dtype else W.to(dtype)


class Base:
    """What follows from `forward`, `grad_linear` and `weight` of any storage format.

    W: the weight itself where it lies in memory, else None: ops that would use it in place ask.   trains: whether it wants a
    gradient, which only a W can.
    """

    __slots__ = ()
    W: Any = None
    trains: bool = False

    def weight(self, after: Tensor | None = None) -> Tensor:
        """W [out, in] in the base's dtype, detached, to be read before anything else is computed with a base weight.

        after: the gradient that a backward pass has, where one reads W (see fastpeft.ops.nf4.dequantise).
        """
        raise NotImplementedError

    def in_backward(self, d: Tensor) -> Any:
        """The base as a backward pass that has the gradient d reads it."""
        return self

    # the workspace that these write is the one in which `weight` may have put W
    def plus(self, delta: Tensor, scale: float = 1.0) -> Plain:
        return Plain(self.weight()).plus(delta, scale)

    def scattered(self, values: Tensor, index: Tensor, copy: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> Plain:
        return Plain(self.weight()).scattered(values, index, copy)

    def linear(self, rows: Tensor) -> Tensor:
        """rows [R, in] -> rows W^T [R, out] in rows' dtype, differentiable in rows. For methods: W A^T is linear(A)^T."""
        return _BaseLinear.apply(rows, self)

    def row_sq_norm(self, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        """||W + B A||^2 of each row, [out]; fp32 (fp64 if W or A is), differentiable in A [R, in] and B [out, R].

        One pass over W in slabs of rows; W + B A is never formed as a whole and never expanded into
        ||W||^2 + 2<B, W A^T> + ..., which loses every digit where a row nearly cancels.
        """
        if self.trains and A is not None and A.requires_grad:
            raise ValueError(_W_TRAINS.format("row_sq_norm"))
        return row_sq_norm(self, A, B)

    def row_gain(self, m: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, *, constant: bool = False) -> Tensor:
        """m / ||W + scale B A|| of each row, [out] in m's dtype; 1 where that norm is zero. The norm is row_sq_norm's.

        Differentiable in m [out] and, unless the norm is `constant`, in A [R, in] and B [out, R]; ValueError if W trains then.
        """
        if not constant and self.trains:
            raise ValueError(_W_TRAINS.format("row_gain"))
        return row_gain(m, self, A, B, scale, not constant)


class Plain(Base):
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

    @property
    def trains(self) -> bool:  # type: ignore[override]
        """Whether W wants a gradient (a user unfroze it): ops read `W` itself then."""
        return self.W.requires_grad

    def weight(self, after: Tensor | None = None) -> Tensor:
        return self.W.detach()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] -> x W^T (+ bias) [tokens, out] in x's dtype; no autograd (ops call it)."""
        return linear(x, _cast(self.W, x.dtype), bias)

    def forward_onto(self, z: Tensor, x: Tensor) -> None:
        """z += x W^T in place; x [tokens, in] in z's dtype, z [tokens, out]; no autograd (ops call it)."""
        z.addmm_(x, _cast(self.W, x.dtype).t())

    def grad_linear(self, dz: Tensor, gain: Tensor | None = None) -> Tensor:
        """dz [tokens, out] -> (gain * dz) W [tokens, in] in dz's dtype, gain [out]; no autograd (ops call it)."""
        W = self.W
        if gain is None:
            return torch.mm(dz, _cast(W, dz.dtype))
        if fewer(self.in_features, dz.shape[0]):
            return torch.mm(dz, scale_columns(W, gain, dz.dtype))
        if torch.compiler.is_compiling() or dz.shape[0] <= GEMM_ROWS:
            return torch.mm(scale_rows(dz, gain), _cast(W, dz.dtype))
        dx = dz.new_empty(dz.shape[0], self.in_features)
        for s in row_blocks(dz.shape[0], GEMM_ROWS):
            torch.mm(scale_rows(dz[s], gain), _cast(W, dz.dtype), out=dx[s])
        return dx

    def grad_onto(self, dx: Tensor, dz: Tensor, gain: Tensor | None = None) -> None:
        """dx += (gain * dz) W in place; dx [tokens, in] in dz's dtype, gain [out]; no autograd (ops call it).

        The gain meets the smaller of W and dz, and the latter a slab of rows at a time.
        """
        if gain is None:
            dx.addmm_(dz, _cast(self.W, dz.dtype))
        elif fewer(self.in_features, dz.shape[0]):
            dx.addmm_(dz, scale_columns(self.W, gain, dz.dtype))
        elif fewer(dz.shape[0], GEMM_ROWS + 1):
            dx.addmm_(scale_rows(dz, gain), _cast(self.W, dz.dtype))
        else:
            for s in row_blocks(dz.shape[0], GEMM_ROWS):
                dx[s].addmm_(scale_rows(dz[s], gain), _cast(self.W, dz.dtype))

    def plus(self, delta: Tensor, scale: float = 1.0) -> Plain:
        """W + scale * delta, added in W's dtype, in a workspace: good for the next product only (ops call it)."""
        W = self.W.detach()
        if torch.compiler.is_compiling():
            return Plain(torch.add(W, delta.to(W.dtype), alpha=scale))
        out = workspace(W.shape[0], W.shape[1], W.dtype, W.device)
        return Plain(torch.add(W, delta.to(W.dtype), alpha=scale, out=out))

    def scattered(self, values: Tensor, index: Tensor, copy: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> Plain:
        """W with values [nnz] added at index [2, nnz], each sum rounded once to W's dtype, in a workspace as plus's.

        copy(W, values, index, out) does it.
        """
        W = self.W.detach()
        if torch.compiler.is_compiling():
            return Plain(scatter(W.clone(), values, index))
        out = workspace(W.shape[0], W.shape[1], W.dtype, W.device)
        copy(W, values, index, out)
        return Plain(out)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of W [out, in] in `dtype`."""
        return self.W.detach().to(dtype, copy=True)


class _BaseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, base: Any) -> Tensor:
        ctx.base = base
        return base.forward(rows)

    @staticmethod
    @once
    def backward(ctx, d: Tensor):
        return ctx.base.grad_linear(d), None
