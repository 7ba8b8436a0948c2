"""What accelerate did: how each PEFT layer computes now, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AcceleratedLayer:
    """One PEFT layer at the time of the report.

    peft_class: the class that PEFT gave it.   route: "fused" or "PEFT", what its next forward runs.   reason: why it is PEFT's, or on what condition it is fused.
    swapped: whether the layer has our class, so that its route may change with its state.
    idle: PEFT's forward has no adapter to compute: disabled, merged, or none active here.
    """

    peft_class: str
    route: str
    reason: str | None = None
    swapped: bool = True
    idle: bool = False


@dataclass
class AccelerationReport:
    """layers: name -> AcceleratedLayer, of every layer that a PEFT method adapts. Prints as counts and reasons."""

    layers: dict[str, AcceleratedLayer] = field(default_factory=dict)

    @property
    def fused(self) -> list[str]:
        """Names of the layers whose next forward is fused."""
        return [name for name, layer in self.layers.items() if layer.route == "fused"]

    @property
    def unfused(self) -> dict[str, str]:
        """Name -> reason of the layers with an adapter that PEFT computes."""
        return {n: layer.reason or "" for n, layer in self.layers.items() if layer.route == "PEFT" and not layer.idle}

    @property
    def idle(self) -> dict[str, str]:
        """Name -> reason of the layers that compute no adapter now."""
        return {n: layer.reason or "" for n, layer in self.layers.items() if layer.idle}

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.layers)} layers fused"]
        for what, found in (("PEFT's own forward", self.unfused), ("no adapter at work", self.idle)):
            counts = Counter((self.layers[n].peft_class, reason) for n, reason in found.items())
            lines += [f"  {count}: {what}: {cls}: {reason}" for (cls, reason), count in counts.most_common()]
        only = Counter(layer.reason for layer in self.layers.values() if layer.route == "fused" and layer.reason)
        lines += [f"  {count}: fused {reason}" for reason, count in only.most_common()]
        return "\n".join(lines)
