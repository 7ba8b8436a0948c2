"""DoRA's norm in Triton: ||W + B A||^2 of each row in one pass over W; W + B A is never stored.

The expansion ||W||^2 + 2 <B, W A^T> + ... would need less arithmetic and loses everything where a row nearly cancels.
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


@triton.jit(do_not_specialize=["per_part"])
def norm_kernel(
    w, a, b, out,
    o, i, r, per_part,
    sw_o, sw_i, sa_r, sa_i, sb_o, sb_r,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, RANK_TILES: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out[split] [o] = sum over the column tiles of this split of (W + B A)^2. Grid: (row tiles, splits).

    RANK_TILES = 0: no factors. The products of fp32 factors are exact to fp32 (ieee), those of 16-bit factors exact.
    """
    rows = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    first = tl.program_id(1) * per_part * BI
    acc = tl.zeros([BO, BI], tl.float32)
    # tl.range: with stages of its own the loop also prefetches W, which no product reads
    for start in tl.range(first, min(first + per_part * BI, i), BI, num_stages=STAGES):
        cols = start + tl.arange(0, BI)
        wide = cols.to(tl.int64)
        mask = (rows < o)[:, None] & (cols < i)[None, :]
        tile = tl.load(w + rows[:, None] * sw_o + wide[None, :] * sw_i, mask, 0.0).to(tl.float32)
        for step in range(RANK_TILES):
            ranks = step * BR + tl.arange(0, BR)
            left = tl.load(
                b + rows[:, None] * sb_o + ranks.to(tl.int64)[None, :] * sb_r,
                (rows < o)[:, None] & (ranks < r)[None, :],
                0.0,
            )
            right = tl.load(
                a + ranks.to(tl.int64)[:, None] * sa_r + wide[None, :] * sa_i,
                (ranks < r)[:, None] & (cols < i)[None, :],
                0.0,
            )
            tile = tl.dot(left.to(DOT), right.to(DOT), tile, input_precision="ieee")
        acc += tile * tile
    tl.store(out + tl.program_id(1).to(tl.int64) * o + rows, tl.sum(acc, 1), rows < o)


KERNELS = (norm_kernel,)


def row_sq_norm(W: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
    """W [out, in] of any strides, A [R, in], B [out, R] or both None -> [out] in fp32."""
    o, i = W.shape
    r = 0 if A is None else A.shape[0]
    lowrank._check_shapes((r, i), A=A)
    lowrank._check_shapes((o, r), B=B)
    out = memory.empty((o,), torch.float32, W.device)
    if out.numel() == 0 or i == 0:
        return out.zero_()
    dot = W.dtype if A is None or B is None else torch.promote_types(A.dtype, B.dtype)
    tile = tiles.norm(r, max(W.itemsize, dot.itemsize), lowrank.architecture(W.device))
    row_tiles = triton.cdiv(o, tile.rows)
    count, per_part = tiles.splits(triton.cdiv(i, tile.cols), row_tiles, lowrank.processors(W.device))
    parts = out if count == 1 else memory.empty((count, o), torch.float32, W.device)
    left, right = (W, W) if A is None or B is None else (A, B)
    norm_kernel[(row_tiles, count)](
        W, left, right, parts,
        o, i, r, per_part,
        *W.stride(), *left.stride(), *right.stride(),
        BO=tile.rows, BI=tile.cols, BR=tile.rank, RANK_TILES=triton.cdiv(r, tile.rank), DOT=lowrank._TL[dot],
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(parts, out, count)
    return out
