"""The Kronecker family in Triton: x (C o D)^T and its gradients; neither C o D nor the middle is ever in memory.

    apply    y (+)= s * C (x D^T) + bias    fresh, add; dx: the same with C^T, D^T on dz
    left     dC = s * dz (x D^T)^T          one program per tile of C
    right    dD = s * (C^T dz)^T x          one program per tile of D; also dC, where C and a row of D are a tile each

Letters: C [a, c], D [b, d], x [t, c * d], y and dz [t, a * b], any strides. D meets x first: H [t, c, b] = x D^T, or
E [t, c, b] = C^T dz, is as wide as x or y and stays on chip.

A tile of H has the rows (block j, token), which is a product with D, and read as [j, (token, k)] without moving anything
also the right operand of the product with C. Where c is below the 16 that a tensor core wants, GROUP tokens join: rows
(j, g) against C o I_GROUP, so that no row of the larger product with D is wasted. y and dz are tiles [(i, g), (token, k)].

Sums over tokens that are split over programs go to an fp32 buffer and are added in a fixed order: no atomics, equal bits
on every run. Offsets are 64-bit. Products are in DOT, sums in fp32; H and E are rounded to DOT, as PyTorch does.
"""

from __future__ import annotations

import importlib
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

lowrank = importlib.import_module(f"{__package__}.lowrank")
memory = lowrank.memory
tiles = lowrank.tiles


