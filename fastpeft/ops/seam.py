"""The seam: how one adapted linear meets autograd, however many terms it has.

    Whole(x, A_1, B_1, ..., parts) -> y              where no term has a middle: one Function
    One(x, A, B) -> y                                Whole for one term, in a straight line
    Down(x, A_1..A_n, parts)  -> carry, u_1..u_n (, p_i of the terms with router rows)
    Up(x, carry, v_1..v_n, B_1..B_n, parts) -> y     v_i = mid_i(u_i), ordinary PyTorch between the two

parts: the tensors of the terms that are differentiated whole (fastpeft.ops.parts). Up has them detached.

`carry` is a tensor of y's shape and no storage. In backward, Up passes what the base product's gradient starts from as its
cotangent, without a copy; autograd runs the middles; Down then holds everything for one fused dx = dz W + sum du A. So the
base product's backward is fused with the adapter's, although du is known only after the middle's own backward.

The arithmetic is written once, in four steps that Whole runs back to back and Down and Up share: read, write, and their
backward, write_back and read_back. `ops` is the family that computes them: fastpeft.ops.lowrank or .lowrank_triton.

The adapter's share is written first and the base product accumulates onto it, so nobody reads y twice: the frozen layer
spends the same pass on its bias. A family that is LATE hands dy on instead of dz = g * dy, and the gain meets W or one slab
of dy at a time; then no [tokens, out] tensor is formed for it.

Saved for backward: x where a tensor that meets it trains, v_i where B_i trains, z where a gain trains, and R-sized factors.
Dropout is regenerated from the seed. Extra varargs end with a None, because Dynamo drops ctx from a Function whose forward
has exactly two varargs when nothing requires grad (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import gain as gain_ops
from fastpeft.ops import lowrank
from fastpeft.ops.dropout import dropout, dropout_add_
from fastpeft.ops.parts import Part, changed, split
from fastpeft.ops.slabs import once

# numbers of y from which reading it twice costs more than the vendor's product saves by adding the bias itself
ONE_PASS = 1 << 15

_unsafe_view = torch.ops.aten._unsafe_view.default


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


class OnePlan(NamedTuple):
    """Plan of One."""

    ops: Any
    base: Any
    dtype: torch.dtype
    p: float
    blocks: int
    scale: float
    keep_x: bool
    keep_u: bool
    keep_z: bool


class One(torch.autograd.Function):
    """What Whole does for one term, a frozen base weight and a gain without dropout, or none: the commonest call.

    Lists and loops over one term took a third of a small call (python -m bench.host); test_seam.py holds it against Whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: OnePlan,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        ops, base, dtype, p, blocks, scale, keep_x, keep_u, keep_z = plan
        x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        u = ops.down(x2, A, dtype, seed=seed, p=p, blocks=blocks)
        if x2.dtype is not dtype:
            x2 = x2.to(dtype)
        ctx.bias_dtype = None
        if bias is not None:
            ctx.bias_dtype = bias.dtype
            bias = bias if bias.dtype is dtype else bias.to(dtype)
        z = None
        if gain is not None:
            z = base.forward(x2)
            y = ops.up_add_gain(z, u, B, scale, blocks, gain, bias)
        elif x2.shape[0] * base.out_features < ONE_PASS:
            y = base.forward(x2, bias)
            ops.up_add(y, u, B, scale, blocks)
        else:
            y = ops.up(u, B, scale, blocks, bias)
            base.forward_onto(y, x2)
        ctx.save_for_backward(
            x if keep_x else None, u if keep_u else None, A, B, gain, z if keep_z else None, seed
        )
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, B, gain, z, seed = ctx.saved_tensors
        ops, base, _, p, blocks, scale, *_ = ctx.plan
        _, need_x, need_a, need_b, need_bias, need_gain, _ = ctx.needs_input_grad
        dy = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
        dbias = _sum_rows(dy, ctx.bias_dtype) if need_bias else None
        need_u = need_x or need_a
        dz, dgain, dx, dA = dy, None, None, None
        if gain is None:
            du, dB = ops.du_db(dy, u, B, scale, blocks, need_du=need_u, need_db=need_b)
        else:
            dz, du, dB, dgain = ops.du_db_gain(
                dy, z, u, B, scale, blocks, gain, need_du=need_u, need_db=need_b, need_dgain=need_gain
            )
        if need_x:
            late = gain if ops.LATE else None
            if ops.base_first(dz):
                dx = base.grad_linear(dz, late)
                ops.dx_add(dx, du, A, seed=seed, p=p, blocks=blocks)
            else:
                dx = ops.dx(du, A, seed=seed, p=p, blocks=blocks)
                base.grad_onto(dx, dz, late)
            if len(ctx.x_shape) != 2:
                dx = dx.reshape(ctx.x_shape)
            if dx.dtype is not ctx.x_dtype:
                dx = dx.to(ctx.x_dtype)
        if need_a:
            dA = ops.da(_flat(x), du, A, seed=seed, p=p, blocks=blocks)
        return None, dx, dA, dB, dbias, dgain, None


