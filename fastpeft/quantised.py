"""Quantised bases: a weight stored in few bits and computed with as the dense weight that it stands for.

    NF4     W = levels[code] * absmax of its block      2 to 8 bits, 4 unless told (fastpeft.ops.nf4)
    Int8    W = code * absmax of its row / 127          (fastpeft.ops.int8)

W is rounded to `dtype` once, and is the same tensor for everything: products, norms, merge. It is made in one pass into a
workspace that all layers share, once per direction of a call: products in a row (DoRA's norm and the layer's own) read it from
there. Nothing of its size is kept for backward, which makes it again, also where torch.compile plans memory.

A base is a view made for one call, as its `view()` does: its tensors must not change while it lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.base import Base, Plain
from fastpeft.ops import int8, nf4
from fastpeft.ops.lowrank_cpu import OWN
from fastpeft.ops.nf4 import Nested, Packed
from fastpeft.ops.workspace import filled


class Quantised(Base):
    """Base of what is stored in another form: `_fill(out)` writes it, `_fresh(dtype, after)` makes it by an operator."""

    __slots__ = ("__weakref__", "after", "codes", "dtype", "shape")

    codes: Tensor

    def __init__(self, codes: Tensor, shape: tuple[int, int], dtype: torch.dtype, after: Tensor | None = None):
        self.codes, self.shape, self.dtype, self.after = codes, shape, dtype, after

    def _fill(self, out: Tensor) -> None:
        raise NotImplementedError

    def _fresh(self, dtype: torch.dtype, after: Tensor | None) -> Tensor:
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def weight(self, after: Tensor | None = None) -> Tensor:
        return self._weight(self.dtype, after)

    def _weight(self, dtype: torch.dtype, after: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or type(self.codes) not in OWN:
            return self._fresh(dtype, self.after if after is None else after)
        return filled(self, self.shape[0], self.shape[1], dtype, self.codes.device, self._fill)

    def _plain(self, dtype: torch.dtype, after: Tensor | None = None) -> Plain:
        """W for products with tensors of `dtype`: in that dtype at once where rounding to the base's own first changes nothing."""
        return Plain(self._weight(dtype if self.dtype.itemsize >= 4 else self.dtype, after))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._plain(x.dtype).forward(x, bias)

    def forward_onto(self, z: Tensor, x: Tensor) -> None:
        self._plain(x.dtype).forward_onto(z, x)

    def grad_linear(self, dz: Tensor, gain: Tensor | None = None) -> Tensor:
        return self._plain(dz.dtype, dz).grad_linear(dz, gain)

    def grad_onto(self, dx: Tensor, dz: Tensor, gain: Tensor | None = None) -> None:
        self._plain(dz.dtype, dz).grad_onto(dx, dz, gain)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of W [out, in] in `dtype`."""
        return self._fresh(self.dtype, None).to(dtype)


class NF4(Quantised):
    """codes uint8 [bytes], absmax [blocks] of a weight `shape` = (out, in); levels and nested as in fastpeft.ops.nf4.Packed."""

    __slots__ = ("packed",)

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        bits: int = 4,
        block: int = 64,
        levels: Tensor | None = None,
        nested: Nested | None = None,
        after: Tensor | None = None,
    ):
        super().__init__(codes, shape, dtype, after)
        self.packed = Packed(codes, absmax, bits, block, levels, nested)

    @classmethod
    def quantise(cls, W: Tensor, bits: int = 4, block: int = 64) -> NF4:
        """W [out, in] in blocks of `block` numbers, row by row; computes in W's dtype. ValueError if the block does not divide it."""
        return cls(*nf4.quantise(W, bits, block), _shape(W), W.dtype, bits=bits, block=block)

    def in_backward(self, d: Tensor) -> NF4:
        if not torch.compiler.is_compiling():
            return self
        codes, absmax, bits, block, levels, nested = self.packed
        return NF4(codes, absmax, self.shape, self.dtype, bits=bits, block=block, levels=levels, nested=nested, after=d)

    def _fill(self, out: Tensor) -> None:
        nf4.fill(out, self.packed)

    def _fresh(self, dtype: torch.dtype, after: Tensor | None) -> Tensor:
        return nf4.dequantise(self.packed, self.shape[0], self.shape[1], dtype, after)


