"""The seam: one pair of autograd Functions per adapted linear, however many terms it has.

    Down(x, A_1..A_n)  -> carry, u_1..u_n (, p_i of the terms with router rows)
    Up(x, carry, v_1..v_n, B_1..B_n) -> y            v_i = mid_i(u_i), ordinary PyTorch between the two

`carry` is a tensor of y's shape and no storage. In backward, Up passes dz (the gradient of the base product) as its
cotangent, without a copy; autograd runs the middles; Down then holds everything for one fused dx = dz W + sum du A. So the
base product's backward is fused with the adapter's, although du is known only after the middle's own backward.

Saved for backward: x where a tensor that meets it trains, v_i where B_i trains, z where a gain trains, and R-sized factors.
Dropout is regenerated from the seed. Extra varargs end with a None, because Dynamo drops ctx from a Function whose forward
has exactly two varargs when nothing requires grad (torch 2.13).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft.ops import gain as gain_ops
from fastpeft.ops import lowrank
from fastpeft.ops.dropout import dropout, dropout_add_
from fastpeft.ops.slabs import quiet_autocast


class Read(NamedTuple):
    """How one A reads x."""

    p: float
    blocks: int
    rows: bool


class Write(NamedTuple):
    """How one B writes y."""

    scale: float
    blocks: int


class Down(torch.autograd.Function):
    """x [..., in] -> carry [tokens, out], u_i [tokens, R_i], p_i [tokens, P_i].

    tensors: A_1, rows_1 or None, A_2, ... , None. `weight` is the base weight if it trains, else None; `gain` is detached.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        base: Any,
        gain: Tensor | None,
        seed: Tensor | None,
        gain_p: float,
        dtype: torch.dtype,
        keep_x: bool,
        reads: tuple[Read, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x2 = x.reshape(-1, x.shape[-1])
        us, ps = [], []
        for k, read in enumerate(reads):
            A, rows = tensors[2 * k], tensors[2 * k + 1]
            us.append(lowrank.down(x2, A, dtype, seed=seed, p=read.p, blocks=read.blocks))
            if read.rows:
                ps.append(lowrank.down(x2, rows, dtype, seed=None, p=0.0, blocks=1))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if keep_x else None, gain if gain_p else None, seed, *tensors)
        ctx.base, ctx.gain_p, ctx.dtype, ctx.reads = base, gain_p, dtype, reads
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        carry = x.new_empty((), dtype=dtype).expand(x2.shape[0], base.out_features)
        return (carry, *us, *ps)

    @staticmethod
    @once_differentiable
    @quiet_autocast
    def backward(ctx: Any, dz: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gain, seed, *tensors = ctx.saved_tensors
        n = len(ctx.reads)
        x2 = None if x is None else x.reshape(-1, x.shape[-1])
        dus, dps = grads[:n], iter(grads[n:])
        pairs = [(du, next(dps) if read.rows else None) for du, read in zip(dus, ctx.reads, strict=True)]

        dropped = None if gain is None or dz is None else gain_ops.scale_rows(dz, gain - 1)  # [t, o] what meets drop(x) W^T
        dx = _dx(ctx, dz, dropped, seed, pairs, tensors) if ctx.needs_input_grad[0] else None
        dW = _dw(ctx, x2, dz, dropped, seed) if ctx.needs_input_grad[1] else None

        out: list[Tensor | None] = []
        for k, (read, (du, dp)) in enumerate(zip(ctx.reads, pairs, strict=True)):
            A, rows = tensors[2 * k], tensors[2 * k + 1]
            need_a, need_rows = ctx.needs_input_grad[9 + 2 * k], ctx.needs_input_grad[10 + 2 * k]
            out.append(
                lowrank.da(x2, du, A, seed=seed, p=read.p, blocks=read.blocks) if need_a and du is not None else None
            )
            out.append(lowrank.da(x2, dp, rows, seed=None, p=0.0, blocks=1) if need_rows and dp is not None else None)
        return (dx, dW, None, None, None, None, None, None, None, *out, None)


def _dx(ctx: Any, dz, dropped, seed, pairs, tensors) -> Tensor:
    """dz W + mask * (dropped W) + sum of mask * (du A) + dp rows, in x's shape and dtype."""
    tokens = next(g.shape[0] for g in (dz, *(g for pair in pairs for g in pair)) if g is not None)
    if dz is None:
        factor = tensors[0] if tensors[0] is not None else seed
        dx = torch.zeros(tokens, ctx.x_shape[-1], dtype=ctx.dtype, device=factor.device)
    else:
        dx = ctx.base.grad_linear(dz)
    if dropped is not None:
        dropout_add_(dx, ctx.base.grad_linear(dropped), seed, ctx.gain_p)
    for k, (read, (du, dp)) in enumerate(zip(ctx.reads, pairs, strict=True)):
        if du is not None:
            lowrank.dx_add(dx, du, tensors[2 * k], seed=seed, p=read.p, blocks=read.blocks)
        if dp is not None:
            lowrank.dx_add(dx, dp, tensors[2 * k + 1], seed=None, p=0.0, blocks=1)
    return dx.reshape(ctx.x_shape).to(ctx.x_dtype)


def _dw(ctx: Any, x2, dz, dropped, seed) -> Tensor | None:
    """dW of a base weight that trains (nothing in an adapter asks for it; a user who unfreezes W gets it)."""
    if dz is None:
        return None
    xs = x2.to(ctx.dtype)
    dW = dz.T @ xs
    if dropped is not None:
        dW.addmm_(dropped.T, dropout(xs, seed, ctx.gain_p))
    return dW.to(ctx.base.dtype)


class Up(torch.autograd.Function):
    """y [*lead, out] from the detached x, the carry and v_i [tokens, R'_i].

    tensors: v_1, B_1, v_2, ... , None. extra [tokens, out]: what terms with `post` add. The carry's cotangent is
    dz = g * dy; with dropout in the gain it is dy, and Down adds the dropped part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        carry: Tensor,
        base: Any,
        bias: Tensor | None,
        gain: Tensor | None,
        extra: Tensor | None,
        seed: Tensor | None,
        gain_p: float,
        writes: tuple[Write, ...],
        keep: tuple[bool, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        dtype = carry.dtype
        x2 = x.reshape(-1, x.shape[-1]).to(dtype)
        bias_y = None if bias is None else bias.to(dtype)
        plain = gain is None
        y = base.forward(x2, bias_y if plain or gain_p else None)
        z = base.forward(dropout(x2, seed, gain_p)) if gain_p else y
        if gain_p:
            y.sub_(z)
        for k, write in enumerate(writes):
            lowrank.up_add(z, tensors[2 * k], tensors[2 * k + 1], write.scale, write.blocks)
        if extra is not None:
            z.add_(extra)
        if gain_p:
            gain_ops.add_scaled_rows_(y, z, gain)
        elif not plain:
            y = gain_ops.scale_rows(z, gain, bias)

        saved = [t if k % 2 or keep[k // 2] else None for k, t in enumerate(tensors[:-1])]
        ctx.save_for_backward(z if gain is not None and keep[-1] else None, gain, *saved)
        ctx.gain_p, ctx.writes = gain_p, writes
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    @quiet_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, gain, *tensors = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dz = dy if gain is None else gain_ops.scale_rows(dy, gain)
        dgain = gain_ops.grad_gain(dy, z, gain.dtype) if ctx.needs_input_grad[4] else None
        dbias = _sum_rows(dy, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        dextra = dz if ctx.needs_input_grad[5] else None
        out: list[Tensor | None] = []
        for k, write in enumerate(ctx.writes):
            v, B = tensors[2 * k], tensors[2 * k + 1]
            need_v, need_b = ctx.needs_input_grad[10 + 2 * k], ctx.needs_input_grad[11 + 2 * k]
            out.append(lowrank.du(dz, B, write.scale, write.blocks) if need_v else None)
            out.append(lowrank.db(dz, v, B, write.scale, write.blocks) if need_b else None)
        carry = dy if ctx.gain_p else dz
        return (None, carry, None, dbias, dgain, dextra, None, None, None, None, *out, None)


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
    @once_differentiable
    @quiet_autocast
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        v, B = ctx.saved_tensors
        b = B.to(v.dtype)
        with torch.enable_grad():
            w = (v @ b.T).detach().requires_grad_()
            (dw,) = torch.autograd.grad(ctx.post(w), w, d * ctx.scale)
        dB = lowrank.db(dw, v, B, 1.0, 1) if ctx.needs_input_grad[1] else None
        return dw @ b if ctx.needs_input_grad[0] else None, dB, None, None
