"""Grouped experts in Triton: the family of fastpeft/ops/grouped.py, registered in torch.library.

Operators with a fake implementation and no autograd formula: only the seam's Functions call them. Nothing waits for the device.
CPU tensors run in Triton's interpreter (TRITON_INTERPRET=1) and raise otherwise, as do fp64 tensors (TypeError) and sizes that
do not fit (ValueError). What a slot is: triton_kernels/grouped.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops.launch import check, check_dtype, kernels
from fastpeft.ops.library import register


class Family:
    """ranks: of each expert.   k: experts of a token."""

    ON_BASE = False

    def __init__(self, ranks: Sequence[int], k: int):
        self.ranks = tuple(ranks)

    def fresh(self, x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
        """scale * term(x) + bias, [t, o] in x's dtype; bias [o]."""
        A, B, order, ends, *w = tensors
        u = _DOWN(x, A, order, ends, _one(w), self.ranks, x.dtype)
        return _UP(u, B, order, ends, self.ranks, scale, bias, x.shape[0])

    def add(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
        """y += scale * term(x) in place; y [t, o], whose dtype the products have."""
        A, B, order, ends, *w = tensors
        u = _DOWN(x, A, order, ends, _one(w), self.ranks, y.dtype)
        _UP_ADD(y, u, B, order, ends, self.ranks, scale)

    def back(
        self,
        dz: Tensor,
        x: Tensor | None,
        tensors: Sequence[Tensor],
        scale: float,
        dx: Tensor | None,
        need_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """dx [t, i] in dz's dtype, added onto in place where one is given, and the gradients of the tensors in their dtypes."""
        A, B, order, ends, *w = tensors
        own, ranks = _one(w), self.ranks
        need_a, need_b, need_w = needs[0], needs[1], len(needs) > 4 and needs[4]
        u = _DOWN(x, A, order, ends, None, ranks, dz.dtype) if need_b or need_w else None
        dA = dB = dw = None
        if need_x or need_a or need_w:
            du, dw = _DU(dz, B, u if need_w else None, order, ends, own, ranks, scale)
            if need_x:
                dx = dz.new_zeros(dz.shape[0], A.shape[1]) if dx is None else dx
                _UP_ADD(dx, du, A.T, order, ends, ranks, 1.0)
            if need_a:
                dA = _OUTER(x, du, A, order, ends, None, ranks, 1.0, True)
        if need_b:
            dB = _OUTER(dz, u, B, order, ends, own, ranks, scale, False)
        return dx, (dA, dB, None, None, *([dw if need_w else None] if w else []))


def _one(w: Sequence[Tensor]) -> Tensor | None:
    return w[0] if w else None


def _run_down(x, A, order, ends, w, ranks, dtype):
    check_dtype("grouped down", "dtype", dtype)
    with check("grouped down", x=x, A=A, w=w):
        return kernels("grouped").down(x, A, order, ends, w, ranks, dtype)


def _run_du(dz, B, u, order, ends, w, ranks, scale):
    with check("grouped du", dz=dz, B=B, u=u, w=w):
        du, dw = kernels("grouped").du(dz, B, u, order, ends, w, ranks, scale)
    return du, dz.new_empty(0) if dw is None else dw


def _run_up(u, B, order, ends, ranks, scale, bias, tokens):
    with check("grouped up", u=u, B=B, bias=bias):
        return kernels("grouped").up(u, B, order, ends, ranks, scale, bias, tokens)


def _run_up_add(z, u, B, order, ends, ranks, scale):
    with check("grouped up_add", z=z, u=u, B=B):
        kernels("grouped").up_add(z, u, B, order, ends, ranks, scale)


def _run_outer(x, u, like, order, ends, w, ranks, scale, transposed):
    with check("grouped outer", x=x, u=u, like=like, w=w):
        return kernels("grouped").outer(x, u, like, order, ends, w, ranks, scale, transposed)


def _width(ranks):
    return -(-max(ranks) // 16) * 16


def _fake_down(x, A, order, ends, w, ranks, dtype):
    return x.new_empty((order.shape[0], _width(ranks)), dtype=dtype)


def _fake_du(dz, B, u, order, ends, w, ranks, scale):
    has = u is not None and w is not None
    return dz.new_empty((order.shape[0], _width(ranks))), w.new_empty(order.shape[0]) if has else dz.new_empty(0)


def _fake_up(u, B, order, ends, ranks, scale, bias, tokens):
    return u.new_empty((tokens, B.shape[0]))


def _fake_up_add(z, u, B, order, ends, ranks, scale):
    return None


def _fake_outer(x, u, like, order, ends, w, ranks, scale, transposed):
    return like.new_empty(like.shape)


_OPERATORS = (
    (
        "triton_grouped_down(Tensor x, Tensor A, Tensor order, Tensor ends, Tensor? w, int[] ranks, ScalarType dtype) -> Tensor",
        _run_down,
        _fake_down,
    ),
    (
        "triton_grouped_du(Tensor dz, Tensor B, Tensor? u, Tensor order, Tensor ends, Tensor? w, int[] ranks, float scale)"
        " -> (Tensor du, Tensor dw)",
        _run_du,
        _fake_du,
    ),
    (
        "triton_grouped_up(Tensor u, Tensor B, Tensor order, Tensor ends, int[] ranks, float scale, Tensor? bias, SymInt tokens)"
        " -> Tensor",
        _run_up,
        _fake_up,
    ),
    (
        "triton_grouped_up_add(Tensor(a!) z, Tensor u, Tensor B, Tensor order, Tensor ends, int[] ranks, float scale) -> ()",
        _run_up_add,
        _fake_up_add,
    ),
    (
        "triton_grouped_outer(Tensor x, Tensor u, Tensor like, Tensor order, Tensor ends, Tensor? w, int[] ranks, float scale,"
        " bool transposed) -> Tensor",
        _run_outer,
        _fake_outer,
    ),
)
register(_OPERATORS, "CPU", "CUDA")

_DOWN = torch.ops.fastpeft.triton_grouped_down.default
_DU = torch.ops.fastpeft.triton_grouped_du.default
_UP = torch.ops.fastpeft.triton_grouped_up.default
_UP_ADD = torch.ops.fastpeft.triton_grouped_up_add.default
_OUTER = torch.ops.fastpeft.triton_grouped_outer.default
