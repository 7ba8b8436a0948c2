"""A linear's product with a low-rank share as one more step of its sum, for Hopper, in Gluon: y = x W^T + u F^T.

One warp loads tiles by TMA into a ring of buffers, two warp groups multiply them (wgmma); the low-rank share goes through the
same ring, with zeros beyond its rank. Programs are persistent. Letters: x [M, K], W [N, K] (or, across, [K, N]), u [M, r],
F [N, r] (or, across, [r, N]), y [M, N]; all of one 16-bit dtype. Gluon has no interpreter: the compile gate builds it, and a GPU
checks it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9's names, and 3.6's
read_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
write_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

_GL = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class ProductTile(NamedTuple):
    """rows and cols of y, depth of one step, buffers of the ring, how many row tiles are walked together, warps that multiply.

    parts: how many pieces a tile of y leaves in.   registers: of the loading warp.
    """

    rows: int = 128
    cols: int = 256
    depth: int = 64
    buffers: int = 4
    group: int = 8
    warps: int = 8
    parts: int = 2
    registers: int = 40


@gluon.jit
def _place(tile, row_tiles, col_tiles, GROUP: gl.constexpr):
    per_group = GROUP * col_tiles
    first = tile // per_group * GROUP
    rows = gl.minimum(row_tiles - first, GROUP)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@gluon.jit
def _load(xd, wd, xs, ws, full, empty, count, row, col, at, BUFFERS: gl.constexpr, ACROSS: gl.constexpr):
    i = count % BUFFERS
    mbarrier.wait(empty.index(i), ((count // BUFFERS) & 1) ^ 1)
    mbarrier.expect(full.index(i), xd.block_type.nbytes + wd.block_type.nbytes)
    read_box(xd, [row, at], full.index(i), xs.index(i))
    if ACROSS:
        read_box(wd, [at, col], full.index(i), ws.index(i))
    else:
        read_box(wd, [col, at], full.index(i), ws.index(i))


@gluon.jit
def _producer(
    xd, wd, ud, fd, xs, ws, full, empty, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr,
    ACROSS: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(M, BM)
    col_tiles = gl.cdiv(N, BN)
    steps = gl.cdiv(K, BK)
    count = 0
    for tile in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        pm, pn = _place(tile, row_tiles, col_tiles, GROUP)
        for k in range(steps):
            _load(xd, wd, xs, ws, full, empty, count, pm * BM, pn * BN, k * BK, BUFFERS, ACROSS)
            count += 1
        if SHARE:
            _load(ud, fd, xs, ws, full, empty, count, pm * BM, pn * BN, 0, BUFFERS, ACROSS)
            count += 1


@gluon.jit
def _consumer(
    yd, ys, xs, ws, full, empty, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr,
    ACROSS: gl.constexpr, WARPS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(M, BM)
    col_tiles = gl.cdiv(N, BN)
    steps = gl.cdiv(K, BK)
    if SHARE:
        steps += 1
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    count = 0
    for tile in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        pm, pn = _place(tile, row_tiles, col_tiles, GROUP)
        acc = gl.zeros((BM, BN), gl.float32, layout)
        for k in range(steps):
            i = count % BUFFERS
            mbarrier.wait(full.index(i), (count // BUFFERS) & 1)
            b = ws.index(i)
            if not ACROSS:
                b = b.permute((1, 0))
            acc = warpgroup_mma(xs.index(i), b, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            # all but the latest product are done: the buffer before is free
            mbarrier.arrive(empty.index((count + BUFFERS - 1) % BUFFERS), count=1, pred=k > 0)
            count += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((count - 1) % BUFFERS), count=1)
        if PARTS == 1:
            tma.store_wait(pendings=0)
            ys.index(0).store(acc.to(yd.dtype))
            fence_async_shared()
            write_box(yd, [pm * BM, pn * BN], ys.index(0))
        elif PARTS == 2:
            left, right = gl.split(acc.reshape((BM, 2, BN // 2)).permute((0, 2, 1)))
            tma.store_wait(pendings=0)
            ys.index(0).store(left.to(yd.dtype))
            fence_async_shared()
            write_box(yd, [pm * BM, pn * BN], ys.index(0))
            tma.store_wait(pendings=0)
            ys.index(0).store(right.to(yd.dtype))
            fence_async_shared()
            write_box(yd, [pm * BM, pn * BN + BN // 2], ys.index(0))
        else:
            # four pieces through two buffers: one leaves while the other is written
            left, right = gl.split(acc.reshape((BM, 2, BN // 2)).permute((0, 2, 1)))
            a, b = gl.split(left.reshape((BM, 2, BN // 4)).permute((0, 2, 1)))
            c, d = gl.split(right.reshape((BM, 2, BN // 4)).permute((0, 2, 1)))
            _leave(yd, ys.index(0), a, pm * BM, pn * BN)
            _leave(yd, ys.index(1), b, pm * BM, pn * BN + BN // 4)
            _leave(yd, ys.index(0), c, pm * BM, pn * BN + BN // 2)
            _leave(yd, ys.index(1), d, pm * BM, pn * BN + 3 * (BN // 4))
    tma.store_wait(pendings=0)


@gluon.jit
def _leave(yd, ys, piece, row, col):
    tma.store_wait(pendings=1)
    ys.store(piece.to(yd.dtype))
    fence_async_shared()
    write_box(yd, [row, col], ys)


@gluon.jit
def product_kernel(
    xd, wd, ud, fd, yd, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr,
    ACROSS: gl.constexpr, WARPS: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """y = x W^T + u F^T. Grid: at most one program per multiprocessor."""
    xs = gl.allocate_shared_memory(xd.dtype, [BUFFERS] + xd.block_type.shape, xd.layout)  # noqa: RUF005
    ws = gl.allocate_shared_memory(wd.dtype, [BUFFERS] + wd.block_type.shape, wd.layout)  # noqa: RUF005
    ys = gl.allocate_shared_memory(yd.dtype, [2 if PARTS == 4 else 1] + yd.block_type.shape, yd.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_consumer, (yd, ys, xs, ws, full, empty, M, N, K, BM, BN, BK, BUFFERS, GROUP, SHARE, ACROSS, WARPS, PARTS)),
            (_producer, (xd, wd, ud, fd, xs, ws, full, empty, M, N, K, BM, BN, BK, BUFFERS, GROUP, SHARE, ACROSS)),
        ],
        [1],
        [REGISTERS],
    )


KERNELS = (product_kernel,)
_DEFAULT = ProductTile()
# what stage products of the GPU bench compares
TILES = (
    _DEFAULT,
    _DEFAULT._replace(parts=2),
    _DEFAULT._replace(buffers=3, parts=1),
    _DEFAULT._replace(rows=256, cols=128),
    _DEFAULT._replace(cols=128, buffers=5, warps=4, parts=1),
)


def product(
    x: Tensor, W: Tensor, u: Tensor | None, F: Tensor | None, y: Tensor, across: bool, tile: ProductTile, programs: int
) -> None:
    """y = x W^T + u F^T (across: x W + u F) into the given y; u and F None for the product alone."""
    (M, K), N = x.shape, y.shape[1]
    box = [tile.depth, tile.cols] if across else [tile.cols, tile.depth]
    xd, wd, yd = described(x, [tile.rows, tile.depth]), described(W, box), described(y, [tile.rows, tile.cols // tile.parts])
    ud, fd = (xd, wd) if u is None or F is None else (described(u, [tile.rows, tile.depth]), described(F, box))
    tiles = -(-M // tile.rows) * -(-N // tile.cols)
    product_kernel[(min(programs, tiles),)](
        xd, wd, ud, fd, yd, M, N, K,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, BUFFERS=tile.buffers, GROUP=tile.group, SHARE=u is not None, ACROSS=across,
        WARPS=tile.warps, PARTS=tile.parts, REGISTERS=tile.registers, num_warps=tile.warps,
    )  # fmt: skip


def described(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(box, _GL[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)
