"""Dropout from one counter-based generator: nothing is stored, every pass regenerates the same mask from a seed.

Philox4x32 with 7 rounds (Salmon et al., SC'11, whose table shows 7 rounds passing BigCrush). Key: the two halves of the
64-bit seed. Counter: (column // 8, row, 0, 0). Its 128 bits are eight 16-bit draws, low half of each word first; column i
takes draw i % 8 and is kept iff draw >= round(p * 65536). Sixteen bits halve the integer work of a kernel; p is thereby
quantised to 1/65536, and kept values are multiplied by 1 / (1 - p). Terms with another p compare the same draws, so a larger
p drops a superset. The same bits come from the torch code here and from csrc/dropout.h.

The two operations are registered in torch.library (fake and CPU/CUDA implementations, no autograd formula: only
autograd.Functions call them).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
ROUNDS = 7


def _load_extension() -> ModuleType | None:
    """fastpeft._C where it was built. One that was built and cannot be loaded raises: that is no reason to run slower."""
    try:
        import fastpeft._C as extension
    except ModuleNotFoundError:
        return None
    return extension


_EXTENSION = _load_extension()
# the codes of csrc/dropout_cpu.h
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def backend() -> str:
    """What drops on the CPU: "c++" where the extension was built and FASTPEFT_IMPL is not "torch", else "torch".

    Both give the same bits (a NaN stays a NaN, of whatever payload). CUDA tensors always take the torch code.
    """
    return "torch" if _EXTENSION is None or os.environ.get("FASTPEFT_IMPL") == "torch" else "c++"


def draw_seed(device: torch.device | str) -> Tensor:
    """A 0-dim int64 seed on `device`, from torch's own generator: checkpointing and CUDA graphs replay it."""
    return torch.randint(2**63 - 1, (), device=device)


def dropout_mask(
    seed: Tensor | int, shape: Sequence[int], p: float, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The mask of `shape` [..., columns] that the library uses for `seed` and p: 0 where dropped, 1 / (1 - p) elsewhere.

    seed: 0-dim int64 tensor, or an int.   Leading dimensions are flattened to rows (tokens), as adapted_linear does.
    dtype: float64 by default, so that an oracle in any dtype loses nothing: `x * dropout_mask(seed, x.shape, p).to(x.dtype)`.
    Raises ValueError if p is not in [0, 1) (NaN is not) or shape has no dimension.
    """
    _check_p("dropout_mask", p)
    if len(shape) == 0:
        raise ValueError("dropout_mask: shape is (); it needs at least one dimension, the columns; pass the shape of x.")
    if not isinstance(seed, Tensor):
        # torch holds 64 bits as signed: a seed above 2**63 keeps its bits
        seed = torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64)
    keep = _keep(seed, math.prod(shape[:-1]), int(shape[-1]), p, 0)
    return keep.to(dtype).mul_(1.0 / (1.0 - p)).reshape(tuple(shape))


def dropout(x: Tensor, seed: Tensor, p: float, row0: int = 0) -> Tensor:
    """x * mask -> contiguous, of x's dtype; row r of x is row row0 + r of the mask. NaN and Inf times 0 are NaN.

    x: [rows, cols] of any strides and float dtype.   seed: 0-dim int64 on x's device.
    Without an autograd formula. Raises ValueError if p is not in [0, 1) or x has not two dimensions.
    """
    _check_p("dropout", p)
    return _DROPOUT(x, seed, p, row0)


def dropout_add_(y: Tensor, x: Tensor, seed: Tensor, p: float, row0: int = 0) -> None:
    """y += x * mask in place, with the mask of dropout(x, seed, p, row0).

    y, x: [rows, cols] of any strides and float dtypes; y must not overlap x or itself. Product and sum are formed in fp64 if
    either is fp64, else in fp32, and rounded to y's dtype once.
    Without an autograd formula. Raises ValueError if p is not in [0, 1) or the shapes are not two equal [rows, cols].
    """
    _check_p("dropout_add_", p)
    _DROPOUT_ADD(y, x, seed, p, row0)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = ROUNDS) -> list[Tensor]:
    """Philox4x32: four counter words and two key words (int64 tensors holding 32 bits) -> four words of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for n in range(rounds):
        if n:
            k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
        # int64 products wrap modulo 2^64; the arithmetic shift and the mask still yield the exact high word
        a, b = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((b >> 32) & _MASK32) ^ c1 ^ k0, b & _MASK32, ((a >> 32) & _MASK32) ^ c3 ^ k1, a & _MASK32
    return [c0, c1, c2, c3]


def _keep(seed: Tensor, rows: int, cols: int, p: float, row0: int) -> Tensor:
    """Boolean keep mask [rows, cols]."""
    seed = seed.to(torch.int64)
    groups = (cols + 7) // 8
    g = torch.arange(groups, device=seed.device)[None, :].expand(rows, groups)
    # counters are 32-bit words: rows repeat after 2^32
    t = ((torch.arange(rows, device=seed.device) + row0) & _MASK32)[:, None].expand(rows, groups)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = philox((g, t, zero, zero), (seed & _MASK32, (seed >> 32) & _MASK32))
    draws = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=2)
    return (draws >= _threshold(p)).view(rows, groups * 8)[:, :cols]


