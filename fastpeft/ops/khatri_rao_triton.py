"""The Hadamard family in Triton: the functions of fastpeft/ops/khatri_rao.py, registered in torch.library.

y = scale * (x A^T) B^T with A[i*r+j] = a1[i] * a2[j] and B[:, i*r+j] = b1[:, i] * b2[:, j]; tensors (a1, a2 [r, in], b1, b2
[out, r]) in any dtypes of their own. Neither A, B nor their gradients are formed. Operators with a fake implementation and no
autograd formula: only the seam's Functions call them. CPU tensors run in Triton's interpreter (TRITON_INTERPRET=1) and raise
otherwise, as do fp64 tensors (TypeError), sizes that do not fit and ranks above 32 (ValueError).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops.launch import check, kernels
from fastpeft.ops.library import register

ON_BASE = False
# the largest rank that the kernels take
RANKS = 32


def fresh(x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
    """A fresh y = scale * term(x) + bias, [t, out] in x's dtype; x [t, in], bias [out]."""
    return _FRESH(x, *tensors, scale, bias)


def add(y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
    """y += scale * term(x) in place; y [t, out], whose dtype the products have."""
    _ADD(y, x, *tensors, scale)


def back(
    dz: Tensor, x: Tensor | None, tensors: Sequence[Tensor], scale: float, dx: Tensor | None, need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
    """(dx, gradients of a1, a2, b1, b2) of dz [t, out]; products in dz's dtype.

    dx [t, in] in dz's dtype, added onto in place where one is given and need_x. Each gradient has its factor's shape and dtype
    and is None unless needed. x is read only for them.
    """
    if need_x and dx is not None:
        grads = _BACK_ADD(dx, dz, x, *tensors, scale, *needs)
    else:
        found, *grads = _BACK(dz, x, *tensors, scale, need_x, *needs)
        dx = found if need_x else dx
    return dx, tuple(g if n else None for g, n in zip(grads, needs, strict=True))


def _run_fresh(x, a1, a2, b1, b2, scale, bias):
    with check("hadamard fresh", x=x, a1=a1, a2=a2, b1=b1, b2=b2, bias=bias):
        k = kernels("hadamard")
        return k.up(k.down(x, a1, a2, x.dtype), b1, b2, scale, bias)


def _run_add(y, x, a1, a2, b1, b2, scale):
    with check("hadamard add", y=y, x=x, a1=a1, a2=a2, b1=b1, b2=b2):
        k = kernels("hadamard")
        k.up_add(y, k.down(x, a1, a2, y.dtype), b1, b2, scale)


def _run_back(dz, x, a1, a2, b1, b2, scale, need_x, *needs):
    with check("hadamard back", dz=dz, x=x, a1=a1, a2=a2, b1=b1, b2=b2):
        du, grads = _gradients(dz, x, a1, a2, b1, b2, scale, need_x, needs)
        dx = kernels("hadamard").dx(du, a1, a2) if need_x else dz.new_empty(0)
    return dx, *grads


def _run_back_add(dx, dz, x, a1, a2, b1, b2, scale, *needs):
    with check("hadamard back", dx=dx, dz=dz, x=x, a1=a1, a2=a2, b1=b1, b2=b2):
        du, grads = _gradients(dz, x, a1, a2, b1, b2, scale, True, needs)
        kernels("hadamard").dx_add(dx, du, a1, a2)
    return grads


def _gradients(dz, x, a1, a2, b1, b2, scale, need_x, needs):
    """(du where something needs it, the gradients of the factors; empty where not needed)."""
    k = kernels("hadamard")
    need_a, need_b = needs[0] or needs[1], needs[2] or needs[3]
    u = k.down(x, a1, a2, dz.dtype) if need_b else None
    du, db1, db2 = k.du_db(dz, u, b1, b2, scale, need_x or need_a, needs[2], needs[3])
    da1, da2 = k.da(x, du, a1, a2, needs[0], needs[1]) if need_a else (None, None)
    return du, tuple(dz.new_empty(0) if g is None else g for g in (da1, da2, db1, db2))


def _fake_fresh(x, a1, a2, b1, b2, scale, bias):
    return x.new_empty((x.shape[0], b1.shape[0]))


def _fake_add(y, x, a1, a2, b1, b2, scale):
    return None


def _fake_back(dz, x, a1, a2, b1, b2, scale, need_x, *needs):
    dx = dz.new_empty((dz.shape[0], a1.shape[1])) if need_x else dz.new_empty(0)
    return dx, *_fake_gradients(dz, (a1, a2, b1, b2), needs)


def _fake_back_add(dx, dz, x, a1, a2, b1, b2, scale, *needs):
    return _fake_gradients(dz, (a1, a2, b1, b2), needs)


def _fake_gradients(dz, tensors, needs):
    return tuple(f.new_empty(f.shape) if n else dz.new_empty(0) for f, n in zip(tensors, needs, strict=True))


_FACTORS = "Tensor a1, Tensor a2, Tensor b1, Tensor b2, float scale"
_NEEDS = "bool need_a1, bool need_a2, bool need_b1, bool need_b2"
_GRADS = "Tensor da1, Tensor da2, Tensor db1, Tensor db2"
_OPERATORS = (
    (
        f"triton_hadamard_fresh(Tensor x, {_FACTORS}, Tensor? bias) -> Tensor",
        _run_fresh,
        _fake_fresh,
    ),
    (
        f"triton_hadamard_add(Tensor(a!) y, Tensor x, {_FACTORS}) -> ()",
        _run_add,
        _fake_add,
    ),
    (
        f"triton_hadamard_back(Tensor dz, Tensor? x, {_FACTORS}, bool need_x, {_NEEDS}) -> (Tensor dx, {_GRADS})",
        _run_back,
        _fake_back,
    ),
    (
        f"triton_hadamard_back_add(Tensor(a!) dx, Tensor dz, Tensor? x, {_FACTORS}, {_NEEDS}) -> ({_GRADS})",
        _run_back_add,
        _fake_back_add,
    ),
)
register(_OPERATORS, "CPU", "CUDA")

_FRESH = torch.ops.fastpeft.triton_hadamard_fresh.default
_ADD = torch.ops.fastpeft.triton_hadamard_add.default
_BACK = torch.ops.fastpeft.triton_hadamard_back.default
_BACK_ADD = torch.ops.fastpeft.triton_hadamard_back_add.default
