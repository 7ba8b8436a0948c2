"""Updates of many layers that come out of one composition: made once a forward, and again once a backward that asks for them.

The adapted root's hooks open and close the composition around each forward. Within it a layer reads its update, whose
gradient goes through one Function that keeps only the tensors. A checkpoint that is recomputed in backward reads values that are
composed again, without gradient, for the time of that backward. Outside both (merge, a layer called by itself) a layer
composes for itself, which costs the whole composition. Generation composes in every step: merge first.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.composed import pieces
from fastpeft.registry import Holder
from fastpeft.terms import Composed


class Composition(Holder):
    """A subclass gives `names`, `tensors()`, `update(name, *tensors)` [out, in], and `updates(*tensors)`: all, in names' order."""

    names: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.live: list[dict[str, Tensor] | None] = []
        self.again: dict[str, Tensor] | None = None
        # of layers that read in a forward whose graph is kept: whether gradients were enabled where they did
        self.seen: dict[str, bool] = {}
        self.keeps = False

    def tensors(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def update(self, name: str, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def updates(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def open(self) -> None:
        self.live.append(None)
        self.keeps = torch.is_grad_enabled()
        if self.enabled:
            tensors = self.tensors()
            with torch.autocast(tensors[0].device.type, enabled=False):
                made = pieces(self.updates, tensors)
            self.live[-1] = dict(zip(self.names, made, strict=True))

    def close(self) -> None:
        if len(self.live):
            self.live.pop()

    def read(self, name: str) -> Tensor | Composed:
        """The update of a layer, in whatever phase this is. RuntimeError in the recompute of a reentrant checkpoint."""
        self.used()
        live = self.live[-1] if len(self.live) else None
        if live is not None:
            if self.keeps and not torch.compiler.is_compiling():
                self.seen[name] = torch.is_grad_enabled()
            return live[name]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and name in self.seen:
            if torch._C._current_graph_task_id() != -1:
                return self._recomputed(name)
            del self.seen[name]
        return Composed(functools.partial(self.update, name), self.tensors())

    def _recomputed(self, name: str) -> Tensor:
        if not self.seen[name]:
            raise RuntimeError(
                f"adapt: the update of {name!r} comes out of one composition for all layers, whose gradient a reentrant "
                "checkpoint cannot take in parts; use use_reentrant=False."
            )
        if self.again is None:
            tensors = self.tensors()
            with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
                made = self.updates(*tensors)
            trains = any(t.requires_grad for t in tensors)
            self.again = {n: t.detach().requires_grad_(trains) for n, t in zip(self.names, made, strict=True)}
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._forget)  # when this backward is over
        return self.again[name]

    def _forget(self) -> None:
        self.again = None
