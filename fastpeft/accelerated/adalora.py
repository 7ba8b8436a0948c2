"""PEFT's adalora.SVDLinear, SVDLinear4bit and SVDLinear8bitLt: B diag(E) A, scaled by scaling / (ranknum + 1e-5)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpeft.accelerated.lora import INDEPENDENT
from fastpeft.accelerated.reading import NONE_ACTIVE, Found, Why, active, dropout
from fastpeft.terms import LowRank, Term


def read(layer: Any) -> Found | Why:
    """The active adapters of an AdaLoRA layer."""
    names = active(layer, layer.lora_A)
    if not names:
        return NONE_ACTIVE
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, float, float]] = []
    tensors: list[Tensor] = []
    for name in names:
        p = dropout(layer.lora_dropout[name])
        if type(p) is Why:
            return p
        A, B, E, rank = layer.lora_A[name], layer.lora_B[name], layer.lora_E[name], layer.ranknum[name]
        if A.numel() == 0:
            return Why("the adapter has no rank left")
        tensors += (A, B, E, rank)
        parts.append((A, B, E, rank, layer.scaling[name], p))
    if len(parts) > 1 and any([part[5] for part in parts]):
        return INDEPENDENT

    def terms() -> list[Term]:
        # ranknum is a parameter: reading its value would wait for the device, and an optimiser may move it
        return [LowRank(A * (E * (s / (rank + 1e-5))), B, dropout=p) for A, B, E, rank, s, p in parts]

    return Found("adalora", tuple(tensors), terms)
