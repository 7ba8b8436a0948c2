"""The low-rank family in Triton: three kernels, one sum of partial results, and their launchers.

    shrink   u = s * drop(x) F              down: F = A^T        du: F = B
    expand   z += s * mask * (u F)          up_add: F = B^T      dx_add: F = A       and y = gain * z + bias in the same pass
             z = s * mask * (u F) + bias    up                  dx             a fresh z, onto which a GEMM may add
    outer    G = s * drop(x)^T w            dA, dB               and du, dz = gain * dy, dgain in the same pass over dy

Letters: n blocks, each of c columns and rank r; x, z [t, n * c] and u, w [t, n * r] with any strides, F [n, c, r] read in
place through its strides. A column tile and a rank tile lie within one block: a program does the work of one block only.

Sums over columns (u) or tokens (G) that are split over programs go to an fp32 buffer and are added in a fixed order:
no atomics, equal bits on every run. Row offsets are 64-bit. Products are in DOT, sums in fp32.
"""

from __future__ import annotations

import functools
import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# by the package's own name: the plain name `triton_kernels` belongs to another project
memory = importlib.import_module(f"{__package__}.memory")
tiles = importlib.import_module(f"{__package__}.tiles")
keep = importlib.import_module(f"{__package__}.philox").keep

_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# sizes that change from batch to batch, or from one dropout rate to the next, must not compile the kernel again
_CHANGING = ["t", "per_part", "threshold"]


