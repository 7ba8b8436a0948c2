"""The Kronecker family in Triton: the functions of fastpeft/ops/kron.py, registered in torch.library.

y [t, a*b] = scale * x (C o D)^T, x [t, c*d], C [a, c], D [b, d], o the Kronecker product. Operators with a fake
implementation and no autograd formula: only the seam's Functions call them. CPU tensors run in Triton's interpreter
(TRITON_INTERPRET=1) and raise otherwise, as do fp64 tensors (TypeError) and sizes that do not fit (ValueError).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops.launch import check, kernels
from fastpeft.ops.library import register

ON_BASE = False


def fresh(x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
    """A fresh y = scale * x (C o D)^T + bias, [t, a*b] in x's dtype; tensors (C, D) in any dtype of their own, bias [a*b]."""
    return _FRESH(x, *tensors, scale, bias)


def add(y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
    """y += scale * x (C o D)^T in place; y [t, a*b], whose dtype the products have."""
    _ADD(y, x, *tensors, scale)


def back(
    dz: Tensor, x: Tensor | None, tensors: Sequence[Tensor], scale: float, dx: Tensor | None, need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
    """(dx, (dC, dD)) of dz [t, a*b]; dx [t, c*d] in dz's dtype, added onto in place where one is given and need_x.

    dC and dD have their factors' dtypes; each is None unless needed. x is read only for them.
    """
    C, D = tensors
    if need_x and dx is not None:
        _ADD(dx, dz, C.T, D.T, scale)
    elif need_x:
        dx = _FRESH(dz, C.T, D.T, scale, None)
    need_c, need_d = needs
    if not need_c and not need_d:
        return dx, (None, None)
    dC, dD = _GRADS(dz, x, C, D, scale, need_c, need_d)
    return dx, (dC if need_c else None, dD if need_d else None)


def _run_fresh(x, C, D, scale, bias):
    with check("kron fresh", x=x, C=C, D=D, bias=bias):
        return kernels("kron").fresh(x, C, D, scale, bias)


def _run_add(y, x, C, D, scale):
    with check("kron add", y=y, x=x, C=C, D=D):
        kernels("kron").add(y, x, C, D, scale)


def _run_grads(dz, x, C, D, scale, need_c, need_d):
    with check("kron grads", dz=dz, x=x, C=C, D=D):
        results = kernels("kron").grads(dz, x, C, D, scale, need_c, need_d)
    return tuple(dz.new_empty(0) if r is None else r for r in results)


def _fake_fresh(x, C, D, scale, bias):
    return x.new_empty((x.shape[0], C.shape[0] * D.shape[0]))


def _fake_add(y, x, C, D, scale):
    return None


def _fake_grads(dz, x, C, D, scale, need_c, need_d):
    return tuple(f.new_empty(f.shape) if n else dz.new_empty(0) for f, n in ((C, need_c), (D, need_d)))


_OPERATORS = (
    (
        "triton_kron_fresh(Tensor x, Tensor C, Tensor D, float scale, Tensor? bias) -> Tensor",
        _run_fresh,
        _fake_fresh,
    ),
    (
        "triton_kron_add(Tensor(a!) y, Tensor x, Tensor C, Tensor D, float scale) -> ()",
        _run_add,
        _fake_add,
    ),
    (
        "triton_kron_grads(Tensor dz, Tensor x, Tensor C, Tensor D, float scale, bool need_c, bool need_d)"
        " -> (Tensor dC, Tensor dD)",
        _run_grads,
        _fake_grads,
    ),
)
register(_OPERATORS, "CPU", "CUDA")

_FRESH = torch.ops.fastpeft.triton_kron_fresh.default
_ADD = torch.ops.fastpeft.triton_kron_add.default
_GRADS = torch.ops.fastpeft.triton_kron_grads.default
