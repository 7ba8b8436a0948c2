"""Giving PEFT's layers their fused classes, and taking them back."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from fastpeft.accelerated.base import PACKED, adapters, base_layer
from fastpeft.accelerated.classes import Fused, full_name, fused_class, state
from fastpeft.accelerated.reading import Found, Why
from fastpeft.accelerated.report import AcceleratedLayer, AccelerationReport
from fastpeft.packed import packed_base

NEVER_CALLED = Why("nn.MultiheadAttention reads the weight of this layer and never calls it")


def accelerate(peft_model: nn.Module, strict: bool = False) -> AccelerationReport:
    """Let PEFT's linear layers compute fused, in place; everything else about them stays PEFT's.

    peft_model: a PeftModel, or any module that holds PEFT's layers, also inside DDP or FSDP. Call it again after adapters were
    added to further layers; a layer that has its fused class follows every change of adapters and states by itself.
    strict: ValueError, before anything is changed, that lists the layers whose adapters PEFT would still compute.
    Returns what each layer's next forward does and why. Calls with `adapter_names` always run PEFT's own forward.
    TypeError for what is no module, ValueError for a model without a layer of PEFT's.
    """
    if not isinstance(peft_model, nn.Module):
        raise TypeError(f"accelerate: got a {type(peft_model).__name__}; it takes a PeftModel or a module that holds PEFT's layers.")
    layers = _peft_layers(peft_model)
    if not layers:
        raise ValueError(
            f"accelerate: this {type(peft_model).__name__} holds no layer of PEFT's; make one with peft.get_peft_model or "
            "peft.inject_adapter_in_model, or let fastpeft.adapt adapt the model itself."
        )
    uncalled = {id(m.get_base_layer().out_proj) for _, m in layers if type(m).__name__ == "MultiheadAttention"}
    sharded = _sharded(peft_model)
    report, swaps = AccelerationReport(), []
    for name, module in layers:
        entry, cls = _look(module, id(module) in uncalled, id(module) in sharded)
        report.layers[name] = entry
        if cls is not None:
            swaps.append((module, cls))
    if strict and (unfused := report.unfused):
        lines = [f"  {name} ({report.layers[name].peft_class}): {reason}" for name, reason in unfused.items()]
        raise ValueError(f"accelerate: strict=True, and PEFT would compute {len(unfused)} layers:\n" + "\n".join(lines))
    for module, cls in swaps:
        module.__class__ = cls
    return report


def restore(peft_model: nn.Module) -> int:
    """Give every accelerated layer the class that PEFT gave it; returns how many there were.

    RuntimeError where another library derived a class from ours meanwhile (FSDP2 on the layer itself): nothing is changed then.
    """
    layers = [(name, m) for name, m in peft_model.named_modules() if isinstance(m, Fused)]
    for name, m in layers:
        if fused_class(m.PEFT_CLASS) is not type(m):
            raise RuntimeError(f"restore: {name!r} is a {type(m).__name__}, derived from ours by another library; undo that first.")
    for _, m in layers:
        m.__class__ = m.PEFT_CLASS
    return len(layers)


def _peft_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every tuner layer; PEFT is not imported, for whoever made one has done that."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    return [(name, m) for name, m in model.named_modules() if isinstance(m, tuners.BaseTunerLayer)]


def _sharded(model: nn.Module) -> set[int]:
    """The modules whose parameters FSDP2 gathers for each forward (and keeps as distributed tensors between)."""
    units = [m for m in model.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]
    return {id(m) for unit in units for m in unit.modules()}


def _look(module: Any, uncalled: bool, sharded: bool) -> tuple[AcceleratedLayer, type | None]:
    """How a layer stands, and the class that it gets if it has not got it."""
    cls: Any = None
    if isinstance(module, Fused):
        peft_class = module.PEFT_CLASS
    else:
        peft_class, cls = type(module), fused_class(type(module))
        if cls is None or uncalled or _replaced(module):
            why = NEVER_CALLED if uncalled else Why("its forward was replaced on the instance") if cls is not None else None
            reason = f"no fused form for {full_name(peft_class)}" if why is None else why.reason
            return AcceleratedLayer(full_name(peft_class), "PEFT", reason, swapped=False), None
    found = _stands(module, (cls or type(module)).READ, sharded)
    if type(found) is Why:
        return AcceleratedLayer(full_name(peft_class), "PEFT", found.reason, idle=found.idle), cls
    return AcceleratedLayer(full_name(peft_class), "fused", _condition(module, found, sharded)), cls


def _stands(layer: Any, read: Any, sharded: bool) -> Found | Why:
    """What the layer's next forward would compute, as far as can be said without its input."""
    found = state(layer, read)
    if type(found) is Why:
        return found
    module = layer._modules["base_layer"]
    kind = base_layer(module, weight=not sharded)
    if type(kind) is Why:
        return kind
    if sharded:
        return found
    if kind in PACKED:
        try:
            packed_base(module)
        except (ValueError, TypeError) as error:
            return Why(str(error))
    return adapters(found, module.weight.device) or found


def _condition(layer: Any, found: Found, sharded: bool) -> str | None:
    """What the layer alone does not say: whether autocast will be on."""
    weight = layer._modules["base_layer"].weight
    if sharded or not found.second or not weight.is_floating_point():
        return None
    wide = [t.dtype for t in found.tensors if torch.promote_types(t.dtype, weight.dtype) is not weight.dtype]
    return f"under autocast only: DoRA with dropout, {wide[0]} adapters on a {weight.dtype} base" if wide else None


def _replaced(module: Any) -> bool:
    """Whether calls of the layer do not reach its class's forward."""
    return "forward" in module.__dict__
