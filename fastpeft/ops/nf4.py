"""NormalFloat: a weight as small codes of levels, with one scale for each block of numbers (arXiv 2305.14314, appendix E).

    W[k] = levels[code[k]] * absmax[k // block]       k: row-major over [out, in]; formed in fp32, rounded to W's dtype once

levels [2^bits]: quantiles of the normal distribution scaled to [-1, 1], 2^(bits-1) positive ones, zero, one negative fewer;
of 4 bits bitsandbytes' table to the bit. A code is the nearest level of w / absmax, of two at equal distance the lower.
Codes lie in bytes, the first of a byte in its highest bits: two of 4 bits, four of 2, one of any other width.
absmax [blocks] is fp32, or with `nested` itself codes of 8 bits (bitsandbytes' double quantisation):

    absmax[b] = table[code[b]] * nested.absmax[b // group] + offset       two roundings, in this order

This file is the reference in PyTorch and what is registered in torch.library; C++ and Triton are its namesakes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import lowrank
from fastpeft.ops import nf4_cpu as cpu
from fastpeft.ops.family import resolve
from fastpeft.ops.library import register

# the outermost quantile of bitsandbytes' table
OFFSET = 0.9677083
BITS = range(2, 9)
# a vector of the C++ code lies within one block
MULTIPLE = 32
# numbers that are quantised or dequantised at a time: int32 codes and fp32 levels of so many are held beside the result
PIECE = 1 << 20


class Nested(NamedTuple):
    """Scales of a uint8 absmax: table [256], absmax [groups] and offset (one number) in fp32."""

    table: Tensor
    absmax: Tensor
    offset: Tensor
    group: int = 256


class Packed(NamedTuple):
    """A stored weight: codes uint8 [bytes], absmax [blocks]. levels: another table of 2^bits numbers (bitsandbytes' FP4)."""

    codes: Tensor
    absmax: Tensor
    bits: int = 4
    block: int = 64
    levels: Tensor | None = None
    nested: Nested | None = None


def per_byte(bits: int) -> int:
    return {2: 4, 4: 2}.get(bits, 1)


@functools.cache
def levels(bits: int = 4, device: torch.device | str = "cpu") -> Tensor:
    """The table [2^bits], fp32, ascending. ValueError for a width outside 2 .. 8."""
    if bits not in BITS:
        raise ValueError(f"nf4: bits={bits}; a table exists for {BITS.start} to {BITS.stop - 1} bits.")
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(OFFSET, 0.5, count, device="cpu")[:-1].double())

    with torch.inference_mode(False):
        both = torch.cat([quantiles(half + 1), torch.zeros(1, dtype=torch.float64, device="cpu"), -quantiles(half)])
        table = both.to(torch.float32).sort().values
        return (table / table.max()).to(device)


