"""Tile choice: pure functions of sizes, no device query.

A tile is what one program holds: `rows` tokens (or rows of W), `cols` columns, `rank` columns of the factor. The rank is
the next power of two, at least 16 (what a tensor core takes) and at most 128. Ranks above 128 run in rank tiles of 64, and
ranks above 16 that 16 does not divide in tiles of 32: their rows are not aligned, and narrow loads of larger tiles spill.
`legal` lists what the functions can return; the compile gate builds all of it. arch: sm_80, sm_90, ... or hip. itemsize:
of the widest operand of the product. Which tiles spill registers was read from the gate; none was timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

RANKS = (16, 32, 64, 128)


class Tile(NamedTuple):
    """One program's share of the work and how many warps and pipeline stages it gets."""

    rows: int
    cols: int
    rank: int
    warps: int
    stages: int


def rank_tile(r: int) -> int:
    """The smallest tile that holds rank r, or the one of which it takes several."""
    if r > 16 and r % 16:
        return 32
    return next((size for size in RANKS if r <= size), 64)


def shrink(r: int, itemsize: int, arch: str) -> Tile:
    """[rows, cols] times [cols, rank], summed over cols."""
    if itemsize > 2:
        return _fp32(r, arch)
    rank = rank_tile(r)
    cols = 128 if rank <= 32 and _large(arch) else 64
    wide = rank != 64 if arch == "hip" else rank >= 32
    return Tile(64, cols, rank, 8 if wide else 4, _stages(arch))


def expand(r: int, itemsize: int, arch: str) -> Tile:
    """[rows, rank] times [rank, cols], added to [rows, cols]. Nothing is pipelined: a program has one tile."""
    if itemsize > 2:
        return _fp32(r, arch)._replace(stages=1)
    rank = rank_tile(r)
    return Tile(64, 128, rank, 8 if rank == 128 else 4, 1)


def outer(r: int, itemsize: int, arch: str, need_u: bool, gained: bool) -> Tile:
    """[rows, cols]^T times [rows, rank], summed over rows; with need_u also [rows, cols] times [cols, rank].

    Wide tiles write fewer partial sums of u. With a gain three tensors of the tile's size are in registers: cols is small.
    """
    if itemsize > 2:
        return _fp32(r, arch)
    # unaligned rows and three tensors of strides are more than the scalar registers of gfx942 hold
    rank = 16 if gained and arch == "hip" and r % 16 else rank_tile(r)
    narrow = gained or arch == "hip" or (rank in (32, 128) and not (need_u and _large(arch)))
    cols = 64 if narrow else 256 if need_u and rank <= 32 and _large(arch) else 128
    rows = 32 if gained and rank == 128 and arch != "hip" and not _large(arch) else 64
    return Tile(
        rows,
        cols,
        rank,
        8 if arch == "hip" or cols == 256 or rank >= (32 if gained else 64) else 4,
        _stages(arch),
    )


def norm(r: int, itemsize: int, arch: str) -> Tile:
    """Rows of W, over which the program walks in steps of cols; r = 0 without factors."""
    if itemsize > 2:
        return _fp32(r, arch)
    rank = rank_tile(r)
    return Tile(64, 64, rank, 8 if rank in (32, 64) else 4, _stages(arch))


def splits(tiles: int, programs: int, processors: int) -> tuple[int, int]:
    """How many parts a sum over `tiles` tiles is cut into, and tiles per part: about two programs per processor."""
    wanted = max(1, min(tiles, -(-2 * processors // max(1, programs))))
    per_part = -(-tiles // wanted)
    return -(-tiles // per_part), per_part


def _large(arch: str) -> bool:
    """Whether a block may use 227 KiB of shared memory: Hopper and after."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def _stages(arch: str) -> int:
    return 2 if arch == "hip" else 3


def _fp32(r: int, arch: str) -> Tile:
    """Products in full fp32 use no tensor core; the compiler unrolls them, and a larger tile spills thousands of bytes."""
    return Tile(32, 32, min(16 if arch == "hip" else 32, rank_tile(r)), 4, 2)


def legal(kernel: str, arch: str, itemsize: int = 2) -> set[Tile]:
    """Every tile that the function named `kernel` can return on `arch`."""
    if kernel == "outer":
        flags = [(True, False), (False, False), (True, True), (False, True)]
        return {outer(r, itemsize, arch, *f) for r in RANKS for f in flags}
    choose = {"shrink": shrink, "expand": expand, "norm": norm}[kernel]
    return {choose(r, itemsize, arch) for r in RANKS}
