"""What a procedure counts while it trains (Procedure.progress), over the steps: ranks in use by layer, or which matrices still train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass
class History:
    """changes: (step, {name: count}) with the names whose count is another than before, in order; the first holds all names.

    A step is the number of steps done; 0 is before training.
    """

    changes: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    _last: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.changes = [(int(step), dict(counts)) for step, counts in self.changes]
        self._last = {n: c for _, counts in self.changes for n, c in counts.items()}

    def record(self, step: int, counts: Mapping[str, int]) -> None:
        """Take down what is counted after this step; nothing is added where nothing changed."""
        new = {n: c for n, c in counts.items() if self._last.get(n) != c}
        if not new:
            return
        self._last.update(new)
        if self.changes and self.changes[-1][0] == step:
            self.changes[-1][1].update(new)
        else:
            self.changes.append((step, new))

    def states(self) -> Iterator[tuple[int, dict[str, int]]]:
        """(step, the counts of all names from that step on), at each change."""
        now: dict[str, int] = {}
        for step, counts in self.changes:
            now = now | counts
            yield step, now

    def at(self, step: int) -> dict[str, int]:
        """The counts after this many steps."""
        return {n: c for k, counts in self.changes if k <= step for n, c in counts.items()}

    def by_type(self, value: Callable[[list[int]], float]) -> dict[str, list[tuple[int, float]]]:
        """Type of module (module_type) -> (step, value of the counts of that type), at each change."""
        found: dict[str, list[tuple[int, float]]] = {}
        for step, counts in self.states():
            groups: dict[str, list[int]] = {}
            for name, count in counts.items():
                groups.setdefault(module_type(name), []).append(count)
            for name, group in groups.items():
                found.setdefault(name, []).append((step, value(group)))
        return found


def module_type(name: str) -> str:
    """What follows the last number in a name, which tells the blocks apart: "layer.0.attention.query" -> "attention.query"."""
    parts = name.split(".")
    last = max((k for k, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or name