@torch.no_grad()
def quantise(W: Tensor, bits: int = 4, block: int = 64) -> tuple[Tensor, Tensor]:
    """W [out, in] of any float dtype and strides -> codes uint8 [bytes], absmax fp32 [blocks].

    bitsandbytes' rule, to the bit for 4 bits; a block of zeros has absmax 0. Raises as `check`, and ValueError if W is not finite.
    """
    check(W, bits, block)
    table = levels(bits, W.device)
    middle = (table[:-1] + table[1:]) / 2
    blocks = W.reshape(-1, block)
    absmax = torch.empty(blocks.shape[0], dtype=torch.float32, device=W.device)
    codes = torch.empty(W.numel() // per_byte(bits), dtype=torch.uint8, device=W.device)
    step = max(1, PIECE // block)
    for at in range(0, blocks.shape[0], step):
        piece = blocks[at : at + step].float()
        largest = piece.abs().amax(1)
        absmax[at : at + step] = largest
        scaled = (piece * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()
        packed = _pack(torch.bucketize(scaled, middle, out_int32=True), bits)
        codes[at * block // per_byte(bits) :][: packed.numel()] = packed
    if not bool(absmax.isfinite().all()):
        raise ValueError("nf4.quantise: the weight has NaN or infinite entries, for which there are no levels.")
    return codes, absmax


def check(W: Tensor, bits: int, block: int) -> None:
    """Raise ValueError / TypeError where W [out, in] cannot be quantised so, whatever it holds."""
    if not W.is_floating_point() or W.dim() != 2:
        raise TypeError(f"nf4.quantise: W is {W.dtype} {tuple(W.shape)}; it must be a float matrix, and not quantised already.")
    if bits not in BITS:
        raise ValueError(f"nf4.quantise: bits={bits}; a table exists for {BITS.start} to {BITS.stop - 1} bits.")
    if block < MULTIPLE or block % MULTIPLE or W.numel() % block:
        raise ValueError(
            f"nf4.quantise: blocks of {block} for a weight of {tuple(W.shape)} = {W.numel()} numbers; the block must be a "
            f"multiple of {MULTIPLE} that divides them."
        )


def _pack(codes: Tensor, bits: int) -> Tensor:
    """int32 [numbers] -> uint8 [bytes]."""
    n = per_byte(bits)
    byte = codes[::n].clone()
    for k in range(1, n):
        byte = byte << bits | codes[k::n]
    return byte.to(torch.uint8)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [bytes] -> uint8 [numbers]."""
    n = per_byte(bits)
    if n == 1:
        return codes
    return torch.stack([codes >> (8 - bits * (k + 1)) & (2**bits - 1) for k in range(n)], 1).flatten()


def scales(packed: Packed) -> Tensor:
    """The scale of each block, fp32 [blocks]."""
    nested = packed.nested
    if nested is None:
        return packed.absmax
    group = torch.arange(packed.absmax.numel(), device=packed.absmax.device) // nested.group
    return nested.table[packed.absmax.int()] * nested.absmax[group] + nested.offset


def fill(out: Tensor, packed: Packed) -> None:
    """out [out, in], contiguous, of any float dtype = the weight. C++ on the CPU, Triton on CUDA, as family.resolve says."""
    if resolve(None, out.device.type, out.dtype) is not lowrank:
        from fastpeft.ops import nf4_triton

        nf4_triton.fill(out, packed)
    elif cpu.runs(out):
        cpu.fill(out, packed, levels(packed.bits) if packed.levels is None else packed.levels)
    else:
        fill_torch(out, packed)


def fill_torch(out: Tensor, packed: Packed) -> None:
    """The reference; on any device."""
    table = levels(packed.bits, out.device) if packed.levels is None else packed.levels
    n, block, flat, scale = per_byte(packed.bits), packed.block, out.view(-1), scales(packed)
    step = max(1, PIECE // block) * block
    for at in range(0, flat.numel(), step):
        into = flat[at : at + step]
        codes = unpack(packed.codes[at // n : -(-(at + into.numel()) // n)], packed.bits)[: into.numel()]
        # a last block may be shorter (bitsandbytes has such)
        by_number = scale[at // block :][: -(-into.numel() // block)].repeat_interleave(block)[: into.numel()]
        into.copy_(table[codes.int()] * by_number)


def dequantise(packed: Packed, rows: int, cols: int, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """A fresh weight [rows, cols] in `dtype`, from an operator without an autograd formula.

    after: a tensor that nobody reads. Where torch.compile traces a backward, a weight that depends on a gradient is made there;
    else it would be the forward's, and kept.
    """
    codes, absmax, bits, block, table, nested = packed
    inner = (None, None, None, 1) if nested is None else nested
    return _DEQUANTISE(codes, absmax, table, *inner, bits, block, rows, cols, dtype, after)


def _run(
    codes: Tensor, absmax: Tensor, table: Tensor | None, nested_table: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, group: int, bits: int, block: int, rows: int, cols: int, dtype: torch.dtype, after: Tensor | None,
) -> Tensor:  # fmt: skip
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    nested: Any = None if nested_table is None else Nested(nested_table, nested_absmax, offset, group)
    fill(out, Packed(codes, absmax, bits, block, table, nested))
    return out


def _fake(codes, absmax, table, nested_table, nested_absmax, offset, group, bits, block, rows, cols, dtype, after) -> Tensor:
    return codes.new_empty((rows, cols), dtype=dtype)


_SCHEMA = (
    "nf4_dequantise(Tensor codes, Tensor absmax, Tensor? levels, Tensor? nested_table, Tensor? nested_absmax, Tensor? offset, "
    "int group, int bits, int block, SymInt rows, SymInt cols, ScalarType dtype, Tensor? after) -> Tensor"
)
register([(_SCHEMA, _run, _fake)], "CPU", "CUDA")

_DEQUANTISE = torch.ops.fastpeft.nf4_dequantise.default
