"""The tensors inside of what a model's forward gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(output: Any) -> Iterator[Tensor]:
    """Those of a tensor, mapping (a ModelOutput is one), list, tuple or dataclass, at any depth; else its `loss`, if it has one."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for f in dataclasses.fields(output):
            yield from tensors(getattr(output, f.name))
    elif isinstance(loss := getattr(output, "loss", None), Tensor):
        yield loss
