"""Fused compute under an existing PEFT model: `accelerate`, `restore`, and counters of what ran.

    model = peft.get_peft_model(model, peft.LoraConfig(...))
    print(fastpeft.accelerate(model))          # linear layers of PEFT change class in place; nothing else of them changes

A layer's new class derives from its own PEFT class and has another `forward`; parameters, keys, adapters, merging and saving are
PEFT's. Each forward reads the layer as it is at that moment, and runs PEFT's own forward wherever the fused one would compute
something else. PEFT is imported by whoever made the model, never here.
"""

from __future__ import annotations

from fastpeft.accelerated.calls import fused_calls, peft_calls, reset_calls
from fastpeft.accelerated.report import AcceleratedLayer, AccelerationReport
from fastpeft.accelerated.swap import accelerate, restore

__all__ = ["AcceleratedLayer", "AccelerationReport", "accelerate", "fused_calls", "peft_calls", "reset_calls", "restore"]
