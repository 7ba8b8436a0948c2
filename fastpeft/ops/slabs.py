"""Row slabs for the torch path, and backward passes that autocast leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

# 1 MiB: a slab and its product stay in a core's L2 cache, and the temporary is small beside any [tokens, in] tensor
SLAB_BYTES = 1 << 20


def slabs(rows: int, width: int, itemsize: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` numbers, about SLAB_BYTES each; one slice while torch.compile traces.

    (Inductor fuses what the slabs are for, and a loop over a symbolic number of rows would recompile per length.)
    """
    return row_blocks(rows, max(1, SLAB_BYTES // max(1, width * itemsize)))


def row_blocks(rows: int, step: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, `step` at a time; one slice while torch.compile traces."""
    if torch.compiler.is_compiling():
        yield slice(0, rows)
        return
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def quiet_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a Function's backward with autocast off: a backward inside `with torch.autocast` would cast fp32 factors."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run
