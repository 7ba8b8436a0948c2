"""bitsandbytes' linear layers as bases: their own packed tensors, read where they lie and never copied.

bitsandbytes itself is not imported: a layer of its that exists has done that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.ops.nf4 import Nested
from fastpeft.packed import kind_of
from fastpeft.quantised import NF4, Int8, Quantised


def base_of(module: nn.Module, dtype: torch.dtype | None = None) -> Quantised:
    """The base of a Linear4bit (NF4 or FP4, with or without double quantisation) or Linear8bitLt that has been quantised.

    dtype: what it computes in. None takes a Linear4bit's compute_dtype, or the dtype that its weight had; a Linear8bitLt
    remembers neither: its bias's, or fp16 without one. The dense weight is bitsandbytes' own to the bit. A Linear8bitLt
    computes with it here and does not round x to int8 (bitsandbytes' law in training on a CPU, and the more exact one).
    TypeError for another layer; ValueError for one whose weight is not quantised yet, or that bitsandbytes repacked.
    """
    kind = kind_of(type(module))
    if kind is None:
        raise TypeError(f"bitsandbytes.base_of: got {type(module).__name__}; it takes a Linear4bit or Linear8bitLt of bitsandbytes.")
    return _four_bits(module, dtype) if kind == "Linear4bit" else _eight_bits(module, dtype)


def _four_bits(module: Any, dtype: torch.dtype | None) -> NF4:
    # FSDP may turn the parameter into a plain one; the module keeps the state
    state = getattr(module.weight, "quant_state", None)
    state = module.quant_state if state is None else state
    if state is None:
        raise ValueError(_unquantised(module))
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes: this {type(module).__name__} was used in eval mode on a CPU, for which bitsandbytes repacked its "
            "weight and rounded its scales to bfloat16; load the model again, and adapt it before that."
        )
    if tuple(state.shape) != (module.out_features, module.in_features):
        raise ValueError(
            f"bitsandbytes: the weight was quantised as {tuple(state.shape)}, the layer is [out, in] = "
            f"({module.out_features}, {module.in_features}); quantise it in that orientation."
        )
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    dtype = dtype or module.compute_dtype or state.dtype
    shape = (module.out_features, module.in_features)
    codes = _bytes(module.weight)
    return NF4(codes, state.absmax, shape, dtype, bits=4, block=state.blocksize, levels=state.code, nested=nested)


def _eight_bits(module: Any, dtype: torch.dtype | None) -> Int8:
    codes = module.weight.data
    # its first forward moves the scales from the weight to the state
    absmax = getattr(module.weight, "SCB", None)
    absmax = module.state.SCB if absmax is None else absmax
    if codes.dtype is not torch.int8 or absmax is None:
        raise ValueError(_unquantised(module))
    if dtype is None:
        dtype = torch.float16 if module.bias is None else module.bias.dtype
    return Int8(codes, absmax, dtype)


def _bytes(weight: Tensor) -> Tensor:
    """The codes in order, whatever dtype they are kept in (quant_storage)."""
    return weight.data.reshape(-1).view(torch.uint8)


def _unquantised(module: nn.Module) -> str:
    return (
        f"bitsandbytes: the weight of this {type(module).__name__} is not quantised (bitsandbytes does that when the layer is moved "
        "to a device; Linear8bitLt only with has_fp16_weights=False); move it with .to(device) first."
    )
