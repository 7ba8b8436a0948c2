"""The quantiser of the starts that need one: NormalFloat in blocks, without double quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.base import Plain
from fastpeft.quantised import NF4Weight

# numbers that share a scale, of the starts that have no option for it
BLOCK = 64
# a dense weight -> the module that stores it quantised, and what that stands for, in the weight's own dtype
Quantise = Callable[[Tensor], tuple[nn.Module, Tensor]]


def normal_float(bits: int, block: int, dtype: torch.dtype) -> Quantise:
    """The quantiser to `bits` bits in blocks of `block`; the module computes in `dtype`."""

    def quantise(W: Tensor) -> tuple[nn.Module, Tensor]:
        stored = NF4Weight.quantise(W, bits, block)
        Q = stored.view().dense(W.dtype)
        stored.dtype = dtype
        return stored, Q

    return quantise


def room(base: Any, bits: int, block: int) -> nn.Module:
    """The same module for a weight of the base's shape, dtype and device, with nothing in it yet."""
    like = torch.empty((), dtype=base.dtype, device=base.device).expand(base.out_features, base.in_features)
    return NF4Weight.empty(like, bits, block)


def check_blocks(who: str, site: str, base: Any, bits: Any, block: Any) -> None:
    """Raise ValueError, naming the site, where no such module holds its weight."""
    try:
        room(Plain(torch.empty(base.out_features, base.in_features, device="meta")), bits, block)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: bits={bits!r}, block={block!r} at {site!r}: {error}") from error
