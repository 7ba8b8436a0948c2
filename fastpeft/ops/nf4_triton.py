"""Stored weights made dense in Triton; fastpeft.ops.nf4 and .int8 decide when it runs, register it, and hold the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.launch import check, kernels
from fastpeft.ops.nf4 import Packed, levels, per_byte


def fill(out: Tensor, packed: Packed) -> None:
    """out [out, in], contiguous = the weight that `packed` stores."""
    codes, absmax, bits, block, table, nested = packed
    table = levels(bits, out.device) if table is None else table
    per = per_byte(bits)
    _need(codes, torch.uint8)
    _need(absmax, torch.float32 if nested is None else torch.uint8)
    with check("nf4.fill", out=out):
        _same_device(out, codes, absmax, table, *(() if nested is None else nested[:3]))
        inner = (None, None, None, 1) if nested is None else nested
        kernels("nf4").dequantise(out, codes, table, absmax, bits, per, block, *inner)


def fill_rows(out: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """out [out, in], contiguous = codes times absmax / 127 of each row."""
    _need(codes, torch.int8)
    _need(absmax, torch.float32)
    with check("int8.fill", out=out):
        _same_device(out, codes, absmax)
        kernels("nf4").dequantise_rows(out, codes, absmax)


def _need(t: Tensor, dtype: torch.dtype) -> None:
    if t.dtype is not dtype or not t.is_contiguous():
        raise ValueError(f"nf4_triton: got {t.dtype} with strides {t.stride()}; needed is {dtype}, contiguous.")


def _same_device(out: Tensor, *tensors: Tensor) -> None:
    for t in tensors:
        if t.device != out.device:
            raise RuntimeError(f"nf4_triton: out is on {out.device} but what is stored is on {t.device}; move one of them.")
