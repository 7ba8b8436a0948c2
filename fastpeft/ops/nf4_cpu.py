"""Stored weights made dense in C++ (csrc/quant/quant.h); fastpeft.ops.nf4 and .int8 decide when it runs and hold the reference.

Same bits as the reference, from any number of threads. Everything is checked here: the compiled loops trust what they get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpeft.ops.dropout import _EXTENSION, backend
from fastpeft.ops.lowrank_cpu import DTYPES

if TYPE_CHECKING:
    from fastpeft.ops.nf4 import Packed

_BUILT = hasattr(_EXTENSION, "dequantise")


def runs(out: Tensor) -> bool:
    """Whether the C++ code writes `out`: on the CPU, in fp32 or 16 bits."""
    return _BUILT and out.device.type == "cpu" and out.dtype in DTYPES and backend() != "torch"


def fill(out: Tensor, packed: Packed, levels: Tensor) -> None:
    """out [out, in], contiguous = the weight that `packed` stores. ValueError where sizes or dtypes do not fit."""
    codes, absmax, bits, block, _, nested = packed
    numbers, fp32 = out.numel(), torch.float32
    blocks, count = -(-numbers // block), {2: 4, 4: 2}.get(bits, 1)
    _check("codes", codes, torch.uint8, -(-numbers // count))
    _check("absmax", absmax, fp32 if nested is None else torch.uint8, blocks)
    _check("levels", levels, fp32, 2**bits)
    inner = (0, 0, 0.0, 1)
    if nested is not None:
        _check("nested.table", nested.table, fp32, 256)
        _check("nested.absmax", nested.absmax, fp32, -(-blocks // nested.group))
        inner = (nested.table.data_ptr(), nested.absmax.data_ptr(), float(nested.offset), nested.group)
    _check_out(out)
    if block % 32:
        raise ValueError(f"nf4_cpu.fill: blocks of {block}; they must be a multiple of 32.")
    _EXTENSION.dequantise(
        codes.data_ptr(), bits, levels.data_ptr(), absmax.data_ptr(), block, *inner, out.data_ptr(), DTYPES[out.dtype],
        numbers, torch.get_num_threads(),
    )  # fmt: skip


def fill_rows(out: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """out [out, in], contiguous = codes [out, in] times absmax [out] / 127. ValueError where sizes or dtypes do not fit."""
    _check("codes", codes, torch.int8, out.numel())
    _check("absmax", absmax, torch.float32, out.shape[0])
    _check_out(out)
    _EXTENSION.dequantise_rows(
        codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), DTYPES[out.dtype], *out.shape, torch.get_num_threads()
    )


def _check(name: str, t: Tensor, dtype: torch.dtype, numbers: int) -> None:
    if t.dtype is not dtype or t.numel() != numbers or not t.is_contiguous() or t.device.type != "cpu":
        raise ValueError(
            f"nf4_cpu: {name} is {tuple(t.shape)} in {t.dtype} with strides {t.stride()} on {t.device}; needed are {numbers} "
            f"numbers in {dtype}, contiguous, on the CPU."
        )


def _check_out(out: Tensor) -> None:
    if out.dim() != 2 or not out.is_contiguous():
        raise ValueError(f"nf4_cpu: out is {tuple(out.shape)} with strides {out.stride()}; it must be a contiguous matrix.")
