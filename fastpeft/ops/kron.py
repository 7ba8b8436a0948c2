"""The Kronecker family in torch: y = scale * (C o D) x by two small products; the CPU path, and the reference of the kernels.

    H = X D^T   [t, c, b]         Y = scale * C H   [t, a, b]         with x as X [t, c, d] and y as Y [t, a, b]
    E = C^T dY  [t, c, b]         dX = scale * E D                    dC = scale * sum of dY H^T     dD = scale * sum of E^T X

C [a, c], D [b, d]. H and E are as wide as x: they exist for one slab of tokens at a time, H is computed again in backward,
and nothing is saved but x. tensors is (C, D) throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.slabs import once, slabs

ON_BASE = False
# rows that one product sums over: one long sum of fp32 numbers would lose more than the dense gradient does
BLOCK = 64


def fresh(x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
    """scale * term(x) + bias, [t, a*b] in x's dtype; x [t, c*d], bias [a*b]."""
    C, D = tensors
    y = x.new_empty(x.shape[0], C.shape[0] * D.shape[0])
    _product(y, x, C, D, scale, fresh=True)
    return y if bias is None else y.add_(bias)


def add(y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
    """y += scale * term(x) in place; y [t, a*b] in x's dtype, rows of any stride."""
    _product(y, x, *tensors, scale, fresh=False)


def back(
    dz: Tensor,
    x: Tensor | None,
    tensors: Sequence[Tensor],
    scale: float,
    dx: Tensor | None,
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """dx [t, c*d], onto the given one or fresh, and dC, dD of the factors' shapes and dtypes; dz [t, a*b]."""
    C, D = tensors
    (a, c), (b, d) = C.shape, D.shape
    c_t, dm = (C.detach() * scale).to(dz.dtype).t(), D.to(dz.dtype)
    is_fresh = dx is None
    if need_x and dx is None:
        dx = dz.new_empty(dz.shape[0], c * d)
    wide = torch.promote_types(dz.dtype, torch.float32)
    dC = dz.new_zeros(a, c, dtype=wide) if needs[0] else None
    dD = dz.new_zeros(b, d, dtype=wide) if needs[1] else None
    if dz.shape[0] == 0:
        return dx, (_cast(dC, C), _cast(dD, D))
    for s in slabs(dz.shape[0], max(a * b, c * b, c * d), dz.element_size()):
        part = dz[s].unflatten(1, (a, b))
        if needs[1] or need_x:
            e = torch.matmul(c_t, part).flatten(0, 1)  # [t*c, b]
            if need_x and dx is not None:
                _write(dx[s], e, dm, is_fresh)
        if needs[0] or needs[1]:
            assert x is not None
            rows = x[s].reshape(-1, d)
        if dD is not None:
            dD.add_(_outer(e.to(wide), rows.to(wide)))
        if dC is not None:
            h = torch.mm(rows, dm.t()).unflatten(0, (-1, c))  # [t, c, b]
            dC.add_(torch.bmm(part.to(wide), h.to(wide).transpose(1, 2)).sum(0), alpha=scale)
    return dx, (_cast(dC, C), _cast(dD, D))


def _product(y: Tensor, x: Tensor, C: Tensor, D: Tensor, scale: float, *, fresh: bool) -> None:
    (a, c), (b, d) = C.shape, D.shape
    if x.shape[0] == 0:
        return
    cm, dm = (C.detach() * scale).to(x.dtype), D.to(x.dtype)
    for s in slabs(x.shape[0], max(a * b, c * b, c * d), x.element_size()):
        h = torch.mm(x[s].reshape(-1, d), dm.t()).unflatten(0, (-1, c))
        out = y[s].unflatten(1, (a, b))
        left = cm.expand(len(h), a, c)
        out.copy_(torch.bmm(left, h)) if fresh else out.baddbmm_(left, h)


def _write(dx: Tensor, e: Tensor, dm: Tensor, fresh: bool) -> None:
    """dx [s, c*d] (+)= e D as [s*c, d]."""
    if not dx.is_contiguous() or torch.compiler.is_compiling():
        found = torch.mm(e, dm).view(dx.shape)
        dx.copy_(found) if fresh else dx.add_(found)
        return
    rows = dx.view(-1, dm.shape[1])
    torch.mm(e, dm, out=rows) if fresh else rows.addmm_(e, dm)


def _outer(e: Tensor, rows: Tensor) -> Tensor:
    """e^T rows, [b, d]; the sum over their [n] rows in blocks, whose sums are added in pairs: n is tokens times c."""
    n = e.shape[0] // BLOCK * BLOCK
    if torch.compiler.is_compiling() or e.shape[0] <= 2 * BLOCK:
        return torch.mm(e.t(), rows)
    blocks = torch.bmm(e[:n].view(-1, BLOCK, e.shape[1]).transpose(1, 2), rows[:n].view(-1, BLOCK, rows.shape[1])).sum(0)
    return blocks if n == e.shape[0] else blocks.addmm_(e[n:].t(), rows[n:])


def _cast(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return grad if grad is None or grad.dtype is like.dtype else grad.to(like.dtype)


def product(x: Tensor, C: Tensor, D: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x (C o D)^T without a base product, differentiable; x [..., c*d] -> [..., a*b] in x's dtype.

    C [a, c] and D [b, d] may be wider than x; they get their gradients in their own dtype, summed in fp32 at least.
    Raises ValueError where the shapes do not fit.
    """
    if C.dim() != 2 or D.dim() != 2 or x.shape[-1] != C.shape[1] * D.shape[1]:
        raise ValueError(
            f"kron.product: x is {tuple(x.shape)}, C {tuple(C.shape)}, D {tuple(D.shape)}; needed are x [..., c*d], C [a, c] "
            "and D [b, d]."
        )
    return _Product.apply(x, C, D, scale)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, C: Tensor, D: Tensor, scale: float) -> Tensor:
        need_factors = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if need_factors else None, C, D)
        ctx.scale, ctx.lead = scale, x.shape[:-1]
        y = fresh(x.reshape(-1, x.shape[-1]), (C, D), scale, None)
        return y.view(*ctx.lead, y.shape[1])

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, C, D = ctx.saved_tensors
        need_x, *needs = ctx.needs_input_grad[:3]
        x2 = None if x is None else x.reshape(-1, x.shape[-1])
        dx, (dC, dD) = back(dy.reshape(-1, dy.shape[-1]), x2, (C, D), ctx.scale, None, need_x, needs)
        return None if dx is None else dx.view(*ctx.lead, dx.shape[1]), dC, dD, None
