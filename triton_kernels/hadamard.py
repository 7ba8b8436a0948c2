"""The Hadamard family in Triton: the low-rank product of rank r*r whose factors are composed in the kernels, and its gradients.

    shrink   u = s * x F              down: F from a1, a2        du: F from b1, b2
    expand   z (+)= s * u F^T + bias  up, up_add: from b1, b2    dx, dx_add: from a1, a2
    outer    G = s * x^T w            contracted to the gradients of the two factors; also du in the same pass over dz

Letters: F [c, r * r] with F[:, i * r + j] = f1[:, i] * f2[:, j]; f1, f2 [c, r] read in place through their strides: a1.T,
a2.T, or b1, b2. x, z [t, c], any strides. Neither F nor its gradient G, [c, r * r], is ever in memory.

u and w are [t, r * P] with P the power of two that holds r: column i * P + j, zero where j >= r. A rank tile is RI values
of i and all P of j, so that the gradient of f1 is complete in one program, and that of f2 is a sum over rank tiles.

Sums over columns (u), tokens or rank tiles (gradients) that are split over programs go to an fp32 buffer and are added in a
fixed order: no atomics, equal bits on every run. Offsets are 64-bit. F is composed in fp32 and rounded once to DOT.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

lowrank = importlib.import_module(f"{__package__}.lowrank")
memory = lowrank.memory
tiles = lowrank.tiles


@triton.jit
def load_part(f, c, r, sf_c, sf_r, col, rank, BC: tl.constexpr, SIZE: tl.constexpr):
    """f [c, r] from (col, rank) on: [BC, SIZE] in fp32."""
    cols, ranks = (col + tl.arange(0, BC)).to(tl.int64), (rank + tl.arange(0, SIZE)).to(tl.int64)
    at = (cols * sf_c)[:, None] + (ranks * sf_r)[None, :]
    return tl.load(f + at, (cols < c)[:, None] & (ranks < r)[None, :], 0.0).to(tl.float32)


@triton.jit
def composed(
    f1, f2, c, r, s1_c, s1_r, s2_c, s2_r, col, i,
    BC: tl.constexpr, RI: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """F of BC columns and the ranks from i on: [BC, RI * P]."""
    left = load_part(f1, c, r, s1_c, s1_r, col, i, BC, RI)
    right = load_part(f2, c, r, s2_c, s2_r, col, 0, BC, P)
    return tl.reshape(left[:, :, None] * right[:, None, :], [BC, RI * P]).to(DOT)


@triton.jit(do_not_specialize=["t", "per_part"])
def shrink_kernel(
    x, f1, f2, out,
    t, c, r, rank_tiles, per_part,
    sx_t, sx_c, s1_c, s1_r, s2_c, s2_r, so_s, so_t,
    scale,
    BT: tl.constexpr, BC: tl.constexpr, RI: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out[split] [t, r * P] = scale * x F over the column tiles of this split. Grid: (token tiles * rank tiles, splits)."""
    i = tl.program_id(0) % rank_tiles * RI
    rows = (tl.program_id(0) // rank_tiles).to(tl.int64) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * per_part * BC
    acc = tl.zeros([BT, RI * P], tl.float32)
    for col in range(first, min(first + per_part * BC, c), BC):
        cols = (col + tl.arange(0, BC)).to(tl.int64)
        a = tl.load(
            x + rows[:, None] * sx_t + cols[None, :] * sx_c, (rows < t)[:, None] & (cols < c)[None, :], 0.0
        ).to(DOT)
        b = composed(f1, f2, c, r, s1_c, s1_r, s2_c, s2_r, col, i, BC, RI, P, DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    ranks = (i * P + tl.arange(0, RI * P)).to(tl.int64)
    at = out + tl.program_id(1).to(tl.int64) * so_s + rows[:, None] * so_t + ranks[None, :]
    tl.store(at, (acc * scale).to(out.dtype.element_ty), (rows < t)[:, None] & (ranks < so_t)[None, :])


@triton.jit(do_not_specialize=["t"])
def expand_kernel(
    z, u, f1, f2, bias,
    t, c, r, col_tiles,
    sz_t, sz_c, su_t, s1_c, s1_r, s2_c, s2_r,
    scale,
    BT: tl.constexpr, BC: tl.constexpr, RI: tl.constexpr, P: tl.constexpr, RANK_TILES: tl.constexpr,
    DOT: tl.constexpr, FRESH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """z [t, c] += scale * u F^T in place; with FRESH z = that + bias whatever z held. Grid: (token tiles * column tiles)."""
    col = tl.program_id(0) % col_tiles * BC
    rows = (tl.program_id(0) // col_tiles).to(tl.int64) * BT + tl.arange(0, BT)
    cols = (col + tl.arange(0, BC)).to(tl.int64)
    acc = tl.zeros([BT, BC], tl.float32)
    for step in range(RANK_TILES):
        ranks = (step * RI * P + tl.arange(0, RI * P)).to(tl.int64)
        a = tl.load(
            u + rows[:, None] * su_t + ranks[None, :], (rows < t)[:, None] & (ranks < su_t)[None, :], 0.0
        ).to(DOT)
        b = composed(f1, f2, c, r, s1_c, s1_r, s2_c, s2_r, col, step * RI, BC, RI, P, DOT)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    mask = (rows < t)[:, None] & (cols < c)[None, :]
    at = z + rows[:, None] * sz_t + cols[None, :] * sz_c
    total = acc * scale
    if not FRESH:
        total += tl.load(at, mask, 0.0).to(tl.float32)
    elif HAS_BIAS:
        total += tl.load(bias + cols, cols < c, 0.0).to(tl.float32)[None, :]
    tl.store(at, total.to(z.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["t", "per_part"])
def outer_kernel(
    x, w, f1, f2, u, g1, g2,
    t, c, r, rank_tiles, per_part,
    sx_t, sx_c, sw_t, s1_c, s1_r, s2_c, s2_r, su_s, su_t, sg_c, sg_r,
    scale,
    BT: tl.constexpr, BC: tl.constexpr, RI: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
    NEED_U: tl.constexpr, NEED_1: tl.constexpr, NEED_2: tl.constexpr,
):  # fmt: skip
    """G = scale * x^T w over the tokens of a split, in registers only; per column tile u = scale * x F.

    g1[split] [c, r] = the sum over j of G * f2, g2[split, rank tile] [c, r] = the sum over i of G * f1.
    Grid: (column tiles * rank tiles, splits).
    """
    tile = tl.program_id(0) // rank_tiles
    rank_tile = tl.program_id(0) % rank_tiles
    split = tl.program_id(1)
    col, i = tile * BC, rank_tile * RI
    cols = (col + tl.arange(0, BC)).to(tl.int64)
    ranks = (i * P + tl.arange(0, RI * P)).to(tl.int64)
    acc = tl.zeros([BC, RI * P], tl.float32)
    if NEED_U:
        b = composed(f1, f2, c, r, s1_c, s1_r, s2_c, s2_r, col, i, BC, RI, P, DOT)
        u += tile.to(tl.int64) * su_s
    for start in range(split * per_part * BT, min((split + 1) * per_part * BT, t), BT):
        rows = (start + tl.arange(0, BT)).to(tl.int64)
        a = tl.load(
            x + rows[:, None] * sx_t + cols[None, :] * sx_c, (rows < t)[:, None] & (cols < c)[None, :], 0.0
        ).to(DOT)
        wt = tl.load(
            w + rows[:, None] * sw_t + ranks[None, :], (rows < t)[:, None] & (ranks < sw_t)[None, :], 0.0
        ).to(DOT)
        acc = tl.dot(tl.trans(a), wt, acc, input_precision="ieee")
        if NEED_U:
            ut = tl.dot(a, b, input_precision="ieee") * scale
            at = u + rows[:, None] * su_t + ranks[None, :]
            tl.store(at, ut.to(u.dtype.element_ty), (rows < t)[:, None] & (ranks < su_t)[None, :])
    whole = tl.reshape(acc * scale, [BC, RI, P])
    at_c = (cols * sg_c)[:, None]
    if NEED_1:
        right = load_part(f2, c, r, s2_c, s2_r, col, 0, BC, P)
        of = (i + tl.arange(0, RI)).to(tl.int64)
        at = g1 + split.to(tl.int64) * c * r + at_c + (of * sg_r)[None, :]
        found = tl.sum(whole * right[:, None, :], 2)
        tl.store(at, found.to(g1.dtype.element_ty), (cols < c)[:, None] & (of < r)[None, :])
    if NEED_2:
        left = load_part(f1, c, r, s1_c, s1_r, col, i, BC, RI)
        of = tl.arange(0, P).to(tl.int64)
        at = g2 + (split.to(tl.int64) * rank_tiles + rank_tile) * c * r + at_c + (of * sg_r)[None, :]
        found = tl.sum(whole * left[:, :, None], 1)
        tl.store(at, found.to(g2.dtype.element_ty), (cols < c)[:, None] & (of < r)[None, :])


KERNELS = (shrink_kernel, expand_kernel, outer_kernel)


def down(x: Tensor, a1: Tensor, a2: Tensor, dtype: torch.dtype) -> Tensor:
    """u = x A^T [t, r * P] in `dtype`; x [t, in], a1, a2 [r, in]."""
    return _shrink(x, a1.T, a2.T, dtype, 1.0)


def up(u: Tensor, b1: Tensor, b2: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """A fresh z = scale * u B^T + bias [t, out] in u's dtype; u [t, r * P], b1, b2 [out, r], bias [out]."""
    z = memory.empty((u.shape[0], b1.shape[0]), u.dtype, u.device)
    _expand(z, u, b1, b2, scale, None if bias is None else bias.contiguous(), True)
    return z


def up_add(z: Tensor, u: Tensor, b1: Tensor, b2: Tensor, scale: float) -> None:
    """z += scale * u B^T in place; z [t, out], u [t, r * P]."""
    _expand(z, u, b1, b2, scale, None, False)


def du_db(
    dz: Tensor, u: Tensor | None, b1: Tensor, b2: Tensor, scale: float, need_du: bool, need_1: bool, need_2: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """du = scale * dz B [t, r * P] in dz's dtype; db1, db2 of dB = scale * dz^T u, of b1's and b2's shape and dtype.

    Each only if needed; u is read only for db1 and db2. One pass over dz [t, out] where that is less traffic than two.
    """
    if not need_1 and not need_2:
        return (_shrink(dz, b1, b2, dz.dtype, scale) if need_du else None), None, None
    assert u is not None
    together = need_du and tiles.hadamard_fuses(b1.shape[1])
    du, db1, db2 = _outer(dz, u, b1, b2, scale, together, need_1, need_2, False)
    return (_shrink(dz, b1, b2, dz.dtype, scale) if need_du and not together else du), db1, db2


def dx(du: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """A fresh dx = du A [t, in] in du's dtype; du [t, r * P], a1, a2 [r, in]."""
    return up(du, a1.T, a2.T, 1.0, None)


def dx_add(dx: Tensor, du: Tensor, a1: Tensor, a2: Tensor) -> None:
    """dx += du A in place; dx [t, in], du [t, r * P]."""
    _expand(dx, du, a1.T, a2.T, 1.0, None, False)


def da(
    x: Tensor, du: Tensor, a1: Tensor, a2: Tensor, need_1: bool, need_2: bool
) -> tuple[Tensor | None, Tensor | None]:
    """da1, da2 of dA = du^T x, of a1's and a2's shape and dtype, each only if needed; x [t, in], du [t, r * P]."""
    return _outer(x, du, a1.T, a2.T, 1.0, False, need_1, need_2, True)[1:]


def _shrink(x: Tensor, f1: Tensor, f2: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale * x F [t, r * P]."""
    t, (c, r), (P, width) = x.shape[0], f1.shape, _check(f1, f2)
    lowrank._check_shapes((t, c), x=x)
    if t == 0 or c == 0:
        return memory.zeros((t, width), dtype, x.device)
    tile = tiles.hadamard("shrink", P, max(x.itemsize, dtype.itemsize), lowrank.architecture(x.device))
    rank_tiles = triton.cdiv(width, tile.rank)
    programs = triton.cdiv(t, tile.rows) * rank_tiles
    count, per_part = tiles.splits(triton.cdiv(c, tile.cols), programs, lowrank.processors(x.device))
    out, parts = lowrank._buffers((t, width), dtype, x.device, count)
    shrink_kernel[(programs, count)](
        x, f1, f2, parts,
        t, c, r, rank_tiles, per_part,
        *x.stride(), *f1.stride(), *f2.stride(), t * width, width,
        scale,
        **_sizes(tile, P), DOT=lowrank._TL[dtype], num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(parts, out, count)
    return out


def _expand(
    z: Tensor, u: Tensor, f1: Tensor, f2: Tensor, scale: float, bias: Tensor | None, fresh: bool
) -> None:
    """z += scale * u F^T in place; fresh: z = scale * u F^T + bias whatever z held. Products in u's dtype."""
    t, (c, r), (P, width) = z.shape[0], f1.shape, _check(f1, f2)
    lowrank._check_shapes((t, c), z=z)
    lowrank._check_shapes((t, width), u=u)
    lowrank._check_shapes((c,), bias=bias)
    if z.numel() == 0:
        return
    tile = tiles.hadamard("expand", P, max(z.itemsize, u.itemsize), lowrank.architecture(z.device))
    col_tiles = triton.cdiv(c, tile.cols)
    expand_kernel[(triton.cdiv(t, tile.rows) * col_tiles,)](
        z, u, f1, f2, z if bias is None else bias,
        t, c, r, col_tiles,
        *z.stride(), width, *f1.stride(), *f2.stride(),
        scale,
        **_sizes(tile, P), RANK_TILES=triton.cdiv(width, tile.rank), DOT=lowrank._TL[u.dtype],
        FRESH=fresh, HAS_BIAS=bias is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _outer(
    x: Tensor, w: Tensor, f1: Tensor, f2: Tensor, scale: float, need_u: bool, need_1: bool, need_2: bool,
    transposed: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(u, g1, g2); g1 and g2 stored [r, c] if transposed, which f1 and f2 then are views of, else [c, r]."""
    t, (c, r), (P, width), device = x.shape[0], f1.shape, _check(f1, f2), x.device
    lowrank._check_shapes((t, c), x=x)
    lowrank._check_shapes((t, width), w=w)
    shape = (r, c) if transposed else (c, r)
    if t == 0 or c == 0:
        return (
            memory.zeros((t, width), x.dtype, device) if need_u else None,
            memory.zeros(shape, f1.dtype, device) if need_1 else None,
            memory.zeros(shape, f2.dtype, device) if need_2 else None,
        )
    dot = w.dtype
    tile = tiles.hadamard("outer", P, max(x.itemsize, dot.itemsize), lowrank.architecture(device), need_u)
    col_tiles, rank_tiles = triton.cdiv(c, tile.cols), triton.cdiv(width, tile.rank)
    programs = col_tiles * rank_tiles
    count, per_part = tiles.splits(triton.cdiv(t, tile.rows), programs, lowrank.processors(device))
    u, u_parts = lowrank._buffers((t, width), dot, device, col_tiles) if need_u else (None, x)
    g1, g1_parts = lowrank._buffers(shape, f1.dtype, device, count) if need_1 else (None, x)
    g2, g2_parts = lowrank._buffers(shape, f2.dtype, device, count * rank_tiles) if need_2 else (None, x)
    outer_kernel[(programs, count)](
        x, w, f1, f2, u_parts, g1_parts, g2_parts,
        t, c, r, rank_tiles, per_part,
        *x.stride(), width, *f1.stride(), *f2.stride(), t * width, width, *((1, c) if transposed else (r, 1)),
        scale,
        **_sizes(tile, P), DOT=lowrank._TL[dot], NEED_U=need_u, NEED_1=need_1, NEED_2=need_2,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(u_parts, u, col_tiles)
    lowrank._sum(g1_parts, g1, count)
    lowrank._sum(g2_parts, g2, count * rank_tiles)
    return u, g1, g2


def _sizes(tile: Any, P: int) -> dict[str, int]:
    return dict(BT=tile.rows, BC=tile.cols, RI=tile.rank // P, P=P)


def _check(f1: Tensor, f2: Tensor) -> tuple[int, int]:
    """(P, columns of u) for factors of one shape [c, r]; ValueError for other shapes and for ranks that no tile takes."""
    c, r = f1.shape
    lowrank._check_shapes((c, r), factor=f2)
    if not 1 <= r <= tiles.HADAMARD_RANK:
        raise ValueError(
            f"Hadamard kernels: the factors have rank {r}; Triton takes 1 to {tiles.HADAMARD_RANK}, whose product has rank r*r; "
            "use impl='torch'."
        )
    P = tiles.hadamard_width(r)
    return P, r * P