class Whole(torch.autograd.Function):
    """y [*lead, out] from x [*lead, in] and terms without a middle; tensors: A_1, B_1, A_2, B_2, ..., the parts', None.

    `weight` is the base weight if it trains, else None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        down, dtype, n = plan.ops.down, plan.dtype, 2 * len(plan.reads)
        us = [
            down(x2, A, dtype, seed=seed, p=read.p, blocks=read.blocks)
            for A, read in zip(tensors[:n:2], plan.reads, strict=True)
        ]
        y, z = write(plan, x2, bias, gain, seed, None, us, tensors[1:n:2], tensors[n:-1])
        kept = [u if k else None for u, k in zip(us, plan.keep, strict=False)]
        ctx.save_for_backward(
            x if plan.keep_x else None, z if plan.keep[-1] else None, gain, seed, *tensors[:-1], *kept
        )
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, gain, seed, *rest = ctx.saved_tensors
        n, need = 2 * len(ctx.plan.writes), ctx.needs_input_grad
        m = len(need) - 7  # A_1, B_1, ..., and the parts' tensors
        As, Bs, parts, us = rest[:n:2], rest[1:n:2], rest[n:m], rest[m:]
        need_as = need[6 : 6 + n : 2]
        need_us = [need[1] or a for a in need_as]
        bias_dtype = ctx.bias_dtype if need[3] else None
        dz, dus, dBs, dgain, dbias, _ = write_back(
            ctx.plan, dy, z, gain, us, Bs, need_us, need[7 : 6 + n : 2], need[4], bias_dtype, False
        )
        dx, dW, dAs, dparts = read_back(
            ctx, x, dz, gain, seed, dus, As, need[1], need[2], need_as, parts, need[6 + n : -1]
        )
        out = [g for pair in zip(dAs, dBs, strict=True) for g in pair]
        return (None, dx, dW, dbias, dgain, None, *out, *dparts, None)


class Down(torch.autograd.Function):
    """x [..., in] -> carry [tokens, out], u_i [tokens, R_i], p_i [tokens, P_i].

    tensors: A_1, rows_1 or None, A_2, ... , the parts', None. `weight` is the base weight if it trains, else None; `gain` is detached.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: Tensor,
        weight: Tensor | None,
        gain: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x2 = x.reshape(-1, x.shape[-1])
        us, ps = [], []
        for k, read in enumerate(plan.reads):
            A, rows = tensors[2 * k], tensors[2 * k + 1]
            us.append(plan.ops.down(x2, A, plan.dtype, seed=seed, p=read.p, blocks=read.blocks))
            if read.rows:
                ps.append(plan.ops.down(x2, rows, plan.dtype, seed=None, p=0.0, blocks=1))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if plan.keep_x else None, gain, seed, *tensors[:-1])
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        carry = x.new_empty((), dtype=plan.dtype).expand(x2.shape[0], plan.base.out_features)
        return (carry, *us, *ps)

    @staticmethod
    @once
    def backward(ctx: Any, dz: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gain, seed, *tensors = ctx.saved_tensors
        n, da = len(ctx.plan.reads), ctx.plan.ops.da
        given, need = iter(grads[n:]), ctx.needs_input_grad
        dps = [next(given) if read.rows else None for read in ctx.plan.reads]
        m = 2 * n
        As, rows, parts = tensors[:m:2], tensors[1:m:2], tensors[m:]
        dx, dW, dAs, dparts = read_back(
            ctx, x, dz, gain, seed, grads[:n], As, need[1], need[2], need[5 : 5 + m : 2],
            parts, need[5 + m : -1], (dps, rows),
        )  # fmt: skip
        out: list[Tensor | None] = []
        for dA, dp, row, need_row in zip(dAs, dps, rows, need[6 : 5 + m : 2], strict=True):
            wanted = need_row and dp is not None
            out += (dA, da(_flat(x), dp, row, seed=None, p=0.0, blocks=1) if wanted else None)
        return (None, dx, dW, None, None, *out, *dparts, None)


class Up(torch.autograd.Function):
    """y [*lead, out] from the detached x, the carry and v_i [tokens, R'_i].

    tensors: v_1, B_1, v_2, ... , the parts', None. extra [tokens, out]: what terms with `post` add.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: Tensor,
        carry: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        extra: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        n = 2 * len(plan.writes)
        vs, Bs = tensors[:n:2], tensors[1:n:2]
        y, z = write(plan, _flat(x), bias, gain, seed, extra, vs, Bs, tensors[n:-1])
        kept = [v if k else None for v, k in zip(vs, plan.keep, strict=False)]
        ctx.save_for_backward(z if plan.keep[-1] else None, gain, *kept, *Bs)
        ctx.plan = plan
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, gain, *rest = ctx.saved_tensors
        n, need = len(ctx.plan.writes), ctx.needs_input_grad
        bias_dtype = ctx.bias_dtype if need[3] else None
        m = 7 + 2 * n
        dz, dvs, dBs, dgain, dbias, dextra = write_back(
            ctx.plan, dy, z, gain, rest[:n], rest[n:], need[7:m:2], need[8:m:2], need[4], bias_dtype, need[5]
        )
        out = [g for pair in zip(dvs, dBs, strict=True) for g in pair]
        return (None, None, dz, dbias, dgain, dextra, None, *out, *(None,) * (len(need) - m))


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
    base = plan.base
    if x2.dtype is not plan.dtype:
        x2 = x2.to(plan.dtype)
    if bias is not None and bias.dtype is not plan.dtype:
        bias = bias.to(plan.dtype)
    shares = split(plan.parts, parts)
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
    if not vs and not own:
        with changed(plan.base, shares) as base:
            return base.forward(x2, bias)
    if x2.shape[0] * plan.base.out_features < ONE_PASS:
        with changed(plan.base, shares) as base:
            y = base.forward(x2, bias)
        rest = 0
    elif vs:
        scale, blocks = plan.writes[0]
        y, rest = plan.ops.up(vs[0], Bs[0], scale, blocks, bias), 1
    else:
        part, tensors = own.pop(0)
        y, rest = part.ops.fresh(x2, tensors, part.scale, bias), -1
    for k in range(max(rest, 0), len(vs)):
        plan.ops.up_add(y, vs[k], Bs[k], *plan.writes[k])
    for part, tensors in own:
        part.ops.add(y, x2, tensors, part.scale)
    if rest:
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
    ops, dy = plan.ops, _flat(dy)
    dbias = None if bias_dtype is None else _sum_rows(dy, bias_dtype)
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
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx in x's shape and dtype, dW of a base weight that trains, dA_i, the gradients of the parts' tensors.

    probes: dp_i and the rows that p_i came through.
    """
    plan = ctx.plan
    dropped = None
    dh = _scaled(plan, dz, gain) if plan.parts and dz is not None else None
    if gain is not None and plan.gain_p:
        dropped = None if dz is None else gain_ops.scale_rows(dz, gain - 1)  # [t, o] what meets drop(x) W^T
        gain = None
    elif not plan.ops.LATE:
        gain = None
    x2 = None if x is None else _flat(x)
    shares = split(plan.parts, parts)
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
    plan: Plan, dh: Tensor | None, x2: Tensor | None, shares: Shares, need_x: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The parts' share of dx and their gradients, from what reaches the terms."""
    dx: Tensor | None = None
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
        with changed(base, shares) as now:
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


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums in fp32 at least, rounded once to the bias's dtype."""
    return dy.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


class Post(torch.autograd.Function):
    """scale * post(v B^T): saves v and B only; the [tokens, out] argument of `post` is recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, B: Tensor, scale: float, post: Any) -> Tensor:
        ctx.save_for_backward(v, B)
        ctx.scale, ctx.post = scale, post
        return post(v @ B.to(v.dtype).T) * scale

    @staticmethod
    @once
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        v, B = ctx.saved_tensors
        b = B.to(v.dtype)
        with torch.enable_grad():
            w = (v @ b.T).detach().requires_grad_()
            (dw,) = torch.autograd.grad(ctx.post(w), w, d * ctx.scale)
        dB = lowrank.db(dw, v, B, 1.0, 1) if ctx.needs_input_grad[1] else None
        return dw @ b if ctx.needs_input_grad[0] else None, dB, None, None
