"""The classes that PEFT's layers change into: each derives from the layer's own class and differs from it in `forward` alone.

They are made when a model asks for them, or a pickle does (by the module's __getattr__), and are attributes of this module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpeft.accelerated import adalora, lora, lycoris, shira
from fastpeft.accelerated.base import ready
from fastpeft.accelerated.calls import count_fused, count_peft
from fastpeft.accelerated.reading import DISABLED, MERGED, Found, Why
from fastpeft.linear import run_terms

# PEFT's class -> (the name of ours, how its adapters are read)
KNOWN: dict[str, tuple[str, Callable[[Any], Found | Why]]] = {
    "peft.tuners.lora.layer.Linear": ("FusedLoraLinear", lora.read),
    "peft.tuners.lora.bnb.Linear4bit": ("FusedLoraLinear4bit", lora.read),
    "peft.tuners.lora.bnb.Linear8bitLt": ("FusedLoraLinear8bitLt", lora.read),
    "peft.tuners.adalora.layer.SVDLinear": ("FusedAdaLoraSVDLinear", adalora.read),
    "peft.tuners.adalora.bnb.SVDLinear4bit": ("FusedAdaLoraSVDLinear4bit", adalora.read),
    "peft.tuners.adalora.bnb.SVDLinear8bitLt": ("FusedAdaLoraSVDLinear8bitLt", adalora.read),
    "peft.tuners.loha.layer.Linear": ("FusedLohaLinear", lycoris.read_loha),
    "peft.tuners.lokr.layer.Linear": ("FusedLokrLinear", lycoris.read_lokr),
    "peft.tuners.shira.layer.Linear": ("FusedShiraLinear", shira.read),
}
_MADE: dict[type, type] = {}


class Fused:
    """Mixed in before a PEFT class: the fused forward where it computes what PEFT's does, else PEFT's."""

    PEFT_CLASS: type
    READ: Callable[[Any], Found | Why]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = arguments(args, kwargs) or state(self, self.READ)
        call = ready(self, found, x) if type(found) is Found else found
        if type(call) is Why:
            if not torch.compiler.is_compiling():
                count_peft(full_name(self.PEFT_CLASS), call.reason)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            count_fused(found.family)
        if call.alone:
            with torch.autocast(x.device.type, enabled=False):
                y = run_terms(call.x, call.base, call.bias, found.terms())
        else:
            y = run_terms(call.x, call.base, call.bias, found.terms(), inner=call.inner)
        return y if y.dtype is call.out else y.to(call.out)

    def _get_name(self) -> str:
        return self.PEFT_CLASS.__name__


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Why | None:
    """Why a call with more than x runs PEFT's own forward."""
    if kwargs.get("adapter_names") is not None:
        return Why("adapter_names: a batch whose samples have adapters of their own")
    if args or kwargs:
        return Why(f"further arguments: {', '.join(['*'] * len(args) + list(kwargs))}")
    return None


def state(layer: Any, read: Callable[[Any], Found | Why]) -> Found | Why:
    """What a forward would compute now, as far as the layer alone says; read: its class's READ."""
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    return read(layer)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def fused_class(cls: type) -> type | None:
    """Our class for a layer of exactly this PEFT class; None if there is none."""
    if cls not in _MADE:
        if full_name(cls) not in KNOWN:
            return None
        name, read = KNOWN[full_name(cls)]
        own = {"__module__": __name__, "__doc__": Fused.__doc__, "PEFT_CLASS": cls, "READ": staticmethod(read)}
        _MADE[cls] = globals()[name] = type(cls)(name, (Fused, cls), own)
    return _MADE[cls]


def __getattr__(name: str) -> Any:
    for path, (ours, _) in KNOWN.items():
        if ours == name:
            module, _, leaf = path.rpartition(".")
            return fused_class(getattr(importlib.import_module(module), leaf))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
