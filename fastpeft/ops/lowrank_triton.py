"""The low-rank family in Triton: the functions of fastpeft/ops/lowrank.py, registered in torch.library.

Each function is an operator with a fake implementation and no autograd formula: only the seam's Functions call them. What a
caller does not need comes back as None; inside an operator, which cannot return None, it is an empty tensor.
CPU tensors run in Triton's interpreter (TRITON_INTERPRET=1) and raise otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.launch import check, check_dtype, kernels
from fastpeft.ops.library import register

# du_db_gain stores dz = gain * dy, which a vendor's GEMM then reads (fastpeft.ops.seam)
LATE = False


def base_first(dz: Tensor) -> bool:
    """The adapter's share of dx comes first, and the vendor's GEMM accumulates onto it."""
    return False


def down(x: Tensor, A: Tensor, dtype: torch.dtype, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """u = drop(x) A^T, [t, R] in `dtype`; x [t, i], A [r, i] or [n, r, i/n] in any dtype of their own."""
    return _DOWN(x, A, dtype, seed, p, blocks)


def up(v: Tensor, B: Tensor, scale: float, blocks: int, bias: Tensor | None) -> Tensor:
    """A fresh z = scale * v B^T + bias, [t, o] in v's dtype; v [t, R], B [o, r] or [n, o/n, r], bias [o]."""
    return _UP(v, B, scale, blocks, bias)


def up_add(z: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int) -> None:
    """z += scale * v B^T in place; z [t, o], v [t, R], B [o, r] or [n, o/n, r]."""
    _UP_ADD(z, v, B, scale, blocks)


def up_add_gain(
    z: Tensor, v: Tensor, B: Tensor, scale: float, blocks: int, gain: Tensor, bias: Tensor | None
) -> Tensor:
    """z += scale * v B^T in place and y = gain * z + bias, [t, o] in z's dtype, in one pass; gain, bias [o]."""
    return _UP_ADD_GAIN(z, v, B, scale, blocks, gain, bias)


