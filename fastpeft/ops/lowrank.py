"""The low-rank family in torch: down, up, du and db, dx, da. The CPU path, and the reference of every kernel.

    u = drop(x) A^T          z (+)= s * v B^T         du = s * dz B,  dB = s * dz^T v         dx (+)= mask * (du A),  dA = du^T drop(x)

Letters: x [t, i]  dz [t, o]  u [t, r]  A [r, i]  B [o, r]; with blocks n: A [n, r, i/n], B [n, o/n, r], u [t, n*r].
No function forms a dense delta-W or keeps a [t, i] or [t, o] tensor: what dropout or a cast needs lives in one row slab.
Products of low-precision x and dz with factors kept in fp32 (dA, dB) are summed in fp32 and never rounded in between.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastpeft.ops import gain as gain_ops
from fastpeft.ops import lowrank_cpu as cpu
from fastpeft.ops.dropout import dropout, dropout_add_
from fastpeft.ops.slabs import slabs

# dz = gain * dy is never formed: du_db_gain hands dy on, and the seam gives the gain to the base product
LATE = True


def base_first(dz: Tensor) -> bool:
    """Whether dx starts with the base product and the adapter's share is added: for bfloat16 on the CPU, where a product that
    accumulates costs more than one that does not. Elsewhere it is the other way round."""
    return dz.dtype is torch.bfloat16 and dz.device.type == "cpu"


def down(x: Tensor, A: Tensor, dtype: torch.dtype, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """u = drop(x) A^T, [t, R] in `dtype`; x [t, i] may have another dtype (autocast), A is cast to `dtype`."""
    if cpu.runs(x, 0 if p else None) and dtype in cpu.DTYPES:
        return cpu.read(x, A, dtype, seed=seed, p=p)[0]
    a = _cast(A, dtype)
    if p == 0.0 and x.dtype is dtype:
        return _down(x, a, blocks)
    if torch.compiler.is_compiling():
        return _down(_read(x, slice(0, x.shape[0]), dtype, seed, p), a, blocks)
    u = x.new_empty(x.shape[0], _rank(A, blocks), dtype=dtype)
    for s in slabs(x.shape[0], x.shape[1], dtype.itemsize):
        u[s] = _down(_read(x, s, dtype, seed, p), a, blocks)
    return u


def up(v: Tensor, B: Tensor, scale: float, blocks: int, bias: Tensor | None) -> Tensor:
    """A fresh z = scale * v B^T + bias, [t, o] in v's dtype; B and bias [o] are cast to it."""
    if cpu.runs(v, 0) and v.shape[0] * B.shape[-2] * blocks >= cpu.SMALL:
        return cpu.fresh(v, B, up=True, scale=scale, bias=bias)
    if blocks == 1:
        b = _cast(B, v.dtype).t()
        if bias is not None:
            return torch.addmm(_cast(bias, v.dtype), v, b, alpha=scale)
        return torch.mm(v, b) if scale == 1.0 else torch.addmm(v.new_empty(1), v, b, beta=0, alpha=scale)
    z = _by_blocks(v, (B * scale).to(v.dtype).transpose(1, 2))
    return z if bias is None else z.add_(bias)


def up_add(z: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int) -> None:
    """z += scale * v B^T in place; z [t, o], v [t, R]; B is cast to z's dtype."""
    if cpu.writes(v, z.shape[1], blocks, 0.0, z):
        cpu.write(z, v, B, up=True, scale=scale)
        return
    b = _cast(B, z.dtype)
    if blocks == 1:
        z.addmm_(v, b.t(), alpha=scale)
        return
    _, o, r = b.shape
    for k in range(blocks):
        z[:, k * o : (k + 1) * o].addmm_(v[:, k * r : (k + 1) * r], b[k].T, alpha=scale)