@triton.jit(do_not_specialize=_CHANGING)
def shrink_kernel(
    x, f, out, seed,
    t, c, r, groups, per_part,
    sx_t, sx_c, sf_n, sf_c, sf_r, so_s, so_t,
    scale, threshold,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """out[split] [t, n * r] = scale * (mask * x) F over the column tiles of this split.

    groups: rank tiles of all blocks. per_part: column tiles of a split. Grid: (token tiles * groups, splits).
    """
    pid = tl.program_id(0)
    group = pid % groups
    rank_tiles = tl.cdiv(r, BR)
    block = group // rank_tiles
    rows = (pid // groups).to(tl.int64) * BT + tl.arange(0, BT)
    ranks = (group % rank_tiles) * BR + tl.arange(0, BR)
    base = block * c
    # eight columns share one counter: tiles start at a multiple of 8, even in a block that does not
    first = base // 8 * 8 if HAS_DROPOUT else base
    # tiles times BC, not a number of columns: the compiler sees the alignment that wide loads need
    first += tl.program_id(1) * per_part * BC
    if HAS_DROPOUT:
        key = tl.load(seed)
    acc = tl.zeros([BT, BR], tl.float32)
    for start in range(first, min(first + per_part * BC, base + c), BC):
        cols = start + tl.arange(0, BC)
        inside = cols < base + c
        if HAS_DROPOUT:
            inside &= cols >= base
        wide = cols.to(tl.int64)
        a = tl.load(
            x + rows[:, None] * sx_t + wide[None, :] * sx_c, (rows < t)[:, None] & inside[None, :], 0.0
        ).to(DOT)
        b = tl.load(
            f
            + block.to(tl.int64) * sf_n
            + (wide - base)[:, None] * sf_c
            + ranks.to(tl.int64)[None, :] * sf_r,
            inside[:, None] & (ranks < r)[None, :],
            0.0,
        ).to(DOT)
        if HAS_DROPOUT:
            # a product, not a select: NaN and Inf times 0 are NaN
            a = a * keep(key, rows, start, threshold, BT, BC, DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    out += tl.program_id(1).to(tl.int64) * so_s
    at = out + rows[:, None] * so_t + (block * r + ranks).to(tl.int64)[None, :]
    tl.store(at, (acc * scale).to(out.dtype.element_ty), (rows < t)[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=["t", "threshold"])
def expand_kernel(
    z, u, f, y, gain, bias, seed,
    t, c, r, col_tiles, per_block,
    sz_t, sz_c, su_t, su_r, sf_n, sf_c, sf_r, sy_t,
    scale, threshold,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, RANK_TILES: tl.constexpr, DOT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """z [t, n * c] += scale * mask * (u F^T) in place; with HAS_GAIN also y = gain * z + bias.

    With FRESH, which excludes HAS_GAIN, z = scale * mask * (u F^T) + bias and what z held is not read.
    per_block: column tiles of one block, col_tiles: of all. Grid: (token tiles * col_tiles).
    """
    pid = tl.program_id(0)
    tile = pid % col_tiles
    block = tile // per_block
    rows = (pid // col_tiles).to(tl.int64) * BT + tl.arange(0, BT)
    base = block * c
    first = (base // 8 * 8 if HAS_DROPOUT else base) + (tile % per_block) * BC
    cols = first + tl.arange(0, BC)
    wide = cols.to(tl.int64)
    inside = cols < base + c
    if HAS_DROPOUT:
        inside &= cols >= base
    acc = tl.zeros([BT, BC], tl.float32)
    for step in range(RANK_TILES):
        ranks = step * BR + tl.arange(0, BR)
        a = tl.load(
            u + rows[:, None] * su_t + (block * r + ranks).to(tl.int64)[None, :] * su_r,
            (rows < t)[:, None] & (ranks < r)[None, :],
            0.0,
        ).to(DOT)
        b = tl.load(
            f
            + block.to(tl.int64) * sf_n
            + ranks.to(tl.int64)[:, None] * sf_r
            + (wide - base)[None, :] * sf_c,
            (ranks < r)[:, None] & inside[None, :],
            0.0,
        ).to(DOT)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_DROPOUT:
        acc *= keep(tl.load(seed), rows, first, threshold, BT, BC, tl.float32)
    mask = (rows < t)[:, None] & inside[None, :]
    at = z + rows[:, None] * sz_t + wide[None, :] * sz_c
    total = acc * scale
    if not FRESH:
        total += tl.load(at, mask, 0.0).to(tl.float32)
    elif HAS_BIAS:
        total += tl.load(bias + cols, inside, 0.0).to(tl.float32)[None, :]
    tl.store(at, total.to(z.dtype.element_ty), mask)
    if HAS_GAIN:
        total *= tl.load(gain + cols, inside, 0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + cols, inside, 0.0).to(tl.float32)[None, :]
        tl.store(y + rows[:, None] * sy_t + wide[None, :], total.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_CHANGING)
def outer_kernel(
    x, w, f, z, gain, u, g, dz, dgain, seed,
    t, c, r, per_block, columns, per_part,
    sx_t, sx_c, sw_t, sw_r, sf_n, sf_c, sf_r, sz_t, sz_c, su_s, su_t, sg_s, sg_n, sg_c, sg_r, sdz_t,
    scale, threshold,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_GAIN: tl.constexpr, NEED_U: tl.constexpr, NEED_G: tl.constexpr, NEED_DGAIN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over the tokens of a split: g[split] [n, c, r] = scale * (mask * x)^T w; per column tile u = scale * x F.

    With HAS_GAIN x is dy: dz = gain * dy is stored and stands for x above, and dgain[split] [columns] = sum of dy * z.
    Grid: (column tiles of all blocks * rank tiles, splits). Only the first rank tile writes dz and dgain.
    """
    rank_tiles = tl.cdiv(r, BR)
    tile = tl.program_id(0) // rank_tiles
    rank_tile = tl.program_id(0) % rank_tiles
    split = tl.program_id(1)
    block = tile // per_block
    part = tile % per_block
    base = block * c
    first = (base // 8 * 8 if HAS_DROPOUT else base) + part * BC
    cols = first + tl.arange(0, BC)
    wide = cols.to(tl.int64)
    inside = cols < base + c
    if HAS_DROPOUT:
        inside &= cols >= base
    ranks = rank_tile * BR + tl.arange(0, BR)
    in_rank = ranks < r
    # as a bound on rows: a condition on columns would split the wide loads
    lead = t if rank_tile == 0 else 0
    if HAS_DROPOUT:
        key = tl.load(seed)
    if HAS_GAIN:
        factor = tl.load(gain + cols, inside, 0.0).to(tl.float32)
    if NEED_DGAIN:
        dgain_acc = tl.zeros([BC], tl.float32)
    if NEED_G:
        g_acc = tl.zeros([BC, BR], tl.float32)
    if NEED_U:
        b = tl.load(
            f
            + block.to(tl.int64) * sf_n
            + (wide - base)[:, None] * sf_c
            + ranks.to(tl.int64)[None, :] * sf_r,
            inside[:, None] & in_rank[None, :],
            0.0,
        ).to(DOT)
        u += part.to(tl.int64) * su_s
    # tl.range: with stages of its own the loop also prefetches what no product reads, dy and z
    for start in tl.range(split * per_part * BT, min((split + 1) * per_part * BT, t), BT, num_stages=STAGES):
        rows = (start + tl.arange(0, BT)).to(tl.int64)
        mask = (rows < t)[:, None] & inside[None, :]
        a = tl.load(x + rows[:, None] * sx_t + wide[None, :] * sx_c, mask, 0.0)
        if NEED_DGAIN:
            zt = tl.load(
                z + rows[:, None] * sz_t + wide[None, :] * sz_c, (rows < lead)[:, None] & inside[None, :], 0.0
            )
            dgain_acc += tl.sum(a.to(tl.float32) * zt.to(tl.float32), 0)
        if HAS_GAIN:
            a = (a.to(tl.float32) * factor[None, :]).to(dz.dtype.element_ty)
            tl.store(dz + rows[:, None] * sdz_t + wide[None, :], a, (rows < lead)[:, None] & inside[None, :])
        a = a.to(DOT)
        if HAS_DROPOUT:
            a = a * keep(key, rows, first, threshold, BT, BC, DOT)
        if NEED_G:
            wt = tl.load(
                w + rows[:, None] * sw_t + (block * r + ranks).to(tl.int64)[None, :] * sw_r,
                (rows < t)[:, None] & in_rank[None, :],
                0.0,
            ).to(DOT)
            g_acc = tl.dot(tl.trans(a), wt, g_acc, input_precision="ieee")
        if NEED_U:
            ut = tl.dot(a, b, input_precision="ieee") * scale
            at = u + rows[:, None] * su_t + (block * r + ranks).to(tl.int64)[None, :]
            tl.store(at, ut.to(u.dtype.element_ty), (rows < t)[:, None] & in_rank[None, :])
    if NEED_G:
        g += split.to(tl.int64) * sg_s + block.to(tl.int64) * sg_n
        at = g + (wide - base)[:, None] * sg_c + ranks.to(tl.int64)[None, :] * sg_r
        tl.store(at, (g_acc * scale).to(g.dtype.element_ty), inside[:, None] & in_rank[None, :])
    if NEED_DGAIN:
        at = dgain + split.to(tl.int64) * columns + cols
        tl.store(
            at, dgain_acc.to(dgain.dtype.element_ty), inside & (cols < (base + c if rank_tile == 0 else base))
        )


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts, out, count, size, BLOCK: tl.constexpr):
    """out [size] = sum of parts [count, size] in fp32, in the order of the parts. Grid: (blocks of `size`)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    step = at
    for _ in range(count):
        acc += tl.load(parts + step, at < size, 0.0)
        step += size
    tl.store(out + at, acc.to(out.dtype.element_ty), at < size)


KERNELS = (shrink_kernel, expand_kernel, outer_kernel, sum_kernel)
SUM_BLOCK = 512


def down(x: Tensor, A: Tensor, dtype: torch.dtype, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """u = drop(x) A^T [t, n * r] in `dtype`; x [t, i], A [r, i] or [n, r, i / n]."""
    f = _blocked(A)
    return _shrink(x, f.transpose(1, 2), dtype, _inverse(p), seed, p)


def up(v: Tensor, B: Tensor, scale: float, blocks: int, bias: Tensor | None) -> Tensor:
    """A fresh z = scale * v B^T + bias [t, o] in v's dtype; v [t, n * r], B [o, r] or [n, o / n, r], bias [o]."""
    return _fresh(v, _blocked(B), scale, None, 0.0, _contiguous(bias))


def up_add(z: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int) -> None:
    """z += scale * v B^T in place; z [t, o], v [t, n * r], B [o, r] or [n, o / n, r]."""
    _expand(z, v, _blocked(B), z.dtype, scale, None, 0.0, None, None)


def up_add_gain(
    z: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int, gain: Tensor, bias: Tensor | None
) -> Tensor:
    """z += scale * v B^T in place and a fresh y = gain * z + bias [t, o] in z's dtype; gain, bias [o]."""
    y = memory.empty(tuple(z.shape), z.dtype, z.device)
    _expand(
        z,
        v,
        _blocked(B),
        z.dtype,
        scale,
        None,
        0.0,
        (gain.contiguous(), y),
        _contiguous(bias),
    )
    return y


def dx(du: Tensor, A: Tensor, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """A fresh dx = mask * (du A) [t, i] in du's dtype; du [t, n * r], A [r, i] or [n, r, i / n]."""
    return _fresh(du, _blocked(A).transpose(1, 2), _inverse(p), seed, p, None)


def dx_add(dx: Tensor, du: Tensor, A: Tensor, seed: Tensor | None, p: float, blocks: int) -> None:
    """dx += mask * (du A) in place; dx [t, i], du [t, n * r], A [r, i] or [n, r, i / n]."""
    _expand(dx, du, _blocked(A).transpose(1, 2), du.dtype, _inverse(p), seed, p, None, None)


def du_db(
    dz: Tensor, v: Tensor | None, B: Tensor, scale: float, blocks: int, need_du: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """du = scale * dz B in dz's dtype and dB = scale * dz^T v in B's, each only if needed; one pass over dz [t, o]."""
    if not need_db:
        return (_shrink(dz, _blocked(B), dz.dtype, scale, None, 0.0) if need_du else None), None
    _, du, dB, _ = _outer(dz, v, _blocked(B), scale, dz.dtype, B, need_u=need_du)
    return du, dB


def du_db_gain(
    dy: Tensor, z: Tensor | None, v: Tensor | None, B: Tensor, scale: float, blocks: int, gain: Tensor,
    need_du: bool, need_db: bool, need_dgain: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dz = gain * dy, du and dB of that dz, dgain = sum over t of dy * z in gain's dtype; one pass over dy and z [t, o]."""
    like = B if need_db else None
    dz, du, dB, dgain = _outer(
        dy, v, _blocked(B), scale, dy.dtype, like, need_u=need_du, gain=gain, z=z if need_dgain else None
    )
    assert dz is not None
    return dz, du, dB, dgain


def da(x: Tensor, du: Tensor, A: Tensor, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """dA = du^T drop(x) of A's shape and dtype; x [t, i], du [t, n * r]."""
    _, _, dA, _ = _outer(
        x, du, _blocked(A).transpose(1, 2), _inverse(p), du.dtype, A, seed=seed, p=p, transposed=True
    )
    assert dA is not None
    return dA


def _shrink(x: Tensor, f: Tensor, dtype: torch.dtype, scale: float, seed: Tensor | None, p: float) -> Tensor:
    """scale * drop(x) F [t, n * r]; f [n, c, r]."""
    t, (n, c, r) = x.shape[0], f.shape
    _check_shapes((t, n * c), x=x)
    if t == 0:
        return memory.zeros((t, n * r), dtype, x.device)
    tile = tiles.shrink(r, max(x.itemsize, dtype.itemsize), architecture(x.device))
    groups = n * triton.cdiv(r, tile.rank)
    token_tiles = triton.cdiv(t, tile.rows)
    count, per_part = tiles.splits(_col_tiles(c, tile.cols, p), token_tiles * groups, processors(x.device))
    out = memory.empty((t, n * r), dtype, x.device)
    parts = out if count == 1 else memory.empty((count, t, n * r), torch.float32, x.device)
    shrink_kernel[(token_tiles * groups, count)](
        x, f, parts, x if seed is None else seed,
        t, c, r, groups, per_part,
        *x.stride(), *f.stride(), t * n * r, n * r,
        scale, _threshold(p),
        BT=tile.rows, BC=tile.cols, BR=tile.rank, DOT=_TL[dtype], HAS_DROPOUT=p > 0.0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _sum(parts, out, count)
    return out


def _fresh(u: Tensor, f: Tensor, scale: float, seed: Tensor | None, p: float, bias: Tensor | None) -> Tensor:
    """scale * mask * (u F^T) + bias [t, n * c] in u's dtype; f [n, c, r]."""
    z = memory.empty((u.shape[0], f.shape[0] * f.shape[1]), u.dtype, u.device)
    _expand(z, u, f, u.dtype, scale, seed, p, None, bias, fresh=True)
    return z


def _expand(
    z: Tensor, u: Tensor, f: Tensor, dot: torch.dtype, scale: float, seed: Tensor | None, p: float,
    gained: tuple[Tensor, Tensor] | None, bias: Tensor | None, fresh: bool = False,
) -> None:  # fmt: skip
    """z += scale * mask * (u F^T) in place; f [n, c, r]; gained: (gain, y) where y = gain * z + bias is wanted.

    fresh: z = scale * mask * (u F^T) + bias whatever z held.
    """
    t, (n, c, r) = z.shape[0], f.shape
    gain, y = gained or (None, z)
    _check_shapes((t, n * c), z=z)
    _check_shapes((t, n * r), u=u)
    _check_shapes((n * c,), gain=gain, bias=bias)
    if t == 0:
        return
    tile = tiles.expand(r, max(z.itemsize, dot.itemsize), architecture(z.device))
    per_block = _col_tiles(c, tile.cols, p)
    # what a flag turns off still needs a pointer; z stands in
    of = lambda tensor: z if tensor is None else tensor  # noqa: E731
    expand_kernel[(triton.cdiv(t, tile.rows) * n * per_block,)](
        z, u, f, y, of(gain), of(bias), of(seed),
        t, c, r, n * per_block, per_block,
        *z.stride(), *u.stride(), *f.stride(), y.stride(0),
        scale, _threshold(p),
        BT=tile.rows, BC=tile.cols, BR=tile.rank, RANK_TILES=triton.cdiv(r, tile.rank), DOT=_TL[dot],
        HAS_DROPOUT=p > 0.0, HAS_GAIN=gained is not None, HAS_BIAS=bias is not None, FRESH=fresh,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _outer(
    x: Tensor, w: Tensor | None, f: Tensor, scale: float, dot: torch.dtype, like: Tensor | None, *,
    need_u: bool = False, gain: Tensor | None = None, z: Tensor | None = None,
    seed: Tensor | None = None, p: float = 0.0, transposed: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dz, u, G, dgain): G of `like`'s shape and dtype where `like` is given, stored [n, r, c] if transposed else [n, c, r].

    f [n, c, r] gives the sizes, and its values where u is needed; dgain where z is given.
    """
    t, (n, c, r), device = x.shape[0], f.shape, x.device
    shape = None if like is None else (tuple(like.shape), like.dtype)
    _check_shapes((t, n * c), x=x, z=z)
    _check_shapes((t, n * r), w=w)
    _check_shapes((n * c,), gain=gain)
    if t == 0:
        return (
            None if gain is None else memory.zeros((0, n * c), x.dtype, device),
            memory.zeros((0, n * r), dot, device) if need_u else None,
            None if shape is None else memory.zeros(*shape, device),
            None if z is None or gain is None else memory.zeros((n * c,), gain.dtype, device),
        )
    tile = tiles.outer(r, max(x.itemsize, dot.itemsize), architecture(device), need_u, gain is not None)
    per_block = _col_tiles(c, tile.cols, p)
    programs = n * per_block * triton.cdiv(r, tile.rank)
    count, per_part = tiles.splits(triton.cdiv(t, tile.rows), programs, processors(device))

    dz = None if gain is None else memory.empty((t, n * c), x.dtype, device)
    u, u_parts = _buffers((t, n * r), dot, device, per_block) if need_u else (None, None)
    g, g_parts = (None, None) if shape is None else _buffers(*shape, device, count)
    dgain, dgain_parts = (
        (None, None) if z is None or gain is None else _buffers((n * c,), gain.dtype, device, count)
    )
    # what a flag turns off still needs a pointer and strides; x stands in
    of = lambda tensor: x if tensor is None else tensor  # noqa: E731
    sg_r, sg_c = (c, 1) if transposed else (1, r)
    outer_kernel[(programs, count)](
        x, of(w), f, of(z), x if gain is None else gain.contiguous(),
        of(u_parts), of(g_parts), of(dz), of(dgain_parts), of(seed),
        t, c, r, per_block, n * c, per_part,
        *x.stride(), *of(w).stride(), *f.stride(), *of(z).stride(),
        t * n * r, n * r, n * c * r, c * r, sg_c, sg_r, n * c,
        scale, _threshold(p),
        BT=tile.rows, BC=tile.cols, BR=tile.rank, DOT=_TL[dot], HAS_DROPOUT=p > 0.0,
        HAS_GAIN=gain is not None, NEED_U=need_u, NEED_G=g is not None, NEED_DGAIN=dgain is not None,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _sum(u_parts, u, per_block)
    _sum(g_parts, g, count)
    _sum(dgain_parts, dgain, count)
    return dz, u, g, dgain


def _buffers(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int
) -> tuple[Tensor, Tensor]:
    """The result and what the kernel writes: the result itself, or `count` fp32 parts of it."""
    out = memory.empty(shape, dtype, device)
    return out, out if count == 1 else memory.empty((count, *shape), torch.float32, device)


def _sum(parts: Tensor | None, out: Tensor | None, count: int) -> None:
    """out = sum of its `count` parts in order; nothing to do without a result or where the kernel wrote it itself."""
    if out is not None and count > 1:
        size = out.numel()
        sum_kernel[(triton.cdiv(size, SUM_BLOCK),)](
            parts, out, count, size, BLOCK=SUM_BLOCK, num_warps=4, num_stages=1
        )


def _check_shapes(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Kernels trust the sizes that they are given: a wrong one would read another tensor's memory."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"Triton kernel: {name} has shape {tuple(tensor.shape)}, the factors ask for {shape}."
            )


def _blocked(factor: Tensor) -> Tensor:
    """[n, rows, cols] of a factor that may lack the block dimension; a view."""
    return factor if factor.dim() == 3 else factor[None]


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _col_tiles(c: int, cols: int, p: float) -> int:
    """Column tiles of one block; under dropout a block may begin up to seven columns inside its first tile."""
    return triton.cdiv(c + (7 if p > 0.0 and c % 8 else 0), cols)


def _threshold(p: float) -> int:
    return min(65536, max(0, round(p * 65536)))


def _inverse(p: float) -> float:
    return 1.0 / (1.0 - p)


@functools.cache
def _cuda(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    arch = "hip" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return arch, properties.multi_processor_count


def architecture(device: torch.device) -> str:
    """What tiles.py calls the device; sm_90 where no device is (the compile gate and the interpreter)."""
    return _cuda(device.index or 0)[0] if device.type == "cuda" else "sm_90"


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 132, an H100's, where no device is."""
    return _cuda(device.index or 0)[1] if device.type == "cuda" else 132
