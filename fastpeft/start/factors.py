"""Starts of A [rank, in] and B [out, rank] that need no weight. Each is an identity: B A = 0, for orthogonal up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def kaiming(A: Tensor, B: Tensor) -> None:
    """A uniform on +-1/sqrt(in), B zero: the authors' LoRA."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)


def gaussian(A: Tensor, B: Tensor) -> None:
    """A normal with standard deviation 1/rank, B zero (PEFT's "gaussian")."""
    nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)


def orthogonal(A: Tensor, B: Tensor) -> None:
    """A in the span of the even rows of one random orthogonal [rank, rank] matrix, B in that of the odd ones; neither is zero.

    PEFT's "orthogonal", drawn on the CPU in its order: A = Q_even^T X / 10, B = Y Q_odd / 10, so B A = Y (Q_odd Q_even^T) X / 100.
    """
    rank = A.shape[0]
    if rank % 2:
        raise ValueError(f"start='orthogonal' needs an even rank, half for A and half for B; got rank={rank}.")
    wide = torch.promote_types(A.dtype, torch.float32)
    Q, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=wide))
    X = torch.randn(A.shape[1], rank // 2, dtype=wide)
    Y = torch.randn(rank // 2, B.shape[0], dtype=wide)
    with torch.no_grad():
        A.copy_((X @ Q[0::2]).T / 10)
        B.copy_(Y.T @ Q[1::2] / 10)


STARTS = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}


def fill(who: str, start: str, A: Tensor, B: Tensor) -> None:
    """Write the start of that name into A and B; ValueError says which exist."""
    if start not in STARTS:
        raise ValueError(f"{who}: start={start!r}; it must be one of {', '.join(STARTS)}. (pissa and loftq are methods of their own.)")
    STARTS[start](A, B)
