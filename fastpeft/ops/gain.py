"""y = g * z (+ bias) and its gradients, g [out] per output feature; slabs where g is wider than z (fp32 g on a bf16 base)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops import lowrank_cpu as cpu
from fastpeft.ops.slabs import SLAB_BYTES, fewer, slabs_of


def scale_rows(z: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """A fresh g * z + bias, [t, o] in z's dtype; computed in the wider of the two dtypes and rounded once."""
    if g.dtype == z.dtype:
        return z * g if bias is None else torch.addcmul(bias.to(z.dtype), z, g)
    if cpu.runs(z) and g.dtype is not torch.float64:
        return cpu.scale_columns(z, g, bias)
    y = torch.empty_like(z)
    wide_bias = None if bias is None else bias.to(g.dtype)
    for s in slabs_of(z, g.element_size()):
        y[s] = z[s] * g if wide_bias is None else torch.addcmul(wide_bias, z[s], g)
    return y


def scale_columns(W: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh diag(g) W, [o, i] in `dtype`; computed in the wider of the two dtypes and rounded once."""
    out = torch.empty(W.shape, dtype=dtype, device=W.device)
    for s in slabs_of(W, g.element_size()):
        torch.mul(W[s], g[s, None], out=out[s]) if g.dtype == W.dtype == dtype else out[s].copy_(W[s] * g[s, None])
    return out


def add_scaled_rows_(y: Tensor, z: Tensor, g: Tensor) -> None:
    """y += g * z in place, [t, o]."""
    if g.dtype == z.dtype:
        y.addcmul_(z, g)
        return
    for s in slabs_of(z, g.element_size()):
        y[s] = y[s] + z[s] * g


def grad_gain(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """dg = sum over tokens of dy * z, [o] in `dtype`; summed in fp32 at least, no [t, o] temporary."""
    wide = torch.promote_types(dtype, torch.float32)
    if dy.dtype is z.dtype is wide and fewer(dy.numel() * wide.itemsize, SLAB_BYTES + 1):
        return (dy * z).sum(0).to(dtype)
    total = dy.new_zeros(dy.shape[1], dtype=wide)
    for s in slabs_of(dy, wide.itemsize):
        total += (dy[s].to(wide) * z[s]).sum(0)
    return total.to(dtype)
