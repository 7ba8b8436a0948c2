"""The sparse family in torch, with C++ on the CPU: entries of the update on a fixed support. tensors is (values, index).

values [nnz]; index int32 [2, nnz], rows then columns, in row-major order. The product comes from a base weight with the
entries in it (Copy, Window), or is one of its own (Exact). dvalues[k] = scale * sum over t of dz[t, row_k] * x[t, col_k] is
never read off a dense gradient that is kept: `grad` has several routes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import dense as whole
from fastpeft.ops import sparse_cpu as cpu

# up to this share of entries the sampled product in C++ costs less than the dense one in chunks (measured on a CPU)
SAMPLED = 0.3
# at a lower share of entries than 1 in this many, gathering columns costs less than the dense product (measured on the CPU)
GATHERED = 1000
# numbers that a chunk of entries or of the dense gradient may hold: 16 MiB in fp32
CHUNK = 1 << 22


class Copy:
    """A copy of W with the entries in it, in a workspace. code: this module, or fastpeft.ops.sparse_triton."""

    ON_BASE = True

    def __init__(self, code: Any):
        self.code = code

    @contextlib.contextmanager
    def change(self, base: Any, tensors: Sequence[Tensor], scale: float) -> Iterator[Any]:
        values, index = tensors
        yield base.scattered(_scaled(values, scale), index, self.code.copy)

    def back(self, dz, x, tensors, scale, dx, need_x, needs):
        return dx, (_grad(self.code, dz, x, tensors, scale, needs), None)


class Window(Copy):
    """W's own entries are changed while the product runs, and put back."""

    @contextlib.contextmanager
    def change(self, base: Any, tensors: Sequence[Tensor], scale: float) -> Iterator[Any]:
        values, index = tensors
        W = base.W.data  # past the version counter
        saved = self.code.put(W, _scaled(values, scale), index)
        try:
            yield base
        finally:
            self.code.restore(W, index, saved)


class Overlaid(Copy):
    """W's own entries stay changed (fastpeft.overlay); backward writes them again, whatever stood there meanwhile."""

    def __init__(self, code: Any, overlay: Any):
        self.code, self.overlay = code, overlay
        if torch.is_grad_enabled():
            overlay.alive.add(self)

    @contextlib.contextmanager
    def change(self, base: Any, tensors: Sequence[Tensor], scale: float) -> Iterator[Any]:
        self.overlay.put(base.W, _scaled(tensors[0], scale), tensors[1])
        yield base

    def back(self, dz, x, tensors, scale, dx, need_x, needs):
        self.overlay.alive.discard(self)
        return super().back(dz, x, tensors, scale, dx, need_x, needs)


