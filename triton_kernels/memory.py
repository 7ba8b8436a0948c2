"""Where launchers get memory. Tests replace `empty` by one that fills with NaN: a kernel that skips an element shows."""

from __future__ import annotations

import torch
from torch import Tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory of unknown content, for outputs and partial sums alike."""
    return torch.empty(shape, dtype=dtype, device=device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The result of a sum over no tokens."""
    return torch.zeros(shape, dtype=dtype, device=device)