def up_add_gain(
    z: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int, gain: Tensor, bias: Tensor | None
) -> Tensor:
    """z += scale * v B^T in place, and a fresh y = gain * z + bias [t, o]; gain, bias [o]."""
    if cpu.gains(z, v, blocks):
        return cpu.write_gain(z, v, B, scale, gain, bias)
    up_add(z, v, B, scale, blocks)
    return gain_ops.scale_rows(z, gain, bias)


def du_db(
    dz: Tensor, v: Tensor | None, B: Tensor, scale: float, blocks: int, *, need_du: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """du = scale * dz B, [t, R] in dz's dtype, and dB = scale * dz^T v, of B's shape and dtype; each only if needed."""
    if need_db and cpu.runs(dz, 0):
        return _du_db_cpu(dz, None, v, B, scale, blocks, None, need_du, need_db)[:2]
    return (
        du(dz, B, scale, blocks) if need_du else None,
        db(dz, v, B, scale, blocks) if need_db and v is not None else None,
    )


def du_db_gain(
    dy: Tensor, z: Tensor | None, v: Tensor | None, B: Tensor, scale: float, blocks: int, gain: Tensor, *,
    need_du: bool, need_db: bool, need_dgain: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dy, and du and dB of dz = gain * dy, which is not formed, and dgain = sum over t of dy * z, [o] in gain's dtype.

    The gain meets B instead: du = scale * dy (gain B), dB = scale * gain (dy^T v).
    """
    if (need_db or need_dgain) and cpu.runs(dy, 0):
        return dy, *_du_db_cpu(dy, z if need_dgain else None, v, B, scale, blocks, gain, need_du, need_db)
    per_row = gain[:, None] if blocks == 1 else gain.view(B.shape[:-1])[..., None]
    scaled = du(dy, B * per_row, scale, blocks) if need_du else None
    dB = None
    if need_db and v is not None:
        dB = _cast(db(dy, v, B, scale, blocks).mul_(per_row), B.dtype)
    dgain = gain_ops.grad_gain(dy, z, gain.dtype) if need_dgain and z is not None else None
    return dy, scaled, dB, dgain


def _du_db_cpu(dz, z, v, B, scale, blocks, gain, need_du, need_db) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """du, dB and dgain in one pass over dz; with a gain dz is dy, and the gain meets B and dB."""
    w = v if need_db else None
    u, dB, dgain = cpu.read(dz, B, dz.dtype, up=True, scale=scale, gain=gain, need_u=need_du, w=w, z=z)
    return (
        u if need_du else None,
        _cast(dB, B.dtype) if need_db else None,
        None if z is None else _cast(dgain, gain.dtype),
    )


def du(dz: Tensor, B: Tensor, scale: float, blocks: int) -> Tensor:
    """du = scale * dz B, [t, R] in dz's dtype."""
    if cpu.runs(dz):
        return cpu.read(dz, B, dz.dtype, up=True, scale=scale)[0]
    b = _cast(B, dz.dtype)
    if blocks == 1:
        return torch.mm(dz, b) if scale == 1.0 else torch.addmm(dz.new_empty(1), dz, b, beta=0, alpha=scale)
    return _by_blocks(dz, b).mul_(scale)


def db(dz: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int) -> Tensor:
    """dB = scale * dz^T v, of B's shape and dtype."""
    if blocks == 1:
        return _outer(dz, v, B.dtype, scale)
    n, o, r = B.shape
    parts = [_outer(dz[:, k * o : (k + 1) * o], v[:, k * r : (k + 1) * r], B.dtype) for k in range(n)]
    return torch.stack(parts).mul_(scale)


def dx(du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """A fresh dx = mask * (du A), [t, i] in du's dtype."""
    if cpu.writes(du, A.shape[-1] * blocks, blocks, p):
        return cpu.fresh(du, A, seed=seed, p=p)
    a = _cast(A, du.dtype)
    out = torch.mm(du, a) if blocks == 1 else _by_blocks(du, a)
    return out if p == 0.0 else dropout(out, seed, p)


def dx_add(dx: Tensor, du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> None:
    """dx += mask * (du A) in place; dx [t, i]."""
    if cpu.writes(du, dx.shape[1], blocks, p, dx):
        cpu.write(dx, du, A, seed=seed, p=p)
        return
    a = _cast(A, du.dtype)
    if p > 0.0:
        for s in slabs(dx.shape[0], dx.shape[1], dx.element_size()):
            part = torch.mm(du[s], a) if blocks == 1 else _by_blocks(du[s], a)
            dropout_add_(dx[s], part, seed, p, s.start)
    elif blocks == 1:
        dx.addmm_(du, a)
    else:
        n, r, i = a.shape
        for k in range(n):
            dx[:, k * i : (k + 1) * i].addmm_(du[:, k * r : (k + 1) * r], a[k])


def da(x: Tensor, du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """dA = du^T drop(x), of A's shape and dtype."""
    if cpu.runs(x, 0 if p or blocks > 1 else None) and du.dtype in cpu.DTYPES:
        return _cast(cpu.read(x, A, du.dtype, need_u=False, w=du, seed=seed, p=p)[1], A.dtype)
    if p == 0.0:
        return _da(x, du, A, blocks)
    if torch.compiler.is_compiling():
        return _da(_read(x, slice(0, x.shape[0]), du.dtype, seed, p), du, A, blocks)
    total = torch.zeros_like(A, dtype=_accumulator(A.dtype))
    for s in slabs(x.shape[0], x.shape[1], total.element_size()):
        total += _da(_read(x, s, du.dtype, seed, p), du[s], total, blocks)
    return total.to(A.dtype)


def _read(x: Tensor, rows: slice, dtype: torch.dtype, seed: Tensor | None, p: float) -> Tensor:
    """x[rows] in `dtype` under the mask of those rows."""
    part = x[rows].to(dtype)
    return part if p == 0.0 else dropout(part, seed, p, rows.start)


def _rank(A: Tensor, blocks: int) -> int:
    return A.shape[0] if blocks == 1 else A.shape[0] * A.shape[1]


def _down(x: Tensor, a: Tensor, blocks: int) -> Tensor:
    return linear(x, a) if blocks == 1 else _by_blocks(x, a.transpose(1, 2))


def _by_blocks(left: Tensor, right: Tensor) -> Tensor:
    """Block k of left's columns [t, n * c] times right[k], right [n, c, d] -> [t, n * d]."""
    n, c, d = right.shape
    parts = [left[:, k * c : (k + 1) * c] for k in range(n)]
    if torch.compiler.is_compiling():
        return torch.cat([part @ right[k] for k, part in enumerate(parts)], dim=1)
    out = left.new_empty(left.shape[0], n * d)
    for k, part in enumerate(parts):
        torch.mm(part, right[k], out=out[:, k * d : (k + 1) * d])
    return out


def _da(x: Tensor, du: Tensor, A: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return _outer(du, x, A.dtype)
    n, r, i = A.shape
    parts = [_outer(du[:, k * r : (k + 1) * r], x[:, k * i : (k + 1) * i], A.dtype) for k in range(n)]
    return torch.stack(parts)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale * left^T right summed over tokens, in `dtype`.

    Where `dtype` is wider than the operands (fp32 factors on a bf16 base) the slabs are widened and summed wide: a bf16
    product would round the gradient of an fp32 parameter to 8 bits.
    """
    if left.dtype is right.dtype is dtype:
        if scale == 1.0:
            return torch.mm(left.t(), right)
        return torch.addmm(left.new_empty(1), left.t(), right, beta=0, alpha=scale)
    wide = _accumulator(dtype)
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=wide)
    for s in slabs(left.shape[0], left.shape[1] + right.shape[1], wide.itemsize):
        total.addmm_(left[s].to(wide).t(), right[s].to(wide))
    return total.mul_(scale).to(dtype)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)