def du_db(
    dz: Tensor, v: Tensor | None, B: Tensor, scale: float, blocks: int, *, need_du: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """du = scale * dz B [t, R] in dz's dtype, dB = scale * dz^T v of B's shape and dtype; one pass over dz [t, o]."""
    du, dB = _DU_DB(dz, v, B, scale, blocks, need_du, need_db)
    return du if need_du else None, dB if need_db else None


def du_db_gain(
    dy: Tensor, z: Tensor | None, v: Tensor | None, B: Tensor, scale: float, blocks: int, gain: Tensor, *,
    need_du: bool, need_db: bool, need_dgain: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dz = gain * dy in dy's dtype, du and dB of it, dgain [o] = sum over t of dy * z; one pass over dy and z [t, o]."""
    dz, du, dB, dgain = _DU_DB_GAIN(dy, z, v, B, scale, blocks, gain, need_du, need_db, need_dgain)
    return dz, du if need_du else None, dB if need_db else None, dgain if need_dgain else None


def dx(du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """A fresh dx = mask * (du A), [t, i] in du's dtype; du [t, R], A [r, i] or [n, r, i/n]."""
    return _DX(du, A, seed, p, blocks)


def dx_add(dx: Tensor, du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> None:
    """dx += mask * (du A) in place; dx [t, i], du [t, R], A [r, i] or [n, r, i/n]."""
    _DX_ADD(dx, du, A, seed, p, blocks)


def da(x: Tensor, du: Tensor, A: Tensor, *, seed: Tensor | None, p: float, blocks: int) -> Tensor:
    """dA = du^T drop(x), of A's shape and dtype; x [t, i], du [t, R]."""
    return _DA(x, du, A, seed, p, blocks)


def _run_down(x, A, dtype, seed, p, blocks):
    check_dtype("lowrank down", "dtype", dtype)
    with check("lowrank down", x=x, A=A, seed=seed, p=p):
        return kernels("lowrank").down(x, A, dtype, seed, p, blocks)


def _run_up(v, B, scale, blocks, bias):
    with check("lowrank up", v=v, B=B, bias=bias):
        return kernels("lowrank").up(v, B, scale, blocks, bias)


def _run_up_add(z, v, B, scale, blocks):
    with check("lowrank up_add", z=z, v=v, B=B):
        kernels("lowrank").up_add(z, v, B, scale, blocks)


def _run_up_add_gain(z, v, B, scale, blocks, gain, bias):
    with check("lowrank up_add_gain", z=z, v=v, B=B, gain=gain, bias=bias):
        return kernels("lowrank").up_add_gain(z, v, B, scale, blocks, gain, bias)


def _run_du_db(dz, v, B, scale, blocks, need_du, need_db):
    with check("lowrank du_db", dz=dz, v=v, B=B):
        results = kernels("lowrank").du_db(dz, v, B, scale, blocks, need_du, need_db)
    return tuple(_filled(r, dz) for r in results)


def _run_du_db_gain(dy, z, v, B, scale, blocks, gain, need_du, need_db, need_dgain):
    with check("lowrank du_db_gain", dy=dy, z=z, v=v, B=B, gain=gain):
        results = kernels("lowrank").du_db_gain(
            dy, z, v, B, scale, blocks, gain, need_du, need_db, need_dgain
        )
    return tuple(_filled(r, dy) for r in results)


def _run_dx(du, A, seed, p, blocks):
    with check("lowrank dx", du=du, A=A, seed=seed, p=p):
        return kernels("lowrank").dx(du, A, seed, p, blocks)


def _run_dx_add(dx, du, A, seed, p, blocks):
    with check("lowrank dx_add", dx=dx, du=du, A=A, seed=seed, p=p):
        kernels("lowrank").dx_add(dx, du, A, seed, p, blocks)


def _run_da(x, du, A, seed, p, blocks):
    with check("lowrank da", x=x, du=du, A=A, seed=seed, p=p):
        return kernels("lowrank").da(x, du, A, seed, p, blocks)


def _filled(result: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if result is None else result


def _size(factor: Tensor, axis: int) -> int:
    """Rank or columns of all blocks together; `axis` is the place of that size in one block."""
    return factor.shape[axis] if factor.dim() == 2 else factor.shape[0] * factor.shape[axis + 1]


def _fake_down(x, A, dtype, seed, p, blocks):
    return x.new_empty((x.shape[0], _size(A, 0)), dtype=dtype)


def _fake_up(v, B, scale, blocks, bias):
    return v.new_empty((v.shape[0], _size(B, 0)))


def _fake_nothing(*args):
    return None


def _fake_up_add_gain(z, v, B, scale, blocks, gain, bias):
    return z.new_empty(z.shape)


def _fake_du_db(dz, v, B, scale, blocks, need_du, need_db):
    du = dz.new_empty((dz.shape[0], _size(B, 1))) if need_du else dz.new_empty(0)
    return du, B.new_empty(B.shape) if need_db else dz.new_empty(0)


def _fake_du_db_gain(dy, z, v, B, scale, blocks, gain, need_du, need_db, need_dgain):
    du, dB = _fake_du_db(dy, v, B, scale, blocks, need_du, need_db)
    return dy.new_empty(dy.shape), du, dB, gain.new_empty(gain.shape) if need_dgain else dy.new_empty(0)


def _fake_dx(du, A, seed, p, blocks):
    return du.new_empty((du.shape[0], _size(A, 1)))


def _fake_da(x, du, A, seed, p, blocks):
    return A.new_empty(A.shape)


_OPERATORS = (
    (
        "lowrank_down(Tensor x, Tensor A, ScalarType dtype, Tensor? seed, float p, int blocks) -> Tensor",
        _run_down,
        _fake_down,
    ),
    (
        "lowrank_up(Tensor v, Tensor B, float scale, int blocks, Tensor? bias) -> Tensor",
        _run_up,
        _fake_up,
    ),
    (
        "lowrank_up_add(Tensor(a!) z, Tensor v, Tensor B, float scale, int blocks) -> ()",
        _run_up_add,
        _fake_nothing,
    ),
    (
        "lowrank_up_add_gain(Tensor(a!) z, Tensor v, Tensor B, float scale, int blocks, Tensor gain, Tensor? bias) -> Tensor",
        _run_up_add_gain,
        _fake_up_add_gain,
    ),
    (
        "lowrank_du_db(Tensor dz, Tensor? v, Tensor B, float scale, int blocks, bool need_du, bool need_db)"
        " -> (Tensor du, Tensor dB)",
        _run_du_db,
        _fake_du_db,
    ),
    (
        "lowrank_du_db_gain(Tensor dy, Tensor? z, Tensor? v, Tensor B, float scale, int blocks, Tensor gain,"
        " bool need_du, bool need_db, bool need_dgain) -> (Tensor dz, Tensor du, Tensor dB, Tensor dgain)",
        _run_du_db_gain,
        _fake_du_db_gain,
    ),
    (
        "lowrank_dx(Tensor du, Tensor A, Tensor? seed, float p, int blocks) -> Tensor",
        _run_dx,
        _fake_dx,
    ),
    (
        "lowrank_dx_add(Tensor(a!) dx, Tensor du, Tensor A, Tensor? seed, float p, int blocks) -> ()",
        _run_dx_add,
        _fake_nothing,
    ),
    (
        "lowrank_da(Tensor x, Tensor du, Tensor A, Tensor? seed, float p, int blocks) -> Tensor",
        _run_da,
        _fake_da,
    ),
)
register(_OPERATORS, "CPU", "CUDA")

# looked up once: resolving torch.ops.fastpeft.<name> costs microseconds a call
_DOWN = torch.ops.fastpeft.lowrank_down.default
_UP = torch.ops.fastpeft.lowrank_up.default
_UP_ADD = torch.ops.fastpeft.lowrank_up_add.default
_UP_ADD_GAIN = torch.ops.fastpeft.lowrank_up_add_gain.default
_DU_DB = torch.ops.fastpeft.lowrank_du_db.default
_DU_DB_GAIN = torch.ops.fastpeft.lowrank_du_db_gain.default
_DX = torch.ops.fastpeft.lowrank_dx.default
_DX_ADD = torch.ops.fastpeft.lowrank_dx_add.default
_DA = torch.ops.fastpeft.lowrank_da.default
