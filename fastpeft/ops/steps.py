"""The arithmetic of an adapted linear, in steps: write and its backward, write_back; read_back, the backward of the reads.

seam.Whole runs them back to back, seam.Down and seam.Up share them. `ops` is the family that computes the low-rank part:
fastpeft.ops.lowrank or .lowrank_triton; parts have families of their own (fastpeft.ops.parts).

The adapter's share is written first and the base product accumulates onto it, so nobody reads y twice: the frozen layer
spends the same pass on its bias. A family that is LATE hands dy on instead of dz = g * dy, and the gain meets W or one slab
of dy at a time; then no [tokens, out] tensor is formed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import gain as gain_ops
from fastpeft.ops.dropout import dropout, dropout_add_
from fastpeft.ops.parts import Part, changed, split
from fastpeft.ops.slabs import fewer

# numbers of y from which reading it twice costs more than the vendor's product saves by adding the bias itself
ONE_PASS = 1 << 15

Shares = Sequence[tuple[Part, Sequence[Tensor]]]


class Read(NamedTuple):
    """How one A reads x."""

    p: float
    blocks: int
    rows: bool


class Write(NamedTuple):
    """How one B writes y."""

    scale: float
    blocks: int


class Plan(NamedTuple):
    """What a call knows beside its tensors: one argument, because each argument of a Function costs time in both directions.

    dtype: y's.   gain_p: the gain's own dropout.   keep_x: whether x is saved.   keep: which u_i (of Whole) or v_i (of Up)
    are saved, then whether z is.
    """

    ops: Any
    base: Any
    dtype: torch.dtype
    gain_p: float
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    keep_x: bool
    keep: tuple[bool, ...]
    parts: tuple[Part, ...] = ()


def write(
    plan: Plan,
    x2: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    seed: Tensor | None,
    extra: Tensor | None,
    vs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    parts: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """y [tokens, out] and, with a gain, z: what the gain multiplies."""
    shares = split(plan.parts, parts)
    if not _onto_y(plan):
        return _write(plan, x2, bias, gain, seed, extra, vs, Bs, shares)
    y, z = _write(plan, x2, bias, gain, seed, extra, vs, Bs, ())
    for part, tensors in shares:
        part.ops.add(y, x2, tensors, part.scale)
    return y, z


def _onto_y(plan: Plan) -> bool:
    return len(plan.parts) > 0 and plan.parts[0].onto_y


def _write(plan: Plan, x2, bias, gain, seed, extra, vs, Bs, shares: Shares) -> tuple[Tensor, Tensor | None]:
    """write, of parts that are not added onto y."""
    base = plan.base
    if x2.dtype is not plan.dtype:
        x2 = x2.to(plan.dtype)
    if bias is not None and bias.dtype is not plan.dtype:
        bias = bias.to(plan.dtype)
    if gain is None:
        y = _sum(plan, x2, bias, vs, Bs, shares)
        return (y if extra is None else y.add_(extra)), None
    if plan.gain_p:
        y = base.forward(x2, bias)
        z = base.forward(dropout(x2, seed, plan.gain_p))
        y.sub_(z)
        for write, v, B in zip(plan.writes, vs, Bs, strict=True):
            plan.ops.up_add(z, v, B, write.scale, write.blocks)
        for part, tensors in shares:
            if not part.ops.ON_BASE:
                part.ops.add(z, x2, tensors, part.scale)
        gain_ops.add_scaled_rows_(y, z if extra is None else z.add_(extra), gain)
        return y, z
    if not plan.writes or extra is not None:
        z = _sum(plan, x2, None, vs, Bs, shares)
        return gain_ops.scale_rows(z if extra is None else z.add_(extra), gain, bias), z
    z = _sum(plan, x2, None, vs[:-1], Bs[:-1], shares)
    last = plan.writes[-1]
    return plan.ops.up_add_gain(z, vs[-1], Bs[-1], last.scale, last.blocks, gain, bias), z


def _sum(
    plan: Plan, x2: Tensor, bias: Tensor | None, vs: Sequence[Tensor], Bs: Sequence[Tensor], shares: Shares
) -> Tensor:
    """bias + sum of s v B^T + the parts + x W^T, of as many terms as there are v: the adapter's share first, the base product
    onto it."""
    own = [share for share in shares if not share[0].ops.ON_BASE]
    y: Tensor | None = None
    # (Dynamo cannot take `not` of a tuple)
    base_first = len(vs) + len(own) == 0
    if fewer(x2.shape[0] * plan.base.out_features, ONE_PASS):
        base_first = True
    if base_first:
        with changed(plan.base, shares) as base:
            y = base.forward(x2, bias)
    for k, v in enumerate(vs):
        scale, blocks = plan.writes[k]
        if y is None:
            y = plan.ops.up(v, Bs[k], scale, blocks, bias)
        else:
            plan.ops.up_add(y, v, Bs[k], scale, blocks)
    for part, tensors in own:
        if y is None:
            y = part.ops.fresh(x2, tensors, part.scale, bias)
        else:
            part.ops.add(y, x2, tensors, part.scale)
    assert y is not None
    if not base_first:
        with changed(plan.base, shares) as base:
            base.forward_onto(y, x2)
    return y


def write_back(
    plan: Plan,
    dy: Tensor,
    z: Tensor | None,
    gain: Tensor | None,
    vs: Sequence[Tensor | None],
    Bs: Sequence[Tensor],
    need_vs: Sequence[bool],
    need_bs: Sequence[bool],
    need_gain: bool,
    bias_dtype: torch.dtype | None,
    need_extra: bool,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], Tensor | None, Tensor | None, Tensor | None]:
    """What the base product's gradient starts from, dv_i, dB_i, dgain, dbias, dextra.

    The first is dz = g * dy; dy itself without a gain, with a LATE family, and with dropout in the gain, where read_back
    adds the dropped part.
    """
    ops, dy = plan.ops, flat(dy)
    dbias = None if bias_dtype is None else sum_rows(dy, bias_dtype)
    dvs: list[Tensor | None] = []
    dBs: list[Tensor | None] = []
    dz, dgain = dy, None
    scaled = gain is not None and not (ops.LATE or plan.gain_p)
    for k, write in enumerate(plan.writes):
        v, B, need_v, need_b = vs[k], Bs[k], need_vs[k], need_bs[k]
        if gain is None or (scaled and k):
            dv, dB = ops.du_db(dz, v, B, write.scale, write.blocks, need_du=need_v, need_db=need_b)
        else:
            first = need_gain and k == 0
            given, dv, dB, dg = ops.du_db_gain(
                dy, z if first else None, v, B, write.scale, write.blocks, gain,
                need_du=need_v, need_db=need_b, need_dgain=first,
            )  # fmt: skip
            dgain = dg if first else dgain
            dz = given if scaled else dz
        dvs.append(dv)
        dBs.append(dB)
    if gain is not None and not plan.writes:
        dgain = gain_ops.grad_gain(dy, z, gain.dtype) if need_gain else None
        dz = gain_ops.scale_rows(dy, gain) if scaled else dy
    dextra = None
    if need_extra:
        dextra = dz if gain is None or scaled else gain_ops.scale_rows(dy, gain)
    return dz, dvs, dBs, dgain, dbias, dextra


def read_back(
    ctx: Any,
    x: Tensor | None,
    dz: Tensor | None,
    gain: Tensor | None,
    seed: Tensor | None,
    dus: Sequence[Tensor | None],
    As: Sequence[Tensor],
    need_x: bool,
    need_w: bool,
    need_as: Sequence[bool],
    parts: Sequence[Tensor],
    need_parts: Sequence[bool],
    probes: tuple[Sequence[Tensor | None], Sequence[Tensor | None]] = ((), ()),
    dy: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx in x's shape and dtype, dW of a base weight that trains, dA_i, the gradients of the parts' tensors.

    probes: dp_i and the rows that p_i came through.   dy: what reaches parts that are added onto y.
    """
    plan = ctx.plan
    dropped = None
    dh = _scaled(plan, dz, gain) if plan.parts and dz is not None and dy is None else None
    if gain is not None and plan.gain_p:
        dropped = None if dz is None else gain_ops.scale_rows(dz, gain - 1)  # [t, o] what meets drop(x) W^T
        gain = None
    elif not plan.ops.LATE:
        gain = None
    x2 = None if x is None else flat(x)
    shares = split(plan.parts, parts)
    if dy is not None:
        dx = _dx(ctx, None, dz, gain, dropped, seed, dus, As, (), *probes) if need_x else None
        onto, dparts = _parts_back(plan, flat(dy), x2, shares, need_x, need_parts, None if dx is None else flat(dx))
        dx = None if dx is None or onto is None else onto.reshape(dx.shape)
    else:
        dx, dparts = _parts_back(plan, dh, x2, shares, need_x, need_parts)
        if need_x:
            dx = _dx(ctx, dx, dz, gain, dropped, seed, dus, As, shares, *probes)
    dW = _dw(plan, x2, dz, gain, dropped, seed) if need_w and dz is not None else None
    dAs = [
        plan.ops.da(x2, du, A, seed=seed, p=read.p, blocks=read.blocks) if need and du is not None else None
        for read, du, A, need in zip(plan.reads, dus, As, need_as, strict=True)
    ]
    return dx, dW, dAs, dparts


