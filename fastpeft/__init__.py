"""fastpeft: adapter fine-tuning that costs what a frozen model costs.

    report = fastpeft.adapt(model, "lora", rank=8, alpha=16)     # nn.Linear layers become fused adapter modules, in place
    ...train as usual...
    fastpeft.save_adapter(model, "out")                          # loads in PEFT
"""

from __future__ import annotations

import importlib
from typing import Any

from fastpeft.adapter import AdaptedLinear
from fastpeft.catalogue import methods
from fastpeft.checkpoint import load_adapter, save_adapter
from fastpeft.export import export_expert, export_lora
from fastpeft.folder import CheckpointError
from fastpeft.leave import adapters_off, merge, unload
from fastpeft.linear import adapted_linear
from fastpeft.ops.dropout import dropout_mask
from fastpeft.report import Report
from fastpeft.swap import adapt
from fastpeft.verification import verify

__version__ = "0.1.0"

__all__ = [
    "AdaptedLinear",
    "CheckpointError",
    "Report",
    "__version__",
    "accelerate",
    "adapt",
    "adapted_linear",
    "adapters_off",
    "domains",
    "dropout_mask",
    "export_expert",
    "export_lora",
    "fused_calls",
    "laplace",
    "load_adapter",
    "merge",
    "methods",
    "peft_calls",
    "reset_calls",
    "restore",
    "save_adapter",
    "train",
    "unload",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("train", "laplace", "domains"):  # imported when asked for
        return importlib.import_module(f"fastpeft.{name}")
    if name in ("accelerate", "restore", "fused_calls", "peft_calls", "reset_calls"):
        return getattr(importlib.import_module("fastpeft.accelerated"), name)
    raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