@triton.jit
def load_x(
    x, t, c, d, sx_t, sx_c, token, j, l, BT: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """x [(j, token), l]: [BJ * BT, BL] from those firsts on."""
    row = tl.arange(0, BJ * BT)
    tokens = (token + row % BT).to(tl.int64)
    blocks = (j + row // BT).to(tl.int64)
    cols = (l + tl.arange(0, BL)).to(tl.int64)
    at = (tokens * sx_t + blocks * d * sx_c)[:, None] + (cols * sx_c)[None, :]
    return tl.load(x + at, ((tokens < t) & (blocks < c))[:, None] & (cols < d)[None, :], 0.0).to(DOT)


@triton.jit
def load_right(
    right, b, d, s_k, s_l, k, l, BK: tl.constexpr, BL: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """D^T [l, k]: [BL, BK]."""
    rows = (l + tl.arange(0, BL)).to(tl.int64)
    cols = (k + tl.arange(0, BK)).to(tl.int64)
    at = (rows * s_l)[:, None] + (cols * s_k)[None, :]
    return tl.load(right + at, (rows < d)[:, None] & (cols < b)[None, :], 0.0).to(DOT)


@triton.jit
def load_left(
    left, a, c, s_i, s_j, i, j, BI: tl.constexpr, BJ: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """C o I_GROUP: [BI * GROUP, BJ * GROUP]."""
    row, col = tl.arange(0, BI * GROUP), tl.arange(0, BJ * GROUP)
    rows, cols = (i + row // GROUP).to(tl.int64), (j + col // GROUP).to(tl.int64)
    mask = (rows < a)[:, None] & (cols < c)[None, :]
    if GROUP > 1:
        mask &= (row % GROUP)[:, None] == (col % GROUP)[None, :]
    return tl.load(left + (rows * s_i)[:, None] + (cols * s_j)[None, :], mask, 0.0).to(DOT)


@triton.jit
def place(
    t, a, b, s_t, s_c, token, i, k, BT: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Offsets and mask of y or dz [(i, g), (token, k)]: [BI * GROUP, BT / GROUP * BK]."""
    PER: tl.constexpr = BT // GROUP
    row, col = tl.arange(0, BI * GROUP), tl.arange(0, PER * BK)
    blocks, cols = (i + row // GROUP).to(tl.int64), (k + col % BK).to(tl.int64)
    tokens = (token + col // BK).to(tl.int64)
    mask = (blocks < a)[:, None] & ((cols < b) & (tokens < t))[None, :]
    at = (blocks * b * s_c)[:, None] + (tokens * s_t + cols * s_c)[None, :]
    if GROUP > 1:
        later = (row % GROUP).to(tl.int64) * PER
        mask &= tokens[None, :] + later[:, None] < t
        at += (later * s_t)[:, None]
    return at, mask


@triton.jit
def middle(
    x, right, held, t, c, b, d, sx_t, sx_c, s_k, s_l, token, j, k,
    BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, GROUP: tl.constexpr,
    L_TILES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """H [(j, g), (token, k)]; `held` is D^T where that is one tile."""
    if L_TILES == 1:
        h = tl.dot(load_x(x, t, c, d, sx_t, sx_c, token, j, 0, BT, BJ, BL, DOT), held, input_precision="ieee")
    else:
        h = tl.zeros([BJ * BT, BK], tl.float32)
        for step in range(L_TILES):
            h = tl.dot(
                load_x(x, t, c, d, sx_t, sx_c, token, j, step * BL, BT, BJ, BL, DOT),
                load_right(right, b, d, s_k, s_l, k, step * BL, BK, BL, DOT),
                h,
                input_precision="ieee",
            )
    return tl.reshape(h.to(DOT), [BJ * GROUP, BT // GROUP * BK])


@triton.jit(do_not_specialize=["t"])
def apply_kernel(
    y, x, left, right, bias,
    t, a, b, c, d, k_tiles, all_tiles,
    sy_t, sy_c, sx_t, sx_c, sl_i, sl_j, sr_k, sr_l,
    scale,
    BT: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    GROUP: tl.constexpr, J_TILES: tl.constexpr, L_TILES: tl.constexpr, DOT: tl.constexpr,
    FRESH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y [t, a * b] += scale * x (C o D)^T; with FRESH y = that + bias whatever y held.

    Grid: (token tiles * tiles of a * tiles of b); programs that read the same x follow one another.
    """
    pid = tl.program_id(0)
    token = (pid // all_tiles).to(tl.int64) * BT
    i = pid % all_tiles // k_tiles * BI
    k = pid % all_tiles % k_tiles * BK
    acc = tl.zeros([BI * GROUP, BT // GROUP * BK], tl.float32)
    held = load_right(right, b, d, sr_k, sr_l, k, 0, BK, BL, DOT)
    for step in range(J_TILES):
        j = step * BJ
        h = middle(
            x, right, held, t, c, b, d, sx_t, sx_c, sr_k, sr_l, token, j, k, BT, BJ, BK, BL, GROUP, L_TILES, DOT
        )  # fmt: skip
        acc = tl.dot(
            load_left(left, a, c, sl_i, sl_j, i, j, BI, BJ, GROUP, DOT), h, acc, input_precision="ieee"
        )
    at, mask = place(t, a, b, sy_t, sy_c, token, i, k, BT, BI, BK, GROUP)
    total = acc * scale
    if not FRESH:
        total += tl.load(y + at, mask, 0.0).to(tl.float32)
    elif HAS_BIAS:
        blocks = (i + tl.arange(0, BI * GROUP) // GROUP).to(tl.int64)
        cols = (k + tl.arange(0, BT // GROUP * BK) % BK).to(tl.int64)
        inside = (blocks < a)[:, None] & (cols < b)[None, :]
        total += tl.load(bias + (blocks * b)[:, None] + cols[None, :], inside, 0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask)


@triton.jit
def store_left(
    g, acc, a, c, i, j, scale, BI: tl.constexpr, BJ: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """g [a, c] = scale * the sum over g of acc [(i, g), (j, g)]; between different tokens acc means nothing."""
    if GROUP > 1:
        row, col = tl.arange(0, BI * GROUP) % GROUP, tl.arange(0, BJ * GROUP) % GROUP
        acc = tl.where(row[:, None] == col[None, :], acc, 0.0)
        acc = tl.sum(tl.sum(tl.reshape(acc, [BI, GROUP, BJ, GROUP]), 3), 1)
    rows, cols = (i + tl.arange(0, BI)).to(tl.int64), (j + tl.arange(0, BJ)).to(tl.int64)
    at = g + (rows * c)[:, None] + cols[None, :]
    tl.store(at, (acc * scale).to(g.dtype.element_ty), (rows < a)[:, None] & (cols < c)[None, :])


@triton.jit(do_not_specialize=["t", "per_part"])
def left_kernel(
    g, dz, x, right,
    t, a, b, c, d, j_tiles, per_part,
    sz_t, sz_c, sx_t, sx_c, sr_k, sr_l,
    scale,
    BT: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    GROUP: tl.constexpr, K_TILES: tl.constexpr, L_TILES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """g[split] [a, c] = scale * the sum over tokens of this split and over k of dz H. Grid: (tiles of C, splits)."""
    i = tl.program_id(0) // j_tiles * BI
    j = tl.program_id(0) % j_tiles * BJ
    split = tl.program_id(1)
    acc = tl.zeros([BI * GROUP, BJ * GROUP], tl.float32)
    for token in range(split * per_part * BT, min((split + 1) * per_part * BT, t), BT):
        for step in range(K_TILES):
            k = step * BK
            held = load_right(right, b, d, sr_k, sr_l, k, 0, BK, BL, DOT)
            h = middle(
                x, right, held, t, c, b, d, sx_t, sx_c, sr_k, sr_l, token, j, k, BT, BJ, BK, BL, GROUP, L_TILES, DOT
            )  # fmt: skip
            at, mask = place(t, a, b, sz_t, sz_c, token, i, k, BT, BI, BK, GROUP)
            z = tl.load(dz + at, mask, 0.0).to(DOT)
            acc = tl.dot(z, tl.trans(h), acc, input_precision="ieee")
    store_left(g + split.to(tl.int64) * a * c, acc, a, c, i, j, scale, BI, BJ, GROUP)


@triton.jit(do_not_specialize=["t", "per_part"])
def right_kernel(
    g, g_left, dz, x, left, right,
    t, a, b, c, d, l_tiles, k_tiles, per_part,
    sz_t, sz_c, sx_t, sx_c, sl_i, sl_j, sr_k, sr_l,
    scale,
    BT: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    GROUP: tl.constexpr, I_TILES: tl.constexpr, J_TILES: tl.constexpr, DOT: tl.constexpr,
    WITH_LEFT: tl.constexpr,
):  # fmt: skip
    """g[split] [b, d] = scale * the sum over tokens of this split and over j of E x. Grid: (tiles of D, splits).

    WITH_LEFT, which needs one tile for C and one for all d: also g_left[split, tile of b] [a, c] = scale * dz H.
    """
    k = tl.program_id(0) // l_tiles * BK
    l = tl.program_id(0) % l_tiles * BL
    split = tl.program_id(1)
    acc = tl.zeros([BK, BL], tl.float32)
    if WITH_LEFT:
        acc_left = tl.zeros([BI * GROUP, BJ * GROUP], tl.float32)
        held = load_right(right, b, d, sr_k, sr_l, k, 0, BK, BL, DOT)
    for token in range(split * per_part * BT, min((split + 1) * per_part * BT, t), BT):
        for step in range(J_TILES):
            j = step * BJ
            e = tl.zeros([BJ * GROUP, BT // GROUP * BK], tl.float32)
            for inner in range(I_TILES):
                i = inner * BI
                at, mask = place(t, a, b, sz_t, sz_c, token, i, k, BT, BI, BK, GROUP)
                z = tl.load(dz + at, mask, 0.0).to(DOT)
                w = load_left(left, c, a, sl_j, sl_i, j, i, BJ, BI, GROUP, DOT)
                e = tl.dot(w, z, e, input_precision="ieee")
            xt = load_x(x, t, c, d, sx_t, sx_c, token, j, l, BT, BJ, BL, DOT)
            acc = tl.dot(tl.trans(tl.reshape(e.to(DOT), [BJ * BT, BK])), xt, acc, input_precision="ieee")
            if WITH_LEFT:
                h = tl.dot(xt, held, input_precision="ieee").to(DOT)
                at, mask = place(t, a, b, sz_t, sz_c, token, 0, k, BT, BI, BK, GROUP)
                z = tl.load(dz + at, mask, 0.0).to(DOT)
                h = tl.reshape(h, [BJ * GROUP, BT // GROUP * BK])
                acc_left = tl.dot(z, tl.trans(h), acc_left, input_precision="ieee")
    rows, cols = (k + tl.arange(0, BK)).to(tl.int64), (l + tl.arange(0, BL)).to(tl.int64)
    at = g + split.to(tl.int64) * b * d + (rows * d)[:, None] + cols[None, :]
    tl.store(at, (acc * scale).to(g.dtype.element_ty), (rows < b)[:, None] & (cols < d)[None, :])
    if WITH_LEFT:
        part = split.to(tl.int64) * k_tiles + tl.program_id(0)
        store_left(g_left + part * a * c, acc_left, a, c, 0, 0, scale, BI, BJ, GROUP)


KERNELS = (apply_kernel, left_kernel, right_kernel)


def fresh(x: Tensor, C: Tensor, D: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """A fresh y = scale * x (C o D)^T + bias [t, a * b] in x's dtype; x [t, c * d], C [a, c], D [b, d], bias [a * b]."""
    y = memory.empty((x.shape[0], C.shape[0] * D.shape[0]), x.dtype, x.device)
    _apply(y, x, C, D, scale, None if bias is None else bias.contiguous(), True)
    return y


def add(y: Tensor, x: Tensor, C: Tensor, D: Tensor, scale: float) -> None:
    """y += scale * x (C o D)^T in place; products in y's dtype."""
    _apply(y, x, C, D, scale, None, False)


def _apply(
    y: Tensor, x: Tensor, C: Tensor, D: Tensor, scale: float, bias: Tensor | None, is_fresh: bool
) -> None:
    t, (a, c), (b, d) = x.shape[0], C.shape, D.shape
    lowrank._check_shapes((t, c * d), x=x)
    lowrank._check_shapes((t, a * b), y=y)
    lowrank._check_shapes((a * b,), bias=bias)
    if y.numel() == 0:
        return
    tile = tiles.kron(a, b, c, _aligned(b, d), max(x.itemsize, y.itemsize), lowrank.architecture(y.device))
    k_tiles = triton.cdiv(b, tile.b)
    all_tiles = triton.cdiv(a, tile.a) * k_tiles
    apply_kernel[(triton.cdiv(t, tile.rows) * all_tiles,)](
        y, x, C, D, y if bias is None else bias,
        t, a, b, c, d, k_tiles, all_tiles,
        *y.stride(), *x.stride(), *C.stride(), *D.stride(),
        scale,
        **_sizes(tile), J_TILES=triton.cdiv(c, tile.c), L_TILES=triton.cdiv(d, tile.d), DOT=lowrank._TL[y.dtype],
        FRESH=is_fresh, HAS_BIAS=bias is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def grads(
    dz: Tensor, x: Tensor, C: Tensor, D: Tensor, scale: float, need_c: bool, need_d: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dC and dD of their factors' shapes and dtypes, each only if needed; dz [t, a * b], x [t, c * d]; products in dz's dtype.

    One pass over dz and x where C and the rows of D are one tile each, else one pass each.
    """
    t, (a, c), (b, d), device = x.shape[0], C.shape, D.shape, x.device
    lowrank._check_shapes((t, c * d), x=x)
    lowrank._check_shapes((t, a * b), dz=dz)
    if t == 0 or dz.numel() == 0 or x.numel() == 0:
        return (
            memory.zeros((a, c), C.dtype, device) if need_c else None,
            memory.zeros((b, d), D.dtype, device) if need_d else None,
        )
    itemsize, arch = max(x.itemsize, dz.itemsize), lowrank.architecture(device)
    both = tiles.kron_both(a, b, c, d, _aligned(b, d), itemsize, arch) if need_c and need_d else None
    if both is not None:
        return _right(dz, x, C, D, scale, both, True)
    tile = tiles.kron_grads(a, b, c, _aligned(b, d), itemsize, arch)
    dC = _left(dz, x, C, D, scale, tile) if need_c else None
    return dC, _right(dz, x, C, D, scale, tile, False)[1] if need_d else None


def _left(dz: Tensor, x: Tensor, C: Tensor, D: Tensor, scale: float, tile: Any) -> Tensor:
    """dC by itself."""
    t, (a, c), (b, d), device = x.shape[0], C.shape, D.shape, x.device
    j_tiles = triton.cdiv(c, tile.c)
    programs = triton.cdiv(a, tile.a) * j_tiles
    count, per_part = tiles.splits(triton.cdiv(t, tile.rows), programs, lowrank.processors(device))
    out, parts = lowrank._buffers((a, c), C.dtype, device, count)
    left_kernel[(programs, count)](
        parts, dz, x, D,
        t, a, b, c, d, j_tiles, per_part,
        *dz.stride(), *x.stride(), *D.stride(),
        scale,
        **_sizes(tile), K_TILES=triton.cdiv(b, tile.b), L_TILES=triton.cdiv(d, tile.d), DOT=lowrank._TL[dz.dtype],
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(parts, out, count)
    return out


def _right(
    dz: Tensor, x: Tensor, C: Tensor, D: Tensor, scale: float, tile: Any, with_left: bool
) -> tuple[Tensor | None, Tensor]:
    """(dC if with_left, dD)."""
    t, (a, c), (b, d), device = x.shape[0], C.shape, D.shape, x.device
    l_tiles, k_tiles = triton.cdiv(d, tile.d), triton.cdiv(b, tile.b)
    count, per_part = tiles.splits(triton.cdiv(t, tile.rows), k_tiles * l_tiles, lowrank.processors(device))
    out, parts = lowrank._buffers((b, d), D.dtype, device, count)
    left, left_parts = (
        lowrank._buffers((a, c), C.dtype, device, count * k_tiles) if with_left else (None, parts)
    )
    right_kernel[(k_tiles * l_tiles, count)](
        parts, left_parts, dz, x, C, D,
        t, a, b, c, d, l_tiles, k_tiles, per_part,
        *dz.stride(), *x.stride(), *C.stride(), *D.stride(),
        scale,
        **_sizes(tile), I_TILES=triton.cdiv(a, tile.a), J_TILES=triton.cdiv(c, tile.c), DOT=lowrank._TL[dz.dtype],
        WITH_LEFT=with_left, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lowrank._sum(parts, out, count)
    lowrank._sum(left_parts, left, count * k_tiles)
    return left, out


def _aligned(b: int, d: int) -> bool:
    return b % 16 == 0 and d % 16 == 0


def _sizes(tile: Any) -> dict[str, int]:
    return dict(BT=tile.rows, BI=tile.a, BJ=tile.c, BK=tile.b, BL=tile.d, GROUP=tile.group)
