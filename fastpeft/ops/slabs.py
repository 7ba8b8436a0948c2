"""Row slabs for the torch path, and backward passes that autocast leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# 1 MiB: a slab and its product stay in a core's L2 cache, and the temporary is small beside any [tokens, in] tensor
SLAB_BYTES = 1 << 20


def slabs(rows: int, width: int, itemsize: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` numbers, about SLAB_BYTES each; one slice while torch.compile traces.

    (Inductor fuses what the slabs are for, and a loop over a symbolic number of rows would recompile per length.)
    """
    return row_blocks(rows, max(1, SLAB_BYTES // max(1, width * itemsize)))


def slabs_of(t: torch.Tensor, itemsize: int) -> Iterator[slice]:
    """slabs of t's rows at `itemsize` bytes a number on the CPU; one slice elsewhere, where each would be a launch."""
    return slabs(t.shape[0], t.shape[1], itemsize) if t.device.type == "cpu" else row_blocks(t.shape[0], max(1, t.shape[0]))


def row_blocks(rows: int, step: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, `step` at a time; one slice while torch.compile traces."""
    if torch.compiler.is_compiling():
        yield slice(0, rows)
        return
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def fewer(numbers: int, limit: int) -> bool:
    """numbers < limit; False while torch.compile traces: asking would make a graph for either side."""
    return not torch.compiler.is_compiling() and numbers < limit


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward that refuses to be differentiated, and that autocast leaves alone.

    A backward inside `with torch.autocast` would cast fp32 factors. Gradients are disabled in a backward that nobody
    differentiates; once_differentiable's own guards are entered only where they are not.
    """
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        checked = guarded if torch.is_grad_enabled() else backward
        device = grads[0].device.type if grads[0] is not None else _first_device(grads)
        if not torch.is_autocast_enabled(device):
            return checked(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return checked(ctx, *grads)

    return run


def _first_device(grads: tuple[torch.Tensor | None, ...]) -> str:
    return next((g.device.type for g in grads if g is not None), "cpu")
