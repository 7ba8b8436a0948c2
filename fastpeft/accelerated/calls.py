"""How many forwards of accelerated layers were fused, and how many ran PEFT's own forward and why. Compiled code is not counted."""

from __future__ import annotations

_FUSED: dict[str, int] = {}
_PEFT: dict[tuple[str, str], int] = {}


def fused_calls() -> dict[str, int]:
    """Fused forwards in this process since the last `reset_calls`, by family: lora, dora, adalora, loha, lokr, shira."""
    return dict(_FUSED)


def peft_calls() -> dict[tuple[str, str], int]:
    """Forwards of accelerated layers that PEFT computed, by (the layer's PEFT class, reason)."""
    return dict(_PEFT)


def reset_calls() -> None:
    """Both counters to zero."""
    _FUSED.clear()
    _PEFT.clear()


def count_fused(family: str) -> None:
    _FUSED[family] = _FUSED.get(family, 0) + 1


def count_peft(name: str, reason: str) -> None:
    _PEFT[name, reason] = _PEFT.get((name, reason), 0) + 1
