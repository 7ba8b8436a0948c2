"""The low-rank family in torch: down, up_add, du and db, dx. The CPU path, and the reference of every kernel.

    u = drop(x) A^T          z += s * v B^T          du = s * dz B,  dB = s * dz^T v          dx += mask * (du A),  dA = du^T drop(x)

Letters: x [t, i]  dz [t, o]  u [t, r]  A [r, i]  B [o, r]; with blocks n: A [n, r, i/n], B [n, o/n, r], u [t, n*r].
No function forms a dense delta-W or keeps a [t, i] or [t, o] tensor: what dropout or a cast needs lives in one row slab.
Products of low-precision x and dz with factors kept in fp32 (dA, dB) are summed in fp32 and never rounded in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.dropout import dropout, dropout_add_
from fastpeft.ops.slabs import slabs


def down(x: Tensor, A: Tensor, dtype: torch.dtype, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """u = drop(x) A^T, [t, R] in `dtype`; x [t, i] may have another dtype (autocast), A is cast to `dtype`."""
    a = A.to(dtype)
    if p == 0.0 and x.dtype == dtype:
        return _down(x, a, blocks)
    if torch.compiler.is_compiling():
        return _down(_read(x, slice(0, x.shape[0]), dtype, seed, p), a, blocks)
    u = x.new_empty(x.shape[0], _rank(A, blocks), dtype=dtype)
    for s in slabs(x.shape[0], x.shape[1], dtype.itemsize):
        u[s] = _down(_read(x, s, dtype, seed, p), a, blocks)
    return u


def up_add(z: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int) -> None:
    """z += scale * v B^T in place; z [t, o], v [t, R]; B is cast to z's dtype."""
    b = B.to(z.dtype)
    if blocks == 1:
        z.addmm_(v, b.T, alpha=scale)
        return
    _, o, r = b.shape
    for k in range(blocks):
        z[:, k * o : (k + 1) * o].addmm_(v[:, k * r : (k + 1) * r], b[k].T, alpha=scale)


def du(dz: Tensor, B: Tensor, scale: float, blocks: int) -> Tensor:
    """du = scale * dz B, [t, R] in dz's dtype."""
    b = B.to(dz.dtype)
    if blocks == 1:
        return torch.addmm(dz.new_zeros(1), dz, b, beta=0, alpha=scale)
    n, o, _ = b.shape
    return torch.cat([dz[:, k * o : (k + 1) * o] @ b[k] for k in range(n)], dim=1).mul_(scale)


def db(dz: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int) -> Tensor:
    """dB = scale * dz^T v, of B's shape and dtype."""
    if blocks == 1:
        return _outer(dz, v, B.dtype).mul_(scale)
    n, o, r = B.shape
    parts = [_outer(dz[:, k * o : (k + 1) * o], v[:, k * r : (k + 1) * r], B.dtype) for k in range(n)]
    return torch.stack(parts).mul_(scale)


def dx_add(dx: Tensor, du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> None:
    """dx += mask * (du A) in place; dx [t, i]."""
    a = A.to(du.dtype)
    if p > 0.0:
        for s in slabs(dx.shape[0], dx.shape[1], dx.element_size()):
            dropout_add_(dx[s], _up_dx(du[s], a, blocks), seed, p, s.start)
    elif blocks == 1:
        dx.addmm_(du, a)
    else:
        n, r, i = a.shape
        for k in range(n):
            dx[:, k * i : (k + 1) * i].addmm_(du[:, k * r : (k + 1) * r], a[k])


def da(x: Tensor, du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """dA = du^T drop(x), of A's shape and dtype."""
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
    if blocks == 1:
        return x @ a.T
    n, _, i = a.shape
    return torch.cat([x[:, k * i : (k + 1) * i] @ a[k].T for k in range(n)], dim=1)


def _up_dx(du: Tensor, a: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return du @ a
    n, r, _ = a.shape
    return torch.cat([du[:, k * r : (k + 1) * r] @ a[k] for k in range(n)], dim=1)


def _da(x: Tensor, du: Tensor, A: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return _outer(du, x, A.dtype)
    n, r, i = A.shape
    parts = [_outer(du[:, k * r : (k + 1) * r], x[:, k * i : (k + 1) * i], A.dtype) for k in range(n)]
    return torch.stack(parts)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right summed over tokens, in `dtype`.

    Where `dtype` is wider than the operands (fp32 factors on a bf16 base) the slabs are widened and summed wide: a bf16
    product would round the gradient of an fp32 parameter to 8 bits.
    """
    if left.dtype == right.dtype == dtype:
        return left.T @ right
    wide = _accumulator(dtype)
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=wide)
    for s in slabs(left.shape[0], left.shape[1] + right.shape[1], wide.itemsize):
        total.addmm_(left[s].to(wide).T, right[s].to(wide))
    return total.to(dtype)
