"""Layers whose weight is kept packed by bitsandbytes: Linear4bit and Linear8bitLt, adapted as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.linear import check_input, run_terms

_CLASSES = ("Linear4bit", "Linear8bitLt")


def kind_of(cls: type) -> str | None:
    """ "Linear4bit" or "Linear8bitLt" for such a class of bitsandbytes or a subclass of it, else None; bitsandbytes is not imported."""
    return next((c.__name__ for c in cls.__mro__ if c.__name__ in _CLASSES and c.__module__.startswith("bitsandbytes.")), None)


def is_packed(cls: type) -> bool:
    return kind_of(cls) is not None


def packed_base(module: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """The view of a packed layer's weight; dtype: what it computes in (fastpeft.integrations.bitsandbytes.base_of)."""
    from fastpeft.integrations.bitsandbytes import base_of

    return base_of(module, dtype)


def packed_forward(module: Any, x: Tensor) -> Tensor:
    """y in x's dtype, computed in the layer's compute_dtype where it has one (as bitsandbytes does), else in x's."""
    adapter = module.adapter
    dtype = getattr(module, "compute_dtype", None) or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    base = packed_base(module, dtype)
    x_in, x = x, x.to(dtype)
    check_input(x, base)
    bias = module.bias if module.bias is None or module.bias.dtype is dtype else module.bias.to(dtype)
    terms = adapter.terms(base) if adapter.enabled else []
    return run_terms(x, base, bias, terms).to(x_in.dtype)


def unpack(module: Any, weight: Tensor) -> None:
    """Make the layer an nn.Linear of this dense weight [out, in]; its own is given up."""
    module.__class__ = nn.Linear
    module.weight = nn.Parameter(weight, requires_grad=False)
    for name in ("quant_state", "state"):
        module.__dict__.pop(name, None)
