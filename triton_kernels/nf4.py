"""Stored weights made dense in Triton, in one pass: NormalFloat codes in blocks, and int8 codes by rows.

    codes     out[k] = levels[code k] * absmax[k / block]      `absmax` in fp32, or decoded where it is used (NESTED)
    rows      out[i, j] = codes[i, j] * (absmax[i] / 127)

Products in fp32, rounded once; a nested scale is rounded after its product and after its sum, so nothing may be fused into one
(enable_fp_fusion=False). Every number is written by one program; no sums, equal bits on every run. Offsets are 64-bit.
"""

from __future__ import annotations

import importlib

import triton
import triton.language as tl
from torch import Tensor

lowrank = importlib.import_module(f"{__package__}.lowrank")


@triton.jit
def _value(code, levels, scale):
    return tl.load(levels + code) * scale


@triton.jit
def codes_kernel(
    codes, levels, absmax, table, nested, offset, out, n, length,
    BITS: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """n: numbers. length: bytes. PER: codes in a byte, the first in its highest bits. BLOCK, a multiple of PER: numbers of one scale.

    NESTED: the scale of block b is table[absmax[b]] * nested[b / GROUP] + offset. Grid: (pieces of BYTES bytes,).
    """
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < length
    byte = tl.load(codes + at, inside, 0).to(tl.int32)
    block = at * PER // BLOCK
    if NESTED:
        coarse = tl.load(nested + block // GROUP, inside, 0.0)
        scale = tl.load(table + tl.load(absmax + block, inside, 0).to(tl.int32)) * coarse + tl.load(offset)
    else:
        scale = tl.load(absmax + block, inside, 0.0)
    if PER == 1:
        value = _value(byte & (2**BITS - 1), levels, scale)
    elif PER == 2:
        value = tl.interleave(_value(byte >> 4, levels, scale), _value(byte & 15, levels, scale))
    else:
        even = tl.interleave(_value(byte >> 6, levels, scale), _value((byte >> 2) & 3, levels, scale))
        odd = tl.interleave(_value((byte >> 4) & 3, levels, scale), _value(byte & 3, levels, scale))
        value = tl.interleave(even, odd)
    k = tl.program_id(0).to(tl.int64) * BYTES * PER + tl.arange(0, BYTES * PER)
    tl.store(out + k, value.to(out.dtype.element_ty), k < n)


@triton.jit
def rows_kernel(codes, absmax, out, o, i, BO: tl.constexpr, BI: tl.constexpr):
    """codes, out [o, i] contiguous. Grid: (row tiles, column tiles)."""
    rows = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    cols = tl.program_id(1).to(tl.int64) * BI + tl.arange(0, BI)
    mask = (rows < o)[:, None] & (cols < i)[None, :]
    at = rows[:, None] * i + cols[None, :]
    scale = tl.load(absmax + rows, rows < o, 0.0) * (1.0 / 127.0)
    value = tl.load(codes + at, mask, 0).to(tl.float32) * scale[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


KERNELS = (codes_kernel, rows_kernel)
# of one program: eight numbers a thread, whose bytes are one load and which are one store of 16 bytes in a 16-bit dtype
NUMBERS = 1024
ROWS, COLUMNS = 4, 512


def dequantise(
    out: Tensor, codes: Tensor, levels: Tensor, absmax: Tensor, bits: int, per: int, block: int,
    table: Tensor | None, nested: Tensor | None, offset: Tensor | None, group: int,
) -> None:  # fmt: skip
    """out [out, in], contiguous. codes uint8 [bytes], levels fp32 [2^bits], absmax fp32 [blocks]; or uint8 with table fp32 [256],
    nested fp32 [groups] and offset, one fp32 number. block is a multiple of `per`, the codes in a byte."""
    n, double = out.numel(), table is not None
    blocks = triton.cdiv(n, block)
    lowrank._check_shapes((triton.cdiv(n, per),), codes=codes)
    lowrank._check_shapes((blocks,), absmax=absmax)
    lowrank._check_shapes((2**bits,), levels=levels)
    if double:
        lowrank._check_shapes((triton.cdiv(blocks, group),), nested=nested)
    if n:
        codes_kernel[(triton.cdiv(n, NUMBERS),)](
            codes, levels, absmax, table if double else levels, nested if double else levels, offset if double else levels, out,
            n, codes.numel(),
            BITS=bits, PER=per, BLOCK=block, GROUP=group, NESTED=double, BYTES=NUMBERS // per,
            num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def dequantise_rows(out: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """out [out, in], contiguous; codes int8 of its shape, absmax fp32 [out]."""
    o, i = out.shape
    lowrank._check_shapes((o, i), codes=codes)
    lowrank._check_shapes((o,), absmax=absmax)
    if out.numel():
        rows_kernel[(triton.cdiv(o, ROWS), triton.cdiv(i, COLUMNS))](
            codes, absmax, out, o, i, BO=ROWS, BI=COLUMNS, num_warps=4, num_stages=1
        )
