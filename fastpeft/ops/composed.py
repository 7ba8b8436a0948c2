"""Updates that a function composes from their tensors: composed where they are used, and again in backward; none is kept.

    y = scale * x compose(*tensors)^T        the gradients of the tensors come from autograd through compose, run once more

The families OnBase and Own are dense's for such an update. `pieces` is the Function for one composition that several layers
use: its outputs are kept by who uses them, and what lies between them and the tensors is computed again in backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import dense
from fastpeft.ops.slabs import once


class OnBase:
    """The update is added to a copy of W for the time of one product."""

    ON_BASE = True

    def __init__(self, compose: Callable[..., Tensor]):
        self.compose = compose

    @contextlib.contextmanager
    def change(self, base: Any, tensors: Sequence[Tensor], scale: float) -> Iterator[Any]:
        yield base.plus(self._delta(tensors), scale)

    def back(
        self,
        dz: Tensor,
        x: Tensor | None,
        tensors: Sequence[Tensor],
        scale: float,
        dx: Tensor | None,
        need_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        if x is None or not any(needs):
            return dx, (None,) * len(needs)
        G = dense.grad(dz, x, tensors[0].dtype)
        return dx, _through(self.compose, tensors, needs, (G if scale == 1.0 else G.mul_(scale),))

    def _delta(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.compose(*[t.detach() for t in tensors])


class Own(OnBase):
    """A product beside the base's: for 16-bit weights, to which the update cannot be added without rounding."""

    ON_BASE = False

    def fresh(self, x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
        return dense.Own.fresh(x, (self._delta(tensors),), scale, bias)

    def add(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
        dense.Own.add(y, x, (self._delta(tensors),), scale)

    def back(self, dz, x, tensors, scale, dx, need_x, needs):
        if need_x:
            dx, _ = dense.Own.back(dz, None, (self._delta(tensors),), scale, dx, True, (False,))
        return super().back(dz, x, tensors, scale, dx, False, needs)


def _through(
    compose: Callable[..., Any], tensors: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors from those of what compose makes of them, a tensor or several."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        made = compose(*leaves)
    outs = [made] if isinstance(made, Tensor) else made
    used = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not used or not wanted:
        return (None,) * len(leaves)
    found = iter(torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], allow_unused=True))
    return tuple([next(found) if leaf.requires_grad else None for leaf in leaves])


def pieces(compose: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """compose(*tensors), several tensors, of which only the outputs are kept for backward."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return compose(*tensors)
    return _Pieces.apply(compose, *tensors)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compose: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.compose = compose
        return compose(*tensors)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_through(ctx.compose, ctx.saved_tensors, ctx.needs_input_grad[1:], grads)
