"""One reusable piece of memory per thread, device, stream and dtype, for a weight that lives for one product only."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


def workspace(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, cols]; the next call on this thread, device, stream and dtype may hand out the same memory.

    While torch.compile traces or a CUDA graph is captured it is a new tensor: memory of their own is theirs to plan.
    """
    numbers = rows * cols
    if planned(device):
        return torch.empty(rows, cols, dtype=dtype, device=device)
    key = _key(dtype, device)
    held: dict[Any, Tensor] = _local.__dict__.setdefault("held", {})
    _owners().pop(key, None)
    memory = held.get(key)
    if memory is None or memory.numel() < numbers:
        # memory made in inference mode could not be written outside it
        with torch.inference_mode(False):
            held[key] = memory = torch.empty(numbers, dtype=dtype, device=device)
    return memory[:numbers].view(rows, cols)


def filled(
    owner: Any, rows: int, cols: int, dtype: torch.dtype, device: torch.device, fill: Callable[[Tensor], object]
) -> Tensor:
    """A workspace with what fill(out) writes there for `owner`; not written again until someone else was given the memory.

    So several products in a row with one stored weight decompress it once. owner: what the content belongs to, which must
    not change while it lives. The content is read and not written: ask for `workspace`, which gives the same memory, to do that.
    """
    if planned(device):
        out = workspace(rows, cols, dtype, device)
        fill(out)
        return out
    key = _key(dtype, device)
    known = _owners().get(key)
    if known is not None and known() is owner:
        held: Tensor = _local.held[key]
        return held[: rows * cols].view(rows, cols)
    out = workspace(rows, cols, dtype, device)
    fill(out)
    _owners()[key] = weakref.ref(owner)
    return out


def planned(device: torch.device) -> bool:
    """Whether somebody else plans memory now: torch.compile, or the capture of a CUDA graph."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def release() -> None:
    """Give this thread's workspaces back."""
    _local.__dict__.pop("held", None)
    _local.__dict__.pop("owners", None)


def _key(dtype: torch.dtype, device: torch.device) -> Any:
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, dtype


def _owners() -> dict[Any, Any]:
    owners: dict[Any, Any] = _local.__dict__.setdefault("owners", {})
    return owners
