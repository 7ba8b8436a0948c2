"""A weight in 8-bit integers with one scale per row (LLM.int8(), arXiv 2208.07339; bitsandbytes' "vectorwise").

    W[i, j] = codes[i, j] * (absmax[i] / 127)      formed in fp32, rounded to W's dtype once;  codes int8 [out, in], absmax [out]

absmax / 127 is absmax times the fp32 number nearest to 1/127, as in bitsandbytes' own products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops import lowrank
from fastpeft.ops import nf4_cpu as cpu
from fastpeft.ops.family import resolve
from fastpeft.ops.library import register
from fastpeft.ops.slabs import slabs_of


@torch.no_grad()
def quantise(W: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in] of any float dtype -> codes int8 [out, in], absmax fp32 [out]; a row of zeros has absmax 0.

    Nearest integer, ties to even, in fp32. (bitsandbytes rounds W to fp16 first; of an fp16 weight the codes are its own.)
    ValueError if W is not finite.
    """
    if not W.is_floating_point() or W.dim() != 2:
        raise TypeError(f"int8.quantise: W is {W.dtype} {tuple(W.shape)}; it must be a float matrix, and not quantised already.")
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    absmax = torch.linalg.vector_norm(W, torch.inf, 1).float() if W.shape[1] else W.new_zeros(W.shape[0], dtype=torch.float32)
    if not bool(absmax.isfinite().all()):
        raise ValueError("int8.quantise: the weight has NaN or infinite entries, for which there are no codes.")
    factor = torch.where(absmax == 0, 0.0, 127.0 / absmax)[:, None]
    for s in slabs_of(W, 4):
        codes[s] = (W[s].float() * factor[s]).round().clamp(-127, 127).to(torch.int8)
    return codes, absmax


def fill(out: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """out [out, in], contiguous, of any float dtype = the weight."""
    if resolve(None, out.device.type, out.dtype) is not lowrank:
        from fastpeft.ops import nf4_triton

        nf4_triton.fill_rows(out, codes, absmax)
    elif cpu.runs(out):
        cpu.fill_rows(out, codes, absmax)
    else:
        fill_torch(out, codes, absmax)


def fill_torch(out: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """The reference; on any device."""
    scale = (absmax * (1.0 / 127.0))[:, None]
    for s in slabs_of(out, 4):
        out[s].copy_(codes[s].float().mul_(scale[s]))


def dequantise(codes: Tensor, absmax: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """A fresh weight in `dtype`; `after` as in nf4.dequantise."""
    return _DEQUANTISE(codes, absmax, dtype, after)


def _run(codes: Tensor, absmax: Tensor, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    fill(out, codes, absmax)
    return out


def _fake(codes: Tensor, absmax: Tensor, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


register(
    [("int8_dequantise(Tensor codes, Tensor absmax, ScalarType dtype, Tensor? after) -> Tensor", _run, _fake)], "CPU", "CUDA"
)

_DEQUANTISE = torch.ops.fastpeft.int8_dequantise.default
