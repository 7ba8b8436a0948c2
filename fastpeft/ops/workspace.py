"""One reusable piece of memory per thread, device, stream and dtype, for a weight that lives for one product only."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


def workspace(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, cols]; the next call on this thread, device, stream and dtype may hand out the same memory.

    While torch.compile traces or a CUDA graph is captured it is a new tensor: memory of their own is theirs to plan.
    """
    numbers = rows * cols
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.empty(rows, cols, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, dtype)
    held: dict[Any, Tensor] = _local.__dict__.setdefault("held", {})
    memory = held.get(key)
    if memory is None or memory.numel() < numbers:
        held[key] = memory = torch.empty(numbers, dtype=dtype, device=device)
    return memory[:numbers].view(rows, cols)


def release() -> None:
    """Give this thread's workspaces back."""
    _local.__dict__.pop("held", None)
