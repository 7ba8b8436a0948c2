"""Tile choice: pure functions of sizes, no device query.

A tile is what one program holds: `rows` tokens (or rows of W), `cols` columns, `rank` columns of the factor. The rank is
the next power of two, at least 16 (what a tensor core takes) and at most 128. Ranks above 128 run in rank tiles of 64, and
ranks above 16 that 16 does not divide in tiles of 32: their rows are not aligned, and narrow loads of larger tiles spill.
`legal` lists what the functions can return; the compile gate builds all of it. arch: sm_80, sm_90, ... or hip. itemsize:
of the widest operand of the product. Which tiles spill registers was read from the gate; none was timed on a GPU yet.
"""

from __future__ import annotations

import itertools
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


def gathered_outer(r: int, itemsize: int, arch: str) -> Tile:
    """outer of rows whose addresses are looked up, which takes registers: wider tiles spilled on sm_80 and sm_100, and on sm_80 deeper ones and
    those of four warps (under Triton 3.6)."""
    tile = outer(r, itemsize, arch, False, False)
    tile = tile._replace(cols=min(tile.cols, 64))
    return tile if _large(arch) else tile._replace(warps=max(tile.warps, 8 if itemsize <= 2 else 4), stages=2)


def gathered_shrink(r: int, itemsize: int, arch: str) -> Tile:
    """shrink of such rows: 128 columns spilled on sm_100 in fp16 (under Triton 3.6)."""
    tile = shrink(r, itemsize, arch)
    return tile._replace(cols=min(tile.cols, 64))


def gathered_expand(r: int, itemsize: int, arch: str) -> Tile:
    """expand to such rows: four warps spilled on sm_100 at a rank tile of 64 (under Triton 3.6)."""
    tile = expand(r, itemsize, arch)
    return tile._replace(warps=8) if itemsize <= 2 and tile.rank >= 64 else tile


def norm(r: int, itemsize: int, arch: str) -> Tile:
    """Rows of W, over which the program walks in steps of cols; r = 0 without factors."""
    if itemsize > 2:
        return _fp32(r, arch)
    rank = rank_tile(r)
    return Tile(64, 64, rank, 8 if rank in (32, 64) else 4, _stages(arch))


def sddmm(itemsize: int, arch: str) -> Tile:
    """Entries as rows, over whose tokens the program walks in steps of cols; no product of matrices, no rank."""
    return Tile(16, 128 if itemsize > 2 else 256, 0, 4, 1)


def masked(itemsize: int, arch: str) -> Tile:
    """[rows, cols]^T times [rows, rank], summed over rows (tokens): cols rows and rank columns of dW."""
    if itemsize > 2:
        return Tile(32, 32, 32, 4, 2)
    return Tile(64, 128, 128, 8, 3) if _large(arch) else Tile(64, 128, 64, 4, _stages(arch))


HADAMARD_RANK = 32


def hadamard_width(r: int) -> int:
    """P: how many columns of u a value of i has. The power of two that holds r, at least 4."""
    return _step(r, 4, 8, 16, HADAMARD_RANK)


def hadamard(kernel: str, width: int, itemsize: int, arch: str, need_u: bool = False) -> Tile:
    """The low-rank tile of the same name for a rank of width * width; `rank` is a multiple of width."""
    rank = min(64, width * width)
    # before Hopper composing a factor leaves few registers: narrow tiles, or Triton 3.6 spills a few bytes
    ampere = not _large(arch) and arch != "hip"
    if kernel == "outer":
        tile = outer(rank, itemsize, arch, need_u, False)
        tile = tile._replace(cols=min(64, tile.cols)) if ampere else tile
    else:
        tile = (shrink if kernel == "shrink" else expand)(rank, itemsize, arch)
        tile = tile._replace(warps=4) if ampere and kernel == "shrink" else tile
    return tile._replace(rank=max(tile.rank, width))


def hadamard_fuses(r: int) -> bool:
    """Whether du comes with dB. Its partial sums, one for each column tile, are as much traffic as dz from rank 64 on."""
    return hadamard_width(r) == 4