def _scaled(plan: Plan, dz: Tensor, gain: Tensor | None) -> Tensor:
    """What reaches the terms: g * dy, where dz is not that already."""
    return dz if gain is None or not (plan.gain_p or plan.ops.LATE) else gain_ops.scale_rows(dz, gain)


def _parts_back(
    plan: Plan,
    dh: Tensor | None,
    x2: Tensor | None,
    shares: Shares,
    need_x: bool,
    needs: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The parts' share of dx, onto the given one, and their gradients, from what reaches the terms."""
    if dh is None or not shares:
        return None, [None] * len(needs)
    if x2 is not None and x2.dtype is not plan.dtype:
        x2 = x2.to(plan.dtype)
    grads: list[Tensor | None] = []
    for part, tensors in shares:
        own = needs[len(grads) : len(grads) + part.count]
        dx, found = part.ops.back(dh, x2, tensors, part.scale, dx, need_x, own)
        grads += found
    return dx, grads


def _dx(ctx: Any, dx: Tensor | None, dz, gain, dropped, seed, dus, As, shares: Shares, dps, rows) -> Tensor:
    """dx + (g *) dz W + mask * (dropped W) + sum of mask * (du A) + dp rows: the adapter's share first, as in the forward."""
    plan = ctx.plan
    ops, base = plan.ops, plan.base
    for read, du, A in zip(plan.reads, dus, As, strict=True):
        if du is None:
            continue
        if dx is None:
            dx = ops.dx(du, A, seed=seed, p=read.p, blocks=read.blocks)
        else:
            ops.dx_add(dx, du, A, seed=seed, p=read.p, blocks=read.blocks)
    for dp, row in zip(dps, rows, strict=True):
        if dp is None:
            continue
        if dx is None:
            dx = ops.dx(dp, row, seed=None, p=0.0, blocks=1)
        else:
            ops.dx_add(dx, dp, row, seed=None, p=0.0, blocks=1)
    if dz is not None:
        with changed(base.in_backward(dz), shares) as now:
            if dx is None:
                dx = now.grad_linear(dz, gain)
            else:
                now.grad_onto(dx, dz, gain)
    assert dx is not None
    if dropped is not None:
        dropout_add_(dx, base.grad_linear(dropped), seed, plan.gain_p)
    if len(ctx.x_shape) != 2:
        dx = dx.reshape(ctx.x_shape)
    return dx if dx.dtype is ctx.x_dtype else dx.to(ctx.x_dtype)


def _dw(plan: Plan, x2, dz, gain, dropped, seed) -> Tensor:
    """dW of a base weight that trains (nothing in an adapter asks for it; a user who unfreezes W gets it)."""
    xs = x2.to(plan.dtype)
    dW = dz.T @ xs
    if gain is not None:
        dW = dW * gain[:, None]
    if dropped is not None:
        dW.addmm_(dropped.T, dropout(xs, seed, plan.gain_p))
    return dW.to(plan.base.dtype)


def flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums in fp32 at least, rounded once to the bias's dtype."""
    return dy.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