class Int8(Quantised):
    """codes int8 [out, in], absmax fp32 [out]."""

    __slots__ = ("absmax",)

    def __init__(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype, *, after: Tensor | None = None):
        super().__init__(codes, (codes.shape[0], codes.shape[1]), dtype, after)
        self.absmax = absmax

    @classmethod
    def quantise(cls, W: Tensor) -> Int8:
        """W [out, in], each row by its own largest number; computes in W's dtype."""
        return cls(*int8.quantise(W), W.dtype)

    def in_backward(self, d: Tensor) -> Int8:
        return Int8(self.codes, self.absmax, self.dtype, after=d) if torch.compiler.is_compiling() else self

    def _fill(self, out: Tensor) -> None:
        int8.fill(out, self.codes, self.absmax)

    def _fresh(self, dtype: torch.dtype, after: Tensor | None) -> Tensor:
        return int8.dequantise(self.codes, self.absmax, dtype, after)


class Stored(nn.Module):
    """Holds a quantised weight as the buffers `codes` and `absmax`, in the state dict under these names; `view()` is the base.

    Moves and deepcopies as any module. A change of dtype (half, bfloat16, double, to) changes what the base computes in, `dtype`;
    absmax stays fp32.
    """

    codes: Tensor
    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def view(self) -> Any:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        self.absmax = self.absmax.view(torch.int32)  # integers are moved, and never cast
        try:
            super()._apply(fn, recurse)
        finally:
            self.absmax = self.absmax.view(torch.float32)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


class NF4Weight(Stored):
    """A weight `shape` = (out, in) in `bits` bits; `NF4Weight.quantise(W)` makes one, `view()` gives the base NF4."""

    def __init__(
        self, codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype, *, bits: int = 4, block: int = 64
    ):
        super().__init__(codes, absmax, dtype)
        self.shape, self.bits, self.block = shape, bits, block

    @classmethod
    def quantise(cls, W: Tensor, bits: int = 4, block: int = 64) -> NF4Weight:
        return cls(*nf4.quantise(W, bits, block), _shape(W), W.dtype, bits=bits, block=block)

    @classmethod
    def empty(cls, W: Tensor, bits: int = 4, block: int = 64) -> NF4Weight:
        """Room for what `quantise` would make of W, where that is to be loaded."""
        nf4.check(W, bits, block)
        codes = torch.zeros(W.numel() // nf4.per_byte(bits), dtype=torch.uint8, device=W.device)
        absmax = torch.zeros(W.numel() // block, dtype=torch.float32, device=W.device)
        return cls(codes, absmax, _shape(W), W.dtype, bits=bits, block=block)

    def view(self) -> NF4:
        return NF4(self.codes, self.absmax, self.shape, self.dtype, bits=self.bits, block=self.block)

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.bits} bits, blocks of {self.block}, {self.dtype}"


class Int8Weight(Stored):
    """A weight in int8 with one scale per row; `Int8Weight.quantise(W)` makes one, `view()` gives the base Int8."""

    @classmethod
    def quantise(cls, W: Tensor) -> Int8Weight:
        return cls(*int8.quantise(W), W.dtype)

    @classmethod
    def empty(cls, W: Tensor) -> Int8Weight:
        """Room for what `quantise` would make of W, where that is to be loaded."""
        absmax = torch.zeros(W.shape[0], dtype=torch.float32, device=W.device)
        return cls(torch.zeros(W.shape, dtype=torch.int8, device=W.device), absmax, W.dtype)

    def view(self) -> Int8:
        return Int8(self.codes, self.absmax, self.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.codes.shape)}, int8 by rows, {self.dtype}"


KINDS = (*(f"nf{bits}" for bits in nf4.BITS), "int8")


def store(name: str, base: Any, kind: str) -> Stored:
    """The dense weight of `base`, quantised as `kind` of KINDS and computing in its dtype; name: of the layer, for errors.

    A weight on the meta device gives room only. No checkpoint holds the result: it is made again from the weight, to the bit.
    ValueError for another kind, a base that is no dense weight, or one that blocks of 64 do not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"adapt: quantize={kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    if base.W is None:
        raise ValueError(f"adapt: the weight of {name!r} is no dense tensor, so quantize={kind!r} cannot store it; leave it out.")
    W = base.W.detach()
    make: Any = Int8Weight if kind == "int8" else NF4Weight
    options = () if kind == "int8" else (int(kind[2:]),)
    try:
        return make.empty(W, *options) if W.device.type == "meta" else make.quantise(W, *options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapt: quantize={kind!r} cannot store the weight of {name!r}: {error}") from error


def _shape(W: Tensor) -> tuple[int, int]:
    return W.shape[0], W.shape[1]
