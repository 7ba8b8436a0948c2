"""The seam: how one adapted linear meets autograd, however many terms it has.

    Whole(x, A_1, B_1, ..., parts) -> y              where no term has a middle: one Function
    One(x, A, B) -> y                                Whole for one term, in a straight line
    Down(x, A_1..A_n, parts)  -> carry, u_1..u_n (, p_i of the terms with router rows)
    Up(x, carry, v_1..v_n, B_1..B_n, parts) -> y     v_i = mid_i(u_i), ordinary PyTorch between the two

parts: the tensors of the terms that are differentiated whole (fastpeft.ops.parts). Up has them detached.

`carry` is a tensor of y's shape and no storage. In backward, Up passes what the base product's gradient starts from as its
cotangent, without a copy; autograd runs the middles; Down then holds everything for one fused dx = dz W + sum du A. So the
base product's backward is fused with the adapter's, although du is known only after the middle's own backward.

The arithmetic is written once, in the steps of fastpeft.ops.steps, which Whole runs back to back and Down and Up share.

Saved for backward: x where a tensor that meets it trains, v_i where B_i trains, z where a gain trains, and R-sized factors.
Dropout is regenerated from the seed. Extra varargs end with a None, because Dynamo drops ctx from a Function whose forward
has exactly two varargs when nothing requires grad (torch 2.13).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import lowrank, steps
from fastpeft.ops.slabs import fewer, once
from fastpeft.ops.steps import Plan, flat, read_back, sum_rows, write, write_back

_unsafe_view = torch.ops.aten._unsafe_view.default


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
        elif fewer(x2.shape[0] * base.out_features, steps.ONE_PASS):
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
        dbias = sum_rows(dy, ctx.bias_dtype) if need_bias else None
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
            dA = ops.da(flat(x), du, A, seed=seed, p=p, blocks=blocks)
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
            ctx, x, dz, gain, seed, dus, As, need[1], need[2], need_as, parts, need[6 + n : -1],
            dy=dy if ctx.plan.parts and ctx.plan.parts[0].onto_y else None,
        )  # fmt: skip
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
            out += (dA, da(flat(x), dp, row, seed=None, p=0.0, blocks=1) if wanted else None)
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
        y, z = write(plan, flat(x), bias, gain, seed, extra, vs, Bs, tensors[n:-1])
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


def after_up(v: Tensor, B: Tensor, scale: float, post: Any) -> Tensor:
    """scale * post(v B^T) [tokens, out]. Traced code says it plainly: Dynamo takes no autograd.grad, and plans memory itself."""
    if torch.compiler.is_compiling():
        return post(v @ B.to(v.dtype).T) * scale
    return Post.apply(v, B, scale, post)


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
