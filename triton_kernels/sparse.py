"""Sparse adapters in Triton: the gradient of listed entries, and W with values added at them.

    sddmm           G = (dz^T x)[index]   few entries: the dot products asked for, over copies of dz^T and x^T
    masked          G = (dz^T x)[index]   many entries: the whole product by tiles, of which only listed entries are stored
    scatter         out = W + values      at the entries, in fp32, rounded to out's dtype; also keeps what W held
    restore         W = saved             at the entries

index [2, nnz] int32: rows, then columns, in row-major order without repetition. The kernels trust it. values and G [nnz].

Every entry is written by one program; sums over tokens that are split over programs go to an fp32 buffer and are added in a
fixed order: no atomics, equal bits on every run. Offsets are 64-bit. Products are in DOT, sums in fp32.
"""

from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

lowrank = importlib.import_module(f"{__package__}.lowrank")
memory = lowrank.memory
tiles = lowrank.tiles


@triton.jit(do_not_specialize=["nnz", "per_part"])
def sddmm_kernel(dz, x, index, out, nnz, length, per_part, BLOCK: tl.constexpr, BT: tl.constexpr):
    """out[split] [nnz] = sum over the tokens of this split of dz[row] * x[column]; dz [o, length], x [i, length].

    length is a multiple of BT and what follows the tokens is zero, so no load has a mask. Grid: (blocks of entries, splits).
    """
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < nnz
    # past the end row 0 is read and nothing is stored
    left = dz + tl.load(index + k, inside, 0).to(tl.int64)[:, None] * length
    right = x + tl.load(index + nnz + k, inside, 0).to(tl.int64)[:, None] * length
    first = tl.program_id(1) * per_part * BT
    acc = tl.zeros([BLOCK, BT], tl.float32)
    for start in range(first, min(first + per_part * BT, length), BT):
        at = (start + tl.arange(0, BT)).to(tl.int64)[None, :]
        acc += tl.load(left + at).to(tl.float32) * tl.load(right + at).to(tl.float32)
    tl.store(out + tl.program_id(1).to(tl.int64) * nnz + k, tl.sum(acc, 1), inside)


