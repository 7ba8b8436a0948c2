"""Terms whose products run in a wider dtype than y's: fp32 adapters that a bf16 layer is to feel in fp32, without autocast.

    y = round(y + s * term(wide(x)))          a slab of tokens at a time; x is kept in its own dtype, and no wide copy of it

Families as fastpeft.ops.parts has them, which are added onto a y that is there (Part.onto_y). The project's own methods do not use them: there a factor is rounded to y's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.dropout import dropout
from fastpeft.ops.slabs import slabs

Grads = tuple[Tensor | None, ...]


class LowRank:
    """scale * drop(x) A^T B^T in `dtype`; tensors: A [r, in], B [out, r] and, with p > 0, the seed."""

    ON_BASE = False

    def __init__(self, dtype: torch.dtype, p: float):
        self.dtype, self.p = dtype, p

    def add(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
        """y += scale * term(x) in place, each sum rounded once to y's dtype."""
        A, B = self._factors(tensors)
        for s in _blocks(x, y):
            u = self._read(x, s, tensors) @ A.t()
            y[s] = torch.addmm(y[s].to(self.dtype), u, B.t(), alpha=scale)

    def back(
        self,
        dz: Tensor,
        x: Tensor | None,
        tensors: Sequence[Tensor],
        scale: float,
        dx: Tensor | None,
        need_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Grads]:
        """dx [t, in], the base's own, with this share added in place; dA and dB, summed in `dtype`."""
        A, B = self._factors(tensors)
        dA = torch.zeros_like(A) if needs[0] else None
        dB = torch.zeros_like(B) if needs[1] else None
        for s in _blocks(dz, A):
            d = dz[s].to(self.dtype)
            du = torch.mm(d, B).mul_(scale) if dx is not None or dA is not None else None
            if dx is not None and du is not None:
                part = du @ A
                part = dropout(part, tensors[2], self.p, s.start) if self.p else part
                dx[s] = part.add_(dx[s])
            if dA is None and dB is None:
                continue
            h = self._read(x, s, tensors)
            if dA is not None and du is not None:
                dA.addmm_(du.t(), h)
            if dB is not None:
                dB.addmm_(d.t(), h @ A.t(), alpha=scale)
        grads = [g if g is None else g.to(t.dtype) for g, t in zip((dA, dB), tensors, strict=False)]
        return dx, (*grads, *(None,) * (len(tensors) - 2))

    def _factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return tensors[0].detach().to(self.dtype), tensors[1].detach().to(self.dtype)

    def _read(self, x: Any, rows: slice, tensors: Sequence[Tensor]) -> Tensor:
        part = x[rows].to(self.dtype)
        return dropout(part, tensors[2], self.p, rows.start) if self.p else part


class Wide:
    """The family `ops`, one that stands beside the base product, in `dtype`; tensors are its own."""

    ON_BASE = False

    def __init__(self, ops: Any, dtype: torch.dtype):
        self.ops, self.dtype = ops, dtype

    def add(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
        """As LowRank.add."""
        for s in _blocks(x, y):
            part = y[s].to(self.dtype)
            self.ops.add(part, x[s].to(self.dtype), tensors, scale)
            y[s] = part

    def back(
        self,
        dz: Tensor,
        x: Tensor | None,
        tensors: Sequence[Tensor],
        scale: float,
        dx: Tensor | None,
        need_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Grads]:
        """As LowRank.back, of the family's tensors."""
        total: list[Tensor | None] = [None] * len(tensors)
        for s in _blocks(dz, dz if x is None else x):
            given = None if x is None else x[s].to(self.dtype)
            onto = None if dx is None else dx[s].to(self.dtype)
            onto, grads = self.ops.back(dz[s].to(self.dtype), given, tensors, scale, onto, need_x, needs)
            if dx is not None:
                dx[s] = onto
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, grads, strict=True)]
        return dx, tuple(total)


def _blocks(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Slabs of x's rows where a slab stays in a cache, and all of them where each would be a launch, or there are none."""
    if x.device.type != "cpu" or x.shape[0] == 0:
        return iter((slice(0, x.shape[0]),))
    return slabs(x.shape[0], x.shape[1] + y.shape[-1], 4)
