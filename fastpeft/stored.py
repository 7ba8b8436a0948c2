"""Modules that stand for a layer's weight where a start replaced it by a dense or a factored one (quantised: fastpeft.quantised).

Each holds buffers, contiguous as a loaded one is, and gives a base by `view()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.base import Plain
from fastpeft.factored import Factored


class DenseWeight(nn.Module):
    """weight [out, in]."""

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.contiguous())

    @classmethod
    def room(cls, base: Any) -> DenseWeight:
        """Zeros of the base's shape, dtype and device, for a weight that will be loaded."""
        return cls(torch.zeros(base.out_features, base.in_features, dtype=base.dtype, device=base.device))

    def view(self) -> Plain:
        return Plain(self.weight)


class FactoredWeight(nn.Module):
    """U [out, R], V [R, in]."""

    U: Tensor
    V: Tensor

    def __init__(self, U: Tensor, V: Tensor):
        super().__init__()
        self.register_buffer("U", U.contiguous())
        self.register_buffer("V", V.contiguous())

    @classmethod
    def room(cls, base: Any, rank: int) -> FactoredWeight:
        """Zeros, as DenseWeight.room."""
        of = {"dtype": base.dtype, "device": base.device}
        return cls(torch.zeros(base.out_features, rank, **of), torch.zeros(rank, base.in_features, **of))

    def view(self) -> Factored:
        return Factored(self.U, self.V)
