"""The dense family in torch: y = scale * x delta^T for a materialised update delta [out, in]; tensors is (delta,).

While torch.compile traces it is (delta, delta detached): a Function of one tensor and the closing None would have exactly two
varargs, and Dynamo drops ctx from such a one when nothing requires grad (torch 2.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.slabs import slabs


class Own:
    """A product beside the base's: for 16-bit weights, to which delta cannot be added without rounding."""

    ON_BASE = False

    @staticmethod
    def fresh(x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
        delta = tensors[0].detach().to(x.dtype).t()
        if bias is not None:
            return torch.addmm(bias.to(x.dtype), x, delta, alpha=scale)
        return torch.mm(x, delta) if scale == 1.0 else torch.mm(x, delta).mul_(scale)

    @staticmethod
    def add(y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
        y.addmm_(x, tensors[0].detach().to(x.dtype).t(), alpha=scale)

    @staticmethod
    def back(
        dz: Tensor,
        x: Tensor | None,
        tensors: Sequence[Tensor],
        scale: float,
        dx: Tensor | None,
        need_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        delta = tensors[0]
        if need_x:
            d = delta.detach().to(dz.dtype)
            dx = torch.mm(dz, d).mul_(scale) if dx is None else dx.addmm_(dz, d, alpha=scale)
        return dx, _grads(dz, x, delta, scale, needs)


class OnBase:
    """delta is added to a copy of W for the time of one product."""

    ON_BASE = True

    @staticmethod
    @contextlib.contextmanager
    def change(base: Any, tensors: Sequence[Tensor], scale: float) -> Iterator[Any]:
        yield base.plus(tensors[0].detach(), scale)

    @staticmethod
    def back(dz, x, tensors, scale, dx, need_x, needs):
        return dx, _grads(dz, x, tensors[0], scale, needs)


class Collect(OnBase):
    """A delta without storage: it adds nothing, and its gradient is dW."""

    @staticmethod
    @contextlib.contextmanager
    def change(base: Any, tensors: Sequence[Tensor], scale: float) -> Iterator[Any]:
        yield base


def grad(dz: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dz^T x, [out, in] in `dtype`; dz [t, out] and x [t, in] of one dtype. In a wider dtype it is summed in that one."""
    if dz.dtype is dtype:
        return torch.mm(dz.t(), x)
    G = dz.new_zeros(dz.shape[1], x.shape[1], dtype=dtype)
    for s in slabs(dz.shape[0], max(dz.shape[1], x.shape[1]), dtype.itemsize):
        G.addmm_(dz[s].t().to(dtype), x[s].to(dtype))
    return G


def _grads(
    dz: Tensor, x: Tensor | None, delta: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    rest = (None,) * (len(needs) - 1)
    if not needs[0] or x is None:
        return None, *rest
    G = grad(dz, x, delta.dtype)
    return G if scale == 1.0 else G.mul_(scale), *rest