class KronTile(NamedTuple):
    """One program's share of y = x (C o D)^T: tokens, and rows and columns of C [a, c] and D [b, d]; kron.py says `group`."""

    rows: int
    a: int
    b: int
    c: int
    d: int
    group: int
    warps: int
    stages: int


def kron(a: int, b: int, c: int, aligned: bool, itemsize: int, arch: str) -> KronTile:
    """The product: [c * rows, d] times [d, b], read as [c, rows * b], under [a, c]; two accumulators at once.

    aligned: b and d are multiples of 16. Narrow loads and stores of larger tiles spill.
    """
    if itemsize > 2:
        return _kron_fp32(c, arch)
    inner = _step(c, 8, 16)
    outer = _step(a, inner, 32, 64)
    width = _step(b, 16, 64, 128) if aligned else 32
    whole = (16384 if aligned else 4096) // _share(arch)
    rows = max(1, min(whole // outer, whole // 2 // inner) // width)
    depth = 32 if arch == "hip" else 64
    return KronTile(max(16 // inner, rows), outer, width, inner, depth, 16 // inner, 8, _stages(arch))


def kron_grads(a: int, b: int, c: int, aligned: bool, itemsize: int, arch: str) -> KronTile:
    """dC or dD, summed over tokens: the accumulator is small, and wide tiles of C read dz and x once."""
    if itemsize > 2:
        return _kron_fp32(c, arch)
    if arch == "hip":
        inner, depth, warps = _step(c, 16, 64) if aligned else 16, 32, 8
    else:
        inner = _step(c, 8, 16, 64)
        depth, warps = (32, 4) if inner < 64 and int(arch[3:]) >= 100 else (64, 8)
    group = max(1, 16 // inner)
    outer = _step(a, 16 // group, 64)
    if group > 1:
        # Triton 3.6 spills a few bytes at depth 64 before Hopper, and at four warps after it
        depth = depth if _large(arch) else 32
        warps = warps if aligned or outer < 64 else 8
    width = _step(b, 16, 64) if aligned else 32
    whole = (4096 if aligned else 2048) // _share(arch)
    if inner == width == 64 and arch != "hip" and (outer == 64 or arch == "sm_90"):
        whole = 8192
    return KronTile(
        max(group, whole // (max(outer, inner) * width)),
        outer,
        width,
        inner,
        depth,
        group,
        warps,
        _stages(arch),
    )


def kron_both(a: int, b: int, c: int, d: int, aligned: bool, itemsize: int, arch: str) -> KronTile | None:
    """dC and dD in one pass, which needs all of C and all d in one tile; None where they are larger."""
    tile = kron_grads(a, b, c, aligned, itemsize, arch)
    return tile if a <= tile.a and c <= tile.c and d <= tile.d else None


def _share(arch: str) -> int:
    """What a tile is divided by: masks take scalar registers on AMD; other cards than Hopper spill a few bytes at its sizes."""
    return 4 if arch == "hip" else 1 if arch == "sm_90" else 2


def _kron_fp32(c: int, arch: str) -> KronTile:
    inner = 8 if c <= 8 else 16
    return KronTile(32 // inner, inner, 16, inner, 16 if arch == "hip" else 32, 16 // inner, 4, 2)


def _step(n: int, *sizes: int) -> int:
    """The smallest size that holds n, else the largest."""
    return next((size for size in sizes if n <= size), sizes[-1])


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


def legal(kernel: str, arch: str, itemsize: int = 2) -> set[Tile] | set[KronTile]:
    """Every tile that the function named `kernel` can return on `arch`."""
    if kernel == "outer":
        flags = [(True, False), (False, False), (True, True), (False, True)]
        return {outer(r, itemsize, arch, *f) for r in RANKS for f in flags}
    if kernel in ("sddmm", "masked"):
        return {{"sddmm": sddmm, "masked": masked}[kernel](itemsize, arch)}
    if kernel in ("kron", "kron_grads"):
        choose_kron = kron if kernel == "kron" else kron_grads
        steps = itertools.product((8, 32, 64), (16, 64, 128), (8, 16, 64), (True, False))
        return {choose_kron(*step, itemsize, arch) for step in steps}
    choose = {"shrink": shrink, "expand": expand, "norm": norm}[kernel]
    return {choose(r, itemsize, arch) for r in RANKS}
