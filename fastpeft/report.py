"""What adapt did: a route or a reason per layer, and parameter counts. Prints as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Route:
    """One layer or FFN: the methods that now run there, or the reason why none does."""

    methods: tuple[str, ...]
    shape: str
    trainable: int
    reason: str | None = None


@dataclass
class Report:
    """layers: name -> Route of every layer or FFN that was adapted, or that looks like a target but was left alone.

    shared: name of the module that holds what several layers share -> (how many share it, how many numbers train); a layer's own
    route does not count them.
    trainable, total: parameter counts of the model, adapters included.   saved_modules: modules_to_save that were found.
    procedures: names of procedures to attach with fastpeft.train.attach (empty for methods that need none).
    notes: what else the user should know, one sentence each.
    """

    layers: dict[str, Route] = field(default_factory=dict)
    saved_modules: list[str] = field(default_factory=list)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    procedures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trainable: int = 0
    total: int = 0

    @property
    def adapted(self) -> list[str]:
        """Names of the adapted layers."""
        return [name for name, route in self.layers.items() if route.reason is None]

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> reason of the layers left alone."""
        return {name: route.reason for name, route in self.layers.items() if route.reason is not None}

    def count(self, model: nn.Module) -> Report:
        """Fill in the parameter counts from the model; returns self."""
        parameters = list(model.parameters())
        self.trainable = sum(p.numel() for p in parameters if p.requires_grad)
        self.total = sum(p.numel() for p in parameters)
        return self

    def __str__(self) -> str:
        rows = [("layer", "shape", "methods", "trainable")]
        for name, route in self.layers.items():
            what = "+".join(route.methods) if route.reason is None else f"left alone: {route.reason}"
            rows.append((name, route.shape, what, f"{route.trainable:,d}"))
        for name, (users, count) in self.shared.items():
            rows.append((name, "", f"shared by {users} layer{'s' if users > 1 else ''}", f"{count:,d}"))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.saved_modules:
            lines.append(f"trained and saved beside the adapters: {', '.join(self.saved_modules)}")
        if self.procedures:
            lines.append(f"procedures to attach: {', '.join(self.procedures)}")
        lines += [f"note: {note}" for note in self.notes]
        share = 100 * self.trainable / max(1, self.total)
        lines.append(f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {share:.4f}")
        return "\n".join(lines)
