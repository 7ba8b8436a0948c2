"""A linear's product with a low-rank share as the first step of its sum, in plain Triton: y = u F^T + x W^T.

Persistent programs over tiles that tensor descriptors load. Letters: x [M, K], W [N, K] (or, across, [K, N]), u [M, r], F [N, r]
(or, across, [r, N]), y [M, N]; all of one dtype, rows of 16-byte multiples.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class PlainTile(NamedTuple):
    """rows and cols of y, depth of one step, how many row tiles are walked together, pieces a tile of y leaves in.

    flat: whether the loops over tiles and steps are one.
    """

    rows: int = 128
    cols: int = 256
    depth: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3
    parts: int = 1
    flat: bool = False


@triton.jit
def _place(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    per_group = GROUP * col_tiles
    first = tile // per_group * GROUP
    rows = min(row_tiles - first, GROUP)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@triton.jit
def plain_kernel(
    xd, wd, ud, fd, yd, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, ACROSS: tl.constexpr,
    PARTS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """y = u F^T + x W^T. Grid: at most one program per multiprocessor."""
    row_tiles = tl.cdiv(M, BM)
    col_tiles = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLAT):
        pm, pn = _place(tile, row_tiles, col_tiles, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        if SHARE:
            if ACROSS:
                acc = tl.dot(ud.load([pm * BM, 0]), fd.load([0, pn * BN]), acc)
            else:
                acc = tl.dot(ud.load([pm * BM, 0]), fd.load([pn * BN, 0]).T, acc)
        for k in range(steps):
            if ACROSS:
                acc = tl.dot(xd.load([pm * BM, k * BK]), wd.load([k * BK, pn * BN]), acc)
            else:
                acc = tl.dot(xd.load([pm * BM, k * BK]), wd.load([pn * BN, k * BK]).T, acc)
        if PARTS == 1:
            yd.store([pm * BM, pn * BN], acc.to(yd.dtype))
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            yd.store([pm * BM, pn * BN], left.to(yd.dtype))
            yd.store([pm * BM, pn * BN + BN // 2], right.to(yd.dtype))


KERNELS = (plain_kernel,)
_DEFAULT = PlainTile()
# what stage products of the GPU bench compares
TILES = (
    _DEFAULT,
    _DEFAULT._replace(flat=True),
    _DEFAULT._replace(cols=128, stages=4),
    _DEFAULT._replace(cols=128, stages=4, flat=True),
    _DEFAULT._replace(rows=256, cols=128),
)


def product(
    x: Tensor, W: Tensor, u: Tensor | None, F: Tensor | None, y: Tensor, across: bool, tile: PlainTile, programs: int
) -> None:
    """y = x W^T + u F^T (across: x W + u F) into the given y; u and F None for the product alone."""
    (M, K), N = x.shape, y.shape[1]
    box = [tile.depth, tile.cols] if across else [tile.cols, tile.depth]
    xd, wd, yd = described(x, [tile.rows, tile.depth]), described(W, box), described(y, [tile.rows, tile.cols // tile.parts])
    ud, fd = xd, wd
    if u is not None and F is not None:
        rank = max(16, triton.next_power_of_2(u.shape[1]))
        ud, fd = described(u, [tile.rows, rank]), described(F, [rank, tile.cols] if across else [tile.cols, rank])
    tiles = -(-M // tile.rows) * -(-N // tile.cols)
    plain_kernel[(min(programs, tiles),)](
        xd, wd, ud, fd, yd, M, N, K,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, GROUP=tile.group, SHARE=u is not None, ACROSS=across,
        PARTS=tile.parts, FLAT=tile.flat, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def described(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box)
