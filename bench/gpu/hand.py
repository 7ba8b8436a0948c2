"""The LoRA that one writes by hand in an afternoon: cuBLAS products that accumulate in place, no kernel. The
arm to beat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bench.arms import Arm


class HandLoRA(nn.Module):
    """A frozen linear's weight and bias, A [r, in] and B [out, r] in the layer's dtype."""

    def __init__(self, linear: nn.Module, A: Tensor, B: Tensor, scale: float, dropout: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.A, self.B = (nn.Parameter(t.to(linear.weight.dtype)) for t in (A, B))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        return _Addmm.apply(x, self.weight, self.bias, self.A, self.B, self.scale, self.dropout)

    def mask(self, x: Tensor) -> Tensor:
        """What forward(x) drops from the same state of the generator."""
        return torch.native_dropout(torch.ones_like(x), self.dropout, True)[1].double() / (1 - self.dropout)


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float, p: float
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        u = dropped @ A.T
        y = torch.addmm(b, x, W.T)
        y.addmm_(u, B.T, alpha=scale)
        ctx.save_for_backward(dropped, mask, u, W, A, B)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, u, W, A, B = ctx.saved_tensors
        du = (dy @ B).mul_(ctx.scale)
        dx = dy @ W
        if mask is None:
            dx.addmm_(du, A)
        else:
            dx += torch.ops.aten.native_dropout_backward(du @ A, mask, 1 / (1 - ctx.p))
        return dx, None, None, du.T @ dropped, (dy.T @ u).mul_(ctx.scale), None, None


def hand_arm(like: Arm, frozen: Arm) -> Arm:
    """On the values of a fastpeft LoRA arm."""
    layer = HandLoRA(frozen.layer, like.start["A"], like.start["B"], like.scale, like.dropout)
    parameters = {"A": layer.A, "B": layer.B}
    name = like.name.replace("fastpeft", "hand-written addmm")
    return Arm(name, "hand", "lora", layer, parameters, like.start, like.scale, like.dropout)
