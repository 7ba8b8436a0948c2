"""A sparse update that stays in W from forward to forward: an explicit option, for which W is not what it was in between."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Overlay:
    """W's own entries at one support, as they were, while W holds them plus the values.

    alive: what a forward left for its backward, until that ran or its graph is gone; while there is some, nobody may put the
    weight back (a reference forward in between would use, or save, the other one).
    """

    def __init__(self) -> None:
        self.origin: Tensor | None = None
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def put(self, W: Tensor, values: Tensor, index: Tensor) -> None:
        """W[entry] = original entry + value, rounded once to W's dtype; past W's version counter."""
        at, W = tuple(index.long()), W.data
        if self.origin is None:
            self.origin = W[at]
        elif self.origin.device != W.device or self.origin.dtype is not W.dtype:
            self.origin = self.origin.to(W)  # the layer was moved with the entries in it
        W[at] = (self.origin + values).to(W.dtype)

    def release(self, W: Tensor, index: Tensor) -> None:
        """The original entries, bit for bit. Where W lies in shards (FSDP2, ZeRO-3) these never had others: the whole W that did is gone."""
        if self.origin is not None and W.numel() and not hasattr(W, "full_tensor"):
            W.data[tuple(index.long())] = self.origin.to(W)
        self.origin = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Overlay:
        twin = Overlay()
        twin.origin = None if self.origin is None else self.origin.clone()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"origin": self.origin}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.origin = state["origin"]