class Exact:
    """A product of its own, so that no value is lost beside a larger weight: W is not touched. shape: (out, in)."""

    ON_BASE = False

    def __init__(self, code: Any, shape: tuple[int, int]):
        self.code, self.shape = code, shape

    def _delta(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor]:
        return (dense(tensors[0].detach(), tensors[1], self.shape, dtype),)

    def _sampled(self, x: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether the C++ product takes it: on the CPU, fp32 values, few of them."""
        few = tensors[1].shape[1] < SAMPLED * self.shape[0] * self.shape[1]
        return few and compiled(x, tensors[0])

    def fresh(self, x: Tensor, tensors: Sequence[Tensor], scale: float, bias: Tensor | None) -> Tensor:
        if self._sampled(x, tensors):
            y = x.new_zeros(x.shape[0], self.shape[0]) if bias is None else bias.repeat(x.shape[0], 1)
            cpu.add(y, x, _scaled(tensors[0], scale), tensors[1])
            return y
        return whole.Own.fresh(x, self._delta(tensors, x.dtype), scale, bias)

    def add(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
        if self._sampled(x, tensors) and y.stride(1) == 1:
            cpu.add(y, x, _scaled(tensors[0], scale), tensors[1])
            return
        whole.Own.add(y, x, self._delta(tensors, x.dtype), scale)

    def back(self, dz, x, tensors, scale, dx, need_x, needs):
        if need_x and self._sampled(dz, tensors):
            dx = dz.new_zeros(dz.shape[0], self.shape[1]) if dx is None else dx
            cpu.add_t(dx, dz, _scaled(tensors[0], scale), tensors[1])
        elif need_x:
            dx, _ = whole.Own.back(dz, None, self._delta(tensors, dz.dtype), scale, dx, True, (False,))
        return dx, (_grad(self.code, dz, x, tensors, scale, needs), None)


def _scaled(values: Tensor, scale: float) -> Tensor:
    return values.detach() if scale == 1.0 else values.detach() * scale


def _grad(
    code: Any, dz: Tensor, x: Tensor | None, tensors: Sequence[Tensor], scale: float, needs: Sequence[bool]
) -> Tensor | None:
    if not needs[0] or x is None:
        return None
    values, index = tensors
    found: Tensor = code.grad(dz, x, index, values.dtype)
    return found if scale == 1.0 else found.mul_(scale)


def dense(values: Tensor, index: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The update as a [out, in] matrix in `dtype`."""
    rows, cols = index.long()
    return values.new_zeros(shape, dtype=dtype).index_put((rows, cols), values.to(dtype))


def copy(W: Tensor, values: Tensor, index: Tensor, out: Tensor) -> None:
    """out = W with W + value at the entries, added in the wider of the two dtypes and rounded once; out may be W."""
    if compiled(W, values):
        cpu.copy(W, values, index, out)
        return
    if out.data_ptr() != W.data_ptr():
        out.copy_(W)
    scatter(out, values, index)


def scatter(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W[entry] = W[entry] + value in place; W of any strides."""
    at = tuple(index.long())
    return W.index_put_(at, (W[at] + values).to(W.dtype))


def put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """scatter; returns the old entries, [nnz] in W's dtype, for restore."""
    if compiled(W, values):
        return cpu.put(W, values, index)
    saved = W[tuple(index.long())]
    scatter(W, values, index)
    return saved


def restore(W: Tensor, index: Tensor, saved: Tensor) -> None:
    """The entries as put found them, bit for bit."""
    if cpu.runs(W):
        cpu.restore(W, index, saved)
        return
    W.index_put_(tuple(index.long()), saved)


def compiled(W: Tensor, values: Tensor) -> bool:
    """Whether the C++ code takes a matrix W and values."""
    return values.dtype is torch.float32 and cpu.runs(W)


def grad(dz: Tensor, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """dvalues [nnz] in `dtype`: the sum over t of dz[t, row] * x[t, col]; dz [t, out] and x [t, in] of one dtype."""
    if torch.compiler.is_compiling():
        return torch.mm(dz.t().to(dtype), x.to(dtype))[tuple(index.long())]
    if dtype is torch.float32 and cpu.runs(dz) and cpu.runs(x) and index.shape[1] < SAMPLED * dz.shape[1] * x.shape[1]:
        return cpu.grad(dz, x, index)
    if index.shape[1] * GATHERED < dz.shape[1] * x.shape[1]:
        return grad_by_entry(dz, x, index, dtype)
    return grad_by_chunk(dz, x, index, dtype)


def grad_by_entry(dz: Tensor, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Sampled: columns of dz and of x gathered a few entries at a time, multiplied and summed over the tokens."""
    rows, cols = index.long()
    out = dz.new_empty(rows.numel(), dtype=dtype)
    step = max(1, CHUNK // max(1, dz.shape[0]))
    for k in range(0, rows.numel(), step):
        s = slice(k, k + step)
        torch.sum(dz[:, rows[s]].to(dtype) * x[:, cols[s]].to(dtype), 0, out=out[s])
    return out


def grad_by_chunk(dz: Tensor, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense gradient a few rows at a time, and the entries read off each: never more than CHUNK numbers of it."""
    rows, cols = index.long()
    out = dz.new_empty(rows.numel(), dtype=dtype)
    step = max(1, CHUNK // max(1, x.shape[1]))
    starts = torch.arange(0, dz.shape[1] + step, step, device=index.device)
    bounds = torch.searchsorted(rows, starts).tolist()
    for k, (low, high) in enumerate(itertools.pairwise(bounds)):
        if low < high:
            G = whole.grad(dz[:, k * step : (k + 1) * step], x, dtype)
            out[low:high] = G[rows[low:high] - k * step, cols[low:high]]
    return out
