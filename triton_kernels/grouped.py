"""Grouped experts in Triton: low-rank products of the rows that an expert's tokens have; three segmented kernels.

    shrink   u[slot] = s * w * (x[token] F_e)              down: F = A^T, du: F = B, which also gives dw
    expand   z[token] += s * (u[slot] F_e^T)               up_add: F = B, dx_add: F = A^T; up: a fresh z with a bias
    outer    G_e = s * sum of x[token]^T (w u[slot])       dA, dB: one program for each tile of each expert

Pair n is token n // K and its expert number n % K. order [P] lists the pairs sorted by (expert, place n % K), tokens ascending;
ends [(experts + 1) * K + 1] int32 says where each (expert, place) begins; what follows the last expert is the pairs of none. Expert e has
the ranks starts[e] to starts[e + 1] of R. x, z [t, c] and F [c, R] have any strides; u [P, W] is by slot, the place in `order`.

A program finds its expert and its tokens in `ends` itself: the grid is the largest that the sizes allow, pairs / BT + experts
tiles, and a program past the last tile does nothing. So no size of a group is ever read by the host. One launch of expand writes the
pairs of one place, whose tokens are all different, and the places follow one another: no atomics, equal bits on every run.
Row offsets are 64-bit. Products are in DOT, sums in fp32.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

lowrank = importlib.import_module(f"{__package__}.lowrank")
memory = lowrank.memory
tiles = lowrank.tiles


@triton.jit
def find(ends, tile, count, begin, end, K: tl.constexpr, SEGS: tl.constexpr, BT: tl.constexpr):
    """(expert, first slot, last slot + 1) of token tile number `tile`; the expert is `count` or more past the last tile.

    Of each of `count` experts the slots ends[e * K + begin] to ends[e * K + end], in tiles of BT.
    """
    e = tl.arange(0, SEGS)
    at = e.to(tl.int64) * K
    low = tl.load(ends + at + begin, e < count, 0)
    high = tl.load(ends + at + end, e < count, 0)
    number = (high - low + (BT - 1)) // BT
    after = tl.cumsum(number, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    mine = e == expert
    before = tl.sum(tl.where(mine, after - number, 0), 0)
    first = tl.sum(tl.where(mine, low, 0), 0) + (tile - before) * BT
    return expert, first, tl.sum(tl.where(mine, high, 0), 0)


@triton.jit
def span(starts, expert, ALIGNED: tl.constexpr):
    """(first rank, rank) of an expert."""
    start = tl.load(starts + expert)
    r = tl.load(starts + expert + 1) - start
    if ALIGNED:
        start, r = tl.multiple_of(start, 16), tl.multiple_of(r, 16)
    return start.to(tl.int64), r


@triton.jit(do_not_specialize=["pairs", "count"])
def shrink_kernel(
    x, f, order, ends, starts, w, other, out, dw,
    pairs, count, c, rank_tiles, width,
    sx_t, sx_c, sf_c, sf_r,
    scale,
    K: tl.constexpr, SEGS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_W: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """out [pairs, width] by slot = scale * w * (x F); with NEED_DW dw[rank tile] [pairs] by pair = (scale * x F) . other [pairs, width].

    Grid: (token tiles * rank tiles). width: of a row of `out` and `other`; ranks that an expert lacks are not written.
    """
    rank_tile = tl.program_id(0) % rank_tiles
    expert, first, last = find(ends, tl.program_id(0) // rank_tiles, count, 0, K, K, SEGS, BT)
    if expert >= count:
        return
    start, r = span(starts, expert, ALIGNED)
    if rank_tile * BR >= r:
        return
    slots = first.to(tl.int64) + tl.arange(0, BT)
    inside = slots < last
    pair = tl.load(order + slots, inside, 0)
    token = pair // K
    ranks = (rank_tile * BR + tl.arange(0, BR)).to(tl.int64)
    in_rank = ranks < r
    acc = tl.zeros([BT, BR], tl.float32)
    for step in range(0, c, BC):
        cols = (step + tl.arange(0, BC)).to(tl.int64)
        in_cols = cols < c
        a = tl.load(x + token[:, None] * sx_t + cols[None, :] * sx_c, inside[:, None] & in_cols[None, :], 0.0).to(DOT)
        b = tl.load(f + cols[:, None] * sf_c + (start + ranks)[None, :] * sf_r, in_cols[:, None] & in_rank[None, :], 0.0).to(DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    acc *= scale
    mask = inside[:, None] & in_rank[None, :]
    at = slots[:, None] * width + ranks[None, :]
    if NEED_DW:
        product = acc * tl.load(other + at, mask, 0.0).to(tl.float32)
        tl.store(dw + rank_tile.to(tl.int64) * pairs + pair, tl.sum(product, 1).to(dw.dtype.element_ty), inside)
    if HAS_W:
        acc *= tl.load(w + pair, inside, 0.0).to(tl.float32)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count", "place"])
def expand_kernel(
    z, u, f, order, ends, starts, bias,
    count, c, col_tiles, width, place,
    sz_t, sz_c, sf_c, sf_r,
    scale,
    K: tl.constexpr, SEGS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, RANK_TILES: tl.constexpr,
    DOT: tl.constexpr, ALIGNED: tl.constexpr, FRESH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """z [t, c] += scale * (u F^T) at the tokens of one place; with FRESH z = that + bias, which is every token's row.

    With FRESH the pairs of no expert are among the `count`. Grid: (token tiles * column tiles).
    """
    expert, first, last = find(ends, tl.program_id(0) // col_tiles, count, place, place + 1, K, SEGS, BT)
    if expert >= count:
        return
    start, r = span(starts, expert, ALIGNED)
    if not FRESH:
        if r == 0:
            return
    slots = first.to(tl.int64) + tl.arange(0, BT)
    inside = slots < last
    token = tl.load(order + slots, inside, 0) // K
    cols = (tl.program_id(0) % col_tiles * BC + tl.arange(0, BC)).to(tl.int64)
    in_cols = cols < c
    acc = tl.zeros([BT, BC], tl.float32)
    for step in range(RANK_TILES):
        ranks = (step * BR + tl.arange(0, BR)).to(tl.int64)
        in_rank = ranks < r
        a = tl.load(u + slots[:, None] * width + ranks[None, :], inside[:, None] & in_rank[None, :], 0.0).to(DOT)
        b = tl.load(f + (start + ranks)[:, None] * sf_r + cols[None, :] * sf_c, in_rank[:, None] & in_cols[None, :], 0.0).to(DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    mask = inside[:, None] & in_cols[None, :]
    at = z + token[:, None] * sz_t + cols[None, :] * sz_c
    total = acc * scale
    if not FRESH:
        total += tl.load(at, mask, 0.0).to(tl.float32)
    elif HAS_BIAS:
        total += tl.load(bias + cols, in_cols, 0.0).to(tl.float32)[None, :]
    tl.store(at, total.to(z.dtype.element_ty), mask)


@triton.jit
def outer_kernel(
    x, u, order, ends, starts, w, g,
    c, col_tiles, rank_tiles, width,
    sx_t, sx_c, sg_c, sg_r,
    scale,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """g [c, R] = scale * the sum over an expert's pairs of x^T (w u). Grid: (experts * column tiles * rank tiles)."""
    rank_tile = tl.program_id(0) % rank_tiles
    tile = tl.program_id(0) // rank_tiles
    expert = tile // col_tiles
    start, r = span(starts, expert, ALIGNED)
    if rank_tile * BR >= r:
        return
    cols = (tile % col_tiles * BC + tl.arange(0, BC)).to(tl.int64)
    in_cols = cols < c
    ranks = (rank_tile * BR + tl.arange(0, BR)).to(tl.int64)
    in_rank = ranks < r
    acc = tl.zeros([BC, BR], tl.float32)
    last = tl.load(ends + (expert + 1).to(tl.int64) * K)
    for first in tl.range(tl.load(ends + expert.to(tl.int64) * K), last, BT, num_stages=STAGES):
        slots = (first + tl.arange(0, BT)).to(tl.int64)
        inside = slots < last
        pair = tl.load(order + slots, inside, 0)
        a = tl.load(x + (pair // K)[:, None] * sx_t + cols[None, :] * sx_c, inside[:, None] & in_cols[None, :], 0.0).to(DOT)
        b = tl.load(u + slots[:, None] * width + ranks[None, :], inside[:, None] & in_rank[None, :], 0.0)
        if HAS_W:
            b = b.to(tl.float32) * tl.load(w + pair, inside, 0.0).to(tl.float32)[:, None]
        acc = tl.dot(tl.trans(a), b.to(DOT), acc, input_precision="ieee")
    at = g + cols[:, None] * sg_c + (start + ranks)[None, :] * sg_r
    tl.store(at, (acc * scale).to(g.dtype.element_ty), in_cols[:, None] & in_rank[None, :])


KERNELS = (shrink_kernel, expand_kernel, outer_kernel)


def down(
    x: Tensor, A: Tensor, order: Tensor, ends: Tensor, w: Tensor | None, ranks: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """w * (x A_e^T) by slot, [P, W] in `dtype`; x [t, i], A [R, i], w [P] by pair. W: the largest rank, at a multiple of 16."""
    return _shrink(x, A.T, order, ends, w, None, ranks, dtype, 1.0)[0]


def du(
    dz: Tensor, B: Tensor, u: Tensor | None, order: Tensor, ends: Tensor, w: Tensor | None, ranks: Sequence[int], scale: float
) -> tuple[Tensor, Tensor | None]:
    """(w * du, dw): du = scale * dz B_e by slot [P, W] in dz's dtype, and, where u = x A_e^T is given, dw = du . u by pair in w's dtype."""
    return _shrink(dz, B, order, ends, w, u, ranks, dz.dtype, scale)


def up(
    u: Tensor, B: Tensor, order: Tensor, ends: Tensor, ranks: Sequence[int], scale: float, bias: Tensor | None, tokens: int
) -> Tensor:
    """A fresh z = scale * the sum of u[slot] B_e^T + bias, [t, o] in u's dtype; u [P, W] by slot, B [o, R], bias [o]."""
    z = memory.empty((tokens, B.shape[0]), u.dtype, u.device)
    _expand(z, u, B, order, ends, ranks, scale, None if bias is None else bias.contiguous(), True)
    return z


def up_add(
    z: Tensor, u: Tensor, B: Tensor, order: Tensor, ends: Tensor, ranks: Sequence[int], scale: float
) -> None:
    """z[token] += scale * u[slot] B_e^T in place; z [t, o], u [P, W] by slot, B [o, R]; dx_add is the same with A^T."""
    _expand(z, u, B, order, ends, ranks, scale, None, False)


def outer(
    x: Tensor, u: Tensor, like: Tensor, order: Tensor, ends: Tensor, w: Tensor | None, ranks: Sequence[int], scale: float,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """scale * the sum over an expert's pairs of x[token]^T (w u[slot]), of like's shape and dtype: [c, R], or [R, c] if transposed."""
    experts, k = _sizes(order, ends, ranks)
    total, c = sum(ranks), x.shape[1]
    lowrank._check_shapes((total, c) if transposed else (c, total), gradient=like)
    lowrank._check_shapes((order.numel() // k, c), x=x)
    lowrank._check_shapes((order.numel(), _width(ranks)), u=u)
    lowrank._check_shapes((order.numel(),), w=w)
    if order.numel() == 0 or total == 0 or c == 0:
        return memory.zeros(tuple(like.shape), like.dtype, x.device)
    g = memory.empty(tuple(like.shape), like.dtype, x.device)
    sg_r, sg_c = (c, 1) if transposed else (1, total)
    tile = tiles.gathered_outer(_rank(ranks), max(x.itemsize, u.itemsize), lowrank.architecture(x.device))
    col_tiles, rank_tiles = triton.cdiv(c, tile.cols), triton.cdiv(max(ranks), tile.rank)
    outer_kernel[(experts * col_tiles * rank_tiles,)](
        x, u, order, ends, _starts(tuple(ranks), x.device), x if w is None else w, g,
        c, col_tiles, rank_tiles, u.shape[1],
        *x.stride(), sg_c, sg_r,
        scale,
        K=k, BT=tile.rows, BC=tile.cols, BR=tile.rank, DOT=lowrank._TL[u.dtype], ALIGNED=_aligned(ranks), HAS_W=w is not None,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return g


def _shrink(
    x: Tensor, f: Tensor, order: Tensor, ends: Tensor, w: Tensor | None, other: Tensor | None, ranks: Sequence[int],
    dtype: torch.dtype, scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(scale * w * (x F) by slot in `dtype`, and with `other` [P, W] its product with the unweighted, by pair in w's dtype); f [c, R]."""
    experts, k = _sizes(order, ends, ranks)
    c, device, pairs, width = x.shape[1], x.device, order.numel(), _width(ranks)
    lowrank._check_shapes((c, sum(ranks)), f=f)
    lowrank._check_shapes((pairs,), w=w)
    lowrank._check_shapes((pairs, width), u=other)
    lowrank._check_shapes((pairs // k, c), x=x)
    if pairs == 0 or width == 0:
        dw = None if other is None or w is None else memory.zeros((pairs,), w.dtype, device)
        return memory.zeros((pairs, width), dtype, device), dw
    out = memory.empty((pairs, width), dtype, device)
    tile = tiles.gathered_shrink(_rank(ranks), max(x.itemsize, dtype.itemsize), lowrank.architecture(device))
    rank_tiles = triton.cdiv(max(ranks), tile.rank)
    dw = parts = None
    if other is not None and w is not None:
        # an expert of rank 0, or of fewer rank tiles than another, writes nothing
        dw = memory.zeros((pairs,), w.dtype, device)
        parts = dw if rank_tiles == 1 else memory.zeros((rank_tiles, pairs), torch.float32, device)
    # what a flag turns off still needs a pointer; x stands in
    of = lambda tensor: x if tensor is None else tensor  # noqa: E731
    shrink_kernel[(_tiles(pairs, experts, tile.rows) * rank_tiles,)](
        x, f, order, ends, _starts(tuple(ranks), device), of(w), of(other), out, of(parts),
        pairs, experts, c, rank_tiles, width,
        *x.stride(), *f.stride(),
        scale,
        K=k, SEGS=_segs(experts), BT=tile.rows, BC=tile.cols, BR=tile.rank, DOT=lowrank._TL[dtype],
        ALIGNED=_aligned(ranks), HAS_W=w is not None, NEED_DW=dw is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(parts, dw, rank_tiles)
    return out, dw


def _expand(
    z: Tensor, u: Tensor, f: Tensor, order: Tensor, ends: Tensor, ranks: Sequence[int], scale: float, bias: Tensor | None,
    fresh: bool,
) -> None:  # fmt: skip
    """z[token] += scale * u[slot] F_e^T place by place, the first of them fresh and with the bias if `fresh`; f [c, R]."""
    experts, k = _sizes(order, ends, ranks)
    t, c = z.shape
    lowrank._check_shapes((c, sum(ranks)), f=f)
    lowrank._check_shapes((order.numel() // k, c), z=z)
    lowrank._check_shapes((order.numel(), _width(ranks)), u=u)
    lowrank._check_shapes((c,), bias=bias)
    if z.numel() == 0 or (max(ranks) == 0 and not fresh):
        return
    tile = tiles.gathered_expand(_rank(ranks), max(z.itemsize, u.itemsize), lowrank.architecture(z.device))
    col_tiles = triton.cdiv(c, tile.cols)
    for place in range(k):
        new = fresh and place == 0
        count = experts + new
        expand_kernel[(_tiles(t, count, tile.rows) * col_tiles,)](
            z, u, f, order, ends, _starts(tuple(ranks), z.device), z if bias is None else bias,
            count, c, col_tiles, u.shape[1], place,
            *z.stride(), *f.stride(),
            scale,
            K=k, SEGS=_segs(count), BT=tile.rows, BC=tile.cols, BR=tile.rank,
            RANK_TILES=triton.cdiv(max(ranks), tile.rank), DOT=lowrank._TL[u.dtype], ALIGNED=_aligned(ranks), FRESH=new,
            HAS_BIAS=new and bias is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _sizes(order: Tensor, ends: Tensor, ranks: Sequence[int]) -> tuple[int, int]:
    """(experts, k); ValueError where the tensors are not those of `segments` for these experts: kernels trust them."""
    experts = len(ranks)
    k, rest = divmod(ends.numel() - 1, experts + 1)
    if rest or k < 1 or order.numel() % k or (order.dtype, ends.dtype) != (torch.int64, torch.int32):
        raise ValueError(
            f"Triton kernel: order has shape {tuple(order.shape)} ({order.dtype}) and ends {tuple(ends.shape)} ({ends.dtype}) for "
            f"{experts} experts; needed are int64 [t * k] and int32 [(experts + 1) * k + 1]."
        )
    return experts, k


def _tiles(slots: int, segments: int, rows: int) -> int:
    """The most tiles of `rows` slots that they make in this many segments."""
    return slots // rows + min(segments, slots)


def _segs(count: int) -> int:
    """The vector in which a program looks for its expert."""
    return max(2, triton.next_power_of_2(count))


def _width(ranks: Sequence[int]) -> int:
    """Numbers of a slot: the largest rank, at a multiple of 16, so that rows are aligned."""
    return -(-max(ranks) // 16) * 16


def _aligned(ranks: Sequence[int]) -> bool:
    return all(r % 16 == 0 for r in ranks)


def _rank(ranks: Sequence[int]) -> int:
    """The rank that tiles are chosen by: the largest, or one that no tile is aligned for where an expert's ranks are not."""
    most = max(1, *ranks)
    return most if most <= 16 or _aligned(ranks) else 17


@functools.lru_cache(maxsize=256)
def _starts(ranks: tuple[int, ...], device: Any) -> Tensor:
    """int32 [experts + 2]: where the ranks of each expert begin, and of none after them. Kept: a copy to the device waits for it."""
    table = [*itertools.accumulate(ranks, initial=0)]
    with torch.inference_mode(False):
        return torch.tensor([*table, table[-1]], dtype=torch.int32, device=device)