@triton.jit(do_not_specialize=["t", "nnz", "per_part"])
def masked_kernel(
    dz, x, index, begin, out,
    t, o, i, nnz, per_part,
    sdz_t, sdz_o, sx_t, sx_i,
    BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, TAKE: tl.constexpr, BAND: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """out[split] [nnz] = the listed entries of dz^T x over the tokens of this split; a tile without entries does nothing.

    begin [o * column tiles + 1]: where the entries of a row in a column tile begin in `index`; they end where the next begin.
    TAKE: how many entries of a row are taken at once. Grid: (row tiles * column tiles, splits).
    """
    col_tiles = tl.cdiv(i, BI)
    # BAND row tiles beside each other: programs that run at the same time read the same columns of dz and x
    pid = tl.program_id(0)
    band = pid // (BAND * col_tiles)
    height = min(tl.cdiv(o, BO) - band * BAND, BAND)
    within = pid % (BAND * col_tiles)
    tile = within // height
    rows = ((band * BAND + within % height) * BO + tl.arange(0, BO)).to(tl.int64)
    cols = (tile * BI + tl.arange(0, BI)).to(tl.int64)

    low = tl.load(begin + rows * col_tiles + tile, rows < o, 0).to(tl.int64)
    high = tl.load(begin + rows * col_tiles + tile + 1, rows < o, 0).to(tl.int64)
    most = tl.max(high - low, 0)
    if most == 0:
        return
    split = tl.program_id(1)
    acc = tl.zeros([BO, BI], tl.float32)
    for start in range(split * per_part * BT, min((split + 1) * per_part * BT, t), BT):
        tokens = (start + tl.arange(0, BT)).to(tl.int64)
        # read as dz^T: a tl.trans between a load and its product keeps the load from being pipelined on sm_80
        a = tl.load(
            dz + rows[:, None] * sdz_o + tokens[None, :] * sdz_t,
            (rows < o)[:, None] & (tokens < t)[None, :],
            0.0,
        ).to(DOT)
        b = tl.load(
            x + tokens[:, None] * sx_t + cols[None, :] * sx_i,
            (tokens < t)[:, None] & (cols < i)[None, :],
            0.0,
        ).to(DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    out += split.to(tl.int64) * nnz
    for step in range(0, most, TAKE):
        k = low[:, None] + step + tl.arange(0, TAKE)[None, :]
        listed = k < high[:, None]
        local = tl.load(index + nnz + k, listed, tile * BI) - tile * BI
        tl.store(out + k, tl.gather(acc, local, 1), listed)


@triton.jit(do_not_specialize=["nnz"])
def scatter_kernel(
    w, values, index, out, saved,
    nnz, sw_o, sw_i, so_o, so_i,
    BLOCK: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """out = w + values at the entries, w being out itself or another; with SAVE saved [nnz] = what w held."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < nnz
    rows = tl.load(index + k, inside, 0).to(tl.int64)
    cols = tl.load(index + nnz + k, inside, 0).to(tl.int64)
    held = tl.load(w + rows * sw_o + cols * sw_i, inside, 0.0)
    if SAVE:
        tl.store(saved + k, held, inside)
    total = held.to(tl.float32) + tl.load(values + k, inside, 0.0).to(tl.float32)
    tl.store(out + rows * so_o + cols * so_i, total.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["nnz"])
def restore_kernel(w, saved, index, nnz, sw_o, sw_i, BLOCK: tl.constexpr):
    """w = saved [nnz] at the entries; equal dtypes, so bits are moved and not converted."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < nnz
    rows = tl.load(index + k, inside, 0).to(tl.int64)
    cols = tl.load(index + nnz + k, inside, 0).to(tl.int64)
    tl.store(w + rows * sw_o + cols * sw_i, tl.load(saved + k, inside, 0.0), inside)


KERNELS = (sddmm_kernel, masked_kernel, scatter_kernel, restore_kernel)
TAKE = 4
BAND = 8
ENTRIES = 512


def sddmm(dz: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """(dz^T x)[index] [nnz] in fp32; dz [t, o], x [t, i] of any strides. Holds a copy of both in their dtypes."""
    t, nnz = x.shape[0], index.shape[1]
    lowrank._check_shapes((t, dz.shape[1]), dz=dz)
    if t == 0 or nnz == 0:
        return memory.zeros((nnz,), torch.float32, x.device)
    tile = tiles.sddmm(max(dz.itemsize, x.itemsize), lowrank.architecture(x.device))
    blocks, steps = triton.cdiv(nnz, tile.rows), triton.cdiv(t, tile.cols)
    count, per_part = tiles.splits(steps, blocks, lowrank.processors(x.device))
    length = steps * tile.cols
    out, parts = lowrank._buffers((nnz,), torch.float32, x.device, count)
    sddmm_kernel[(blocks, count)](
        _by_column(dz, length), _by_column(x, length), index, parts, nnz, length, per_part,
        BLOCK=tile.rows, BT=tile.cols, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(parts, out, count)
    return out


def masked(dz: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """(dz^T x)[index] [nnz] in fp32; dz [t, o], x [t, i] of any strides. The product is in the wider of their dtypes."""
    (t, i), o, nnz = x.shape, dz.shape[1], index.shape[1]
    lowrank._check_shapes((t, o), dz=dz)
    if t == 0 or nnz == 0:
        return memory.zeros((nnz,), torch.float32, x.device)
    dot = torch.promote_types(dz.dtype, x.dtype)
    tile = tiles.masked(dot.itemsize, lowrank.architecture(x.device))
    programs = triton.cdiv(o, tile.cols) * triton.cdiv(i, tile.rank)
    count, per_part = tiles.splits(triton.cdiv(t, tile.rows), programs, lowrank.processors(x.device))
    out, parts = lowrank._buffers((nnz,), torch.float32, x.device, count)
    masked_kernel[(programs, count)](
        dz, x, index, begins(index, o, i, tile.rank), parts,
        t, o, i, nnz, per_part,
        *dz.stride(), *x.stride(),
        BT=tile.rows, BO=tile.cols, BI=tile.rank, TAKE=TAKE, BAND=BAND, DOT=lowrank._TL[dot],
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(parts, out, count)
    return out


def begins(index: Tensor, o: int, i: int, width: int) -> Tensor:
    """[o * column tiles + 1] int32: how many entries precede each row's part of each column tile of `width`; at last nnz."""
    col_tiles = triton.cdiv(i, width)
    part = torch.arange(o * col_tiles + 1, device=index.device)
    edges = part // col_tiles * i + part % col_tiles * width
    return torch.searchsorted(index[0].long() * i + index[1], edges, out_int32=True)


def copy(W: Tensor, values: Tensor, index: Tensor, out: Tensor) -> None:
    """out = W, and W + values at the entries; W, out [o, i] of any strides, values [nnz] of a dtype of their own."""
    lowrank._check_shapes(tuple(W.shape), out=out)
    out.copy_(W)
    _scatter(W, values, index, out, None)


def put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W += values at the entries, in place; a fresh tensor [nnz] of what W held there."""
    saved = memory.empty((index.shape[1],), W.dtype, W.device)
    _scatter(W, values, index, W, saved)
    return saved


def _scatter(W: Tensor, values: Tensor, index: Tensor, out: Tensor, saved: Tensor | None) -> None:
    nnz = index.shape[1]
    lowrank._check_shapes((nnz,), values=values)
    if nnz:
        scatter_kernel[(triton.cdiv(nnz, ENTRIES),)](
            W, values.contiguous(), index, out, W if saved is None else saved,
            nnz, *W.stride(), *out.stride(),
            BLOCK=ENTRIES, SAVE=saved is not None, num_warps=4, num_stages=1,
        )  # fmt: skip


def restore(W: Tensor, index: Tensor, saved: Tensor) -> None:
    """W [o, i] of any strides = saved [nnz] of W's dtype at the entries, bit for bit."""
    nnz = index.shape[1]
    lowrank._check_shapes((nnz,), saved=saved)
    if nnz:
        restore_kernel[(triton.cdiv(nnz, ENTRIES),)](
            W, saved.contiguous(), index, nnz, *W.stride(), BLOCK=ENTRIES, num_warps=4, num_stages=1
        )


def _by_column(x: Tensor, length: int) -> Tensor:
    """x^T [columns, length], zero after x's own tokens."""
    t, columns = x.shape
    out = memory.empty((columns, length), x.dtype, x.device)
    out[:, :t].copy_(x.T)
    out[:, t:].zero_()
    return out
