"""bitsandbytes' layers under PEFT's: what they compute in and return, which autocast decides for none of their products.

A Linear4bit computes in its compute_dtype and returns x's dtype. A Linear8bitLt computes in x's; on a GPU, and in eval mode
anywhere, it rounds x to int8 too, which the fused product does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.accelerated.reading import Found, Why
from fastpeft.packed import packed_base


def packed(module: Any, kind: str, x: Tensor, autocast: torch.dtype | None, found: Found) -> tuple[Any, torch.dtype] | Why:
    """The view of its weight, in the dtype that it computes in, and the dtype that it returns; or why PEFT's forward runs."""
    dtype, out = x.dtype, x.dtype
    if kind == "Linear4bit":
        if getattr(module, "compute_type_is_set", True) is False:  # chosen at its first call, from x
            module.set_compute_type(x)
            module.compute_type_is_set = True
        dtype = module.compute_dtype or dtype
    else:
        if found.family == "adalora" and (autocast is not None or x.dtype is not torch.float32):
            return Why("PEFT's AdaLoRA over 8 bits returns float32 whatever comes in")
        if autocast is not None and x.device.type != "cuda" and module.training:
            dtype, out = autocast, autocast
    if autocast is not None and dtype not in (autocast, torch.float32):
        return Why(f"the base layer computes in {dtype} under autocast to {autocast}")
    try:
        return packed_base(module, dtype), out
    except (ValueError, TypeError) as error:
        return Why(str(error))
