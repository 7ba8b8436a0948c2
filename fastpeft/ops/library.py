"""Operators of torch.library under fastpeft::, with fakes and without an autograd formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# what it defines lasts as long as this object
_LIBRARY = torch.library.Library("fastpeft", "FRAGMENT")
Operator = tuple[str, Callable[..., Any], Callable[..., Any]]


def register(operators: Iterable[Operator], *devices: str) -> None:
    """Define each (schema, function, fake), the function for every device: "CPU", "CUDA"."""
    for schema, function, fake in operators:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        for device in devices:
            _LIBRARY.impl(name, function, device)
        torch.library.register_fake(f"fastpeft::{name}", fake, lib=_LIBRARY)
