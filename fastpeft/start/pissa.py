"""PiSSA: the principal part of a weight as factors, and its quantised form (arXiv 2404.02948)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.start.quantise import Quantise
from fastpeft.stored import DenseWeight


def principal(W: Tensor, rank: int, niter: int | None = None, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """A [rank, in], B [out, rank] with B A the best approximation of W of that rank, each holding the roots of the singular values.

    niter: None is the exact SVD; a number is torch.svd_lowrank with q = rank (no oversampling) and so many power iterations,
    which is random: under `seed`, or from torch's generator.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    else:
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
        Vh = V.T
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def residual(W: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype, name: str) -> DenseWeight:
    """W - scale B A, in `dtype`; a warning where that rounds to 16 bits. name: of the layer."""
    if dtype.itemsize < 4:
        warnings.warn(f"pissa: fold=True rounds W - s B A at {name!r} to {dtype}; fold=False rounds nothing.", stacklevel=2)
    return DenseWeight((W - scale * (B @ A)).to(dtype))


def dense_room(base: Any) -> DenseWeight:
    """The module that `residual` makes, with nothing in it yet."""
    return DenseWeight.room(base)


def quantised(
    W: Tensor, rank: int, iterations: int, quantise: Quantise, niter: int | None = None, seed: int | None = None
) -> tuple[Tensor, Tensor, nn.Module]:
    """QPiSSA: A, B and the module of Q. (B, A) = principal(R), Q = quantised(W - B A), R = W - Q, from R = W, so many times."""
    rest = W
    for _ in range(iterations):
        A, B = principal(rest, rank, niter, seed)
        stored, Q = quantise(W - B @ A)
        rest = W - Q
    return A, B, stored