def _threshold(p: float) -> int:
    return min(65536, max(0, round(p * 65536)))


def _check_p(who: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{who}: p={p}; it must be at least 0 and less than 1; p=0 keeps everything.")


def _check_shapes(y: Tensor, x: Tensor) -> None:
    if x.dim() != 2 or y.shape != x.shape:
        raise ValueError(
            f"dropout: got {tuple(x.shape)} for {tuple(y.shape)}; both must be the same [rows, cols]; flatten to tokens first."
        )


def _masked(x: Tensor, wide: torch.dtype, seed: Tensor, p: float, row0: int) -> Tensor:
    factor = _keep(seed, x.shape[0], x.shape[1], p, row0).to(wide).mul_(1.0 / (1.0 - p))
    return factor.mul_(x)


def _dropout_torch(x: Tensor, seed: Tensor, p: float, row0: int) -> Tensor:
    _check_shapes(x, x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(
        _masked(x, torch.promote_types(x.dtype, torch.float32), seed, p, row0)
    )


def _dropout_add_torch(y: Tensor, x: Tensor, seed: Tensor, p: float, row0: int) -> None:
    _check_shapes(y, x)
    wide = torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)
    y.copy_(_masked(x, wide, seed, p, row0).add_(y))


def _dropout_cpu(x: Tensor, seed: Tensor, p: float, row0: int) -> Tensor:
    if _EXTENSION is None or backend() == "torch" or x.dtype not in _DTYPES:
        return _dropout_torch(x, seed, p, row0)
    out = torch.empty(x.shape, dtype=x.dtype)
    _run(_EXTENSION, out, x, False, seed, p, row0)
    return out


def _dropout_add_cpu(y: Tensor, x: Tensor, seed: Tensor, p: float, row0: int) -> None:
    if _EXTENSION is None or backend() == "torch" or x.dtype not in _DTYPES or y.dtype not in _DTYPES:
        _dropout_add_torch(y, x, seed, p, row0)
        return
    _run(_EXTENSION, y, x, True, seed, p, row0)


def _run(extension: ModuleType, y: Tensor, x: Tensor, add: bool, seed: Tensor, p: float, row0: int) -> None:
    _check_shapes(y, x)  # the compiled loops trust what they are given
    rows, cols = x.shape
    extension.dropout(
        y.data_ptr(), *y.stride(), _DTYPES[y.dtype], x.data_ptr(), *x.stride(), _DTYPES[x.dtype], add,
        int(seed.item()) & 0xFFFFFFFFFFFFFFFF, row0, rows, cols, _threshold(p), 1.0 / (1.0 - p), torch.get_num_threads(),
    )  # fmt: skip


def _dropout_fake(x: Tensor, seed: Tensor, p: float, row0: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _dropout_add_fake(y: Tensor, x: Tensor, seed: Tensor, p: float, row0: int) -> None:
    return None


_LIBRARY = torch.library.Library("fastpeft", "FRAGMENT")
_LIBRARY.define("dropout(Tensor x, Tensor seed, float p, SymInt row0) -> Tensor")
_LIBRARY.define("dropout_add_(Tensor(a!) y, Tensor x, Tensor seed, float p, SymInt row0) -> ()")
_LIBRARY.impl("dropout", _dropout_cpu, "CPU")
_LIBRARY.impl("dropout", _dropout_torch, "CUDA")
_LIBRARY.impl("dropout_add_", _dropout_add_cpu, "CPU")
_LIBRARY.impl("dropout_add_", _dropout_add_torch, "CUDA")
torch.library.register_fake("fastpeft::dropout", _dropout_fake, lib=_LIBRARY)
torch.library.register_fake("fastpeft::dropout_add_", _dropout_add_fake, lib=_LIBRARY)

# looked up once: resolving torch.ops.fastpeft.dropout costs microseconds a call
_DROPOUT = torch.ops.fastpeft.dropout.default
_DROPOUT_ADD = torch.ops.fastpeft.dropout_add_.default
