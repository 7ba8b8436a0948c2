"""Which code runs the low-rank family: torch (with C++ on the CPU) or Triton."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from fastpeft.ops import lowrank, lowrank_triton

IMPLS = ("torch", "triton")
# whether it is there; the first launch imports it
_TRITON = importlib.util.find_spec("triton") is not None


def resolve(impl: str | None, device: str, *dtypes: torch.dtype) -> Any:
    """The family's module: the one asked for by `impl`, else by FASTPEFT_IMPL, else the device's own.

    The device's own is Triton on CUDA where Triton is installed and no dtype is fp64, which its kernels do not take; torch
    everywhere else. Raises ValueError for a name that does not exist. What is asked for by name runs or raises (Triton
    missing, tensors on the CPU, fp64): the launch says why.
    """
    chosen = impl or os.environ.get("FASTPEFT_IMPL")
    if not chosen:
        if device != "cuda" or torch.float64 in dtypes or not _TRITON:
            return lowrank
        return lowrank_triton
    if chosen not in IMPLS:
        raise ValueError(f"adapted_linear: impl={chosen!r} does not exist; choose one of {', '.join(IMPLS)}.")
    return lowrank if chosen == "torch" else lowrank_triton


@contextlib.contextmanager
def implementation(impl: str) -> Iterator[None]:
    """FASTPEFT_IMPL for the time of the block, in this process."""
    before = os.environ.get("FASTPEFT_IMPL")
    os.environ["FASTPEFT_IMPL"] = impl
    try:
        yield
    finally:
        os.environ.pop("FASTPEFT_IMPL")
        if before is not None:
            os.environ["FASTPEFT_IMPL"] = before
