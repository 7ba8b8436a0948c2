"""Every operator of the sparse family in Triton, torch and CUDA C++: the values' gradient, the copy of W, and the window.

The gradient is held against dz^T x in fp64, with the product in fp32 as yardstick. A sum of two numbers and a move of bits
have one right answer: there equal bits are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.operators import lay as lay_any
from bench.gpu.part_operators import Case, compared
from fastpeft.ops import sparse, sparse_cuda, sparse_triton

F32 = torch.float32
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
# dz [t, out], x [t, in], index -> [nnz] in fp32
TRITON: dict[str, Gradient] = {
    "grad": lambda dz, x, index: sparse_triton.grad(dz, x, index),
    "grad by sddmm": lambda dz, x, index: sparse_triton.grad(dz, x, index, route="sddmm"),
    "grad by tile": lambda dz, x, index: sparse_triton.grad(dz, x, index, route="tile"),
}
TORCH: dict[str, Gradient] = {
    "grad by entry": lambda dz, x, index: sparse.grad_by_entry(dz, x, index, F32),
    "grad by chunk": lambda dz, x, index: sparse.grad_by_chunk(dz, x, index, F32),
}
CUDA: dict[str, Gradient] = {"grad": sparse_cuda.grad}


@dataclass
class Inputs:
    """x [t, in], dz [t, out], W [out, in] of one dtype; values [nnz] and index [2, nnz]."""

    case: Case
    x: Tensor
    dz: Tensor
    W: Tensor
    values: Tensor
    index: Tensor


def lay(t: Tensor, layout: str) -> Tensor:
    """As bench.gpu.operators lays it, and "padded": rows of a wider matrix, columns of stride 1."""
    if layout != "padded":
        return lay_any(t, layout)
    around = torch.full((len(t), t.shape[1] + 3), float("nan"), dtype=t.dtype, device=t.device)
    around[:, : t.shape[1]] = t
    return around[:, : t.shape[1]]


def support(out: int, size: int, nnz: int, device: str) -> Tensor:
    """int32 [2, nnz]: entries of a [out, size] matrix drawn at random, in row-major order."""
    flat = torch.randperm(out * size, device=device)[:nnz].sort().values
    return torch.stack([flat // size, flat % size]).to(torch.int32)


def make(case: Case, device: str) -> Inputs:
    torch.manual_seed(0)
    t, (i, o, nnz) = case.tokens, case.size

    def normal(*shape: int, layout: str = case.layout) -> Tensor:
        return lay(torch.randn(*shape, device=device).to(case.dtype), layout)

    W = normal(o, i, layout="plain" if case.layout == "far" else case.layout)
    values = torch.randn(nnz, device=device).to(case.factor)
    return Inputs(case, normal(t, i), normal(t, o), W, values, support(o, i, nnz, device))


def gradient(m: Inputs, call: Gradient) -> tuple[float, list[str]]:
    """Its error, and what is wrong with it."""
    at = tuple(m.index.long())
    want, near = ((m.dz.to(d).T @ m.x.to(d))[at] for d in (torch.float64, F32))
    return compared("dvalues", call(m.dz, m.x, m.index), want, near)


def scattered(m: Inputs) -> Tensor:
    """W with W + value at the entries, added in fp32 and rounded once."""
    want, at = m.W.clone(), tuple(m.index.long())
    want[at] = (m.W[at].float() + m.values.float()).to(m.W.dtype)
    return want


def copy(m: Inputs, code: Any) -> list[str]:
    """What is wrong with a copy into memory full of NaN, and whether W is as it was."""
    out = lay(torch.full_like(m.W, float("nan"), memory_format=torch.contiguous_format), m.case.layout)
    before = m.W.clone()
    code.copy(m.W, m.values, m.index, out)
    return _differing({"out": (out, scattered(m)), "W": (m.W, before)})


def window(m: Inputs, code: Any) -> list[str]:
    """What is wrong with W while the entries are in it, with what was kept, and with W after."""
    want, before, at = scattered(m), m.W.clone(), tuple(m.index.long())
    saved = code.put(m.W, m.values, m.index)
    found = _differing({"W": (m.W, want), "saved": (saved, before[at])})
    code.restore(m.W, m.index, saved)
    return found + _differing({"W after": (m.W, before)})


SCATTERS: dict[str, Callable[[Inputs, Any], list[str]]] = {"copy": copy, "put, restore": window}


def gather(m: Inputs) -> list[str]:
    """sparse_cuda.gather of a dense gradient in two chunks of rows, then added to itself."""
    G = m.dz.float().T @ m.x.float()
    out, half = torch.full_like(m.values, float("nan"), dtype=F32), len(G) // 2
    cut = int((m.index[0] < half).sum())
    parts = ((G[:half], 0, 0, cut), (G[half:], half, cut, m.index.shape[1]))
    want = G[tuple(m.index.long())]
    for part in parts:
        sparse_cuda.gather(out, part[0], m.index, *part[1:])
    found = _differing({"out": (out, want)})
    for part in parts:
        sparse_cuda.gather(out, part[0], m.index, *part[1:], accumulate=True)
    return found + _differing({"out added to": (out, want + want)})


def _differing(pairs: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    return [f"{name} has other bits" for name, (got, want) in pairs.items() if not torch.equal(got, want)]
