"""The base layer under a PEFT layer as a view for the fused products, and whether a call fits it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.accelerated.packed import packed
from fastpeft.accelerated.reading import OWN, Found, Why, observed
from fastpeft.adapter import has_linear_forward, is_conv1d
from fastpeft.base import Plain
from fastpeft.packed import kind_of

PACKED = ("Linear4bit", "Linear8bitLt")
TRANSFORMED = Why("a functorch transform, forward-mode differentiation or torch.jit.trace is at work")


class Ready(NamedTuple):
    """base, bias, inner: what run_terms takes.   x: in the dtype that it takes.   out: the dtype that PEFT would return.

    alone: whether autocast has no say in the product: bitsandbytes computes in a dtype of its own.
    """

    base: Any
    bias: Tensor | None
    x: Tensor
    out: torch.dtype
    inner: torch.dtype | None
    alone: bool


def ready(layer: Any, found: Found, x: Tensor) -> Ready | Why:
    """The base layer for this x, or why PEFT's own forward runs: its result would not be the fused one's."""
    module = layer._modules["base_layer"]
    device = x.device
    if type(x) not in OWN or x.dim() == 0 or device.type == "meta":
        return Why(f"the input is a {type(x).__name__} on {device.type}, or has no dimension")
    if not torch.compiler.is_compiling() and _transformed():
        return TRANSFORMED
    kind = base_layer(module)
    if type(kind) is Why:
        return kind
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    own = kind in PACKED
    if own:
        seen = packed(module, kind, x, autocast, found)
        if type(seen) is Why:
            return seen
        view, out = seen
        dtype, wants = view.dtype, x.dtype if autocast is not None else view.dtype
    else:
        W = module.weight
        # PEFT's SHiRA reads the weight without autograd
        W = W.detach() if found.rounds else W
        view, wants = Plain(W.t() if kind == "Conv1D" else W), W.dtype
        dtype = wants if autocast is None else autocast
        out = x.dtype if found.like_x else dtype
    if device != view.device or x.shape[-1] != view.in_features:
        return Why("the input does not fit the base weight; PEFT says how")
    if autocast is None and x.dtype is not wants:
        return Why(f"the input is {x.dtype} and the base computes in {wants}")
    if autocast is not None and torch.float64 in (x.dtype, wants):
        return Why("float64 under autocast")
    why = adapters(found, device)
    if why is not None:
        return why
    inner = None
    if autocast is None and not found.rounds:
        for t in found.tensors:
            if t.dtype is not dtype:
                if not layer.cast_input_dtype_enabled:
                    return Why("casting the input to the adapter's dtype is disabled")
                inner = torch.promote_types(inner or dtype, t.dtype)
        inner = None if inner is dtype else inner
        if inner is not None and found.second:
            return Why(f"DoRA with dropout in {inner} on a {dtype} base without autocast: PEFT's second base product is in {inner}")
    bias = module.bias
    if own:
        x = x if x.dtype is dtype else x.to(dtype)
        bias = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
    return Ready(view, bias, x, out, inner, own and autocast is not None)


def adapters(found: Found, device: torch.device) -> Why | None:
    """Why these tensors of an adapter cannot be computed in a fused product on this device, if so."""
    for t in found.tensors:
        if type(t) not in OWN or t.device != device:
            return Why(f"an adapter's tensor is a {type(t).__name__} on {t.device}, the base weight lies on {device}")
    return None


def base_layer(module: nn.Module, *, weight: bool = True) -> str | Why:
    """What the module under a PEFT layer is: Linear, Conv1D, Linear4bit or Linear8bitLt; or why no fused product computes it.

    weight: whether to look at its weight.
    """
    cls = type(module)
    kind = "Linear"
    if cls is not nn.Linear:
        known = kind_of(cls) or ("Conv1D" if is_conv1d(module) else None)
        if known is None and not has_linear_forward(cls):
            return Why(f"the base layer is a {cls.__module__}.{cls.__qualname__}")
        kind = known or kind
    if observed(module):
        return Why("the base layer has hooks, or a forward of its own")
    if weight and kind not in PACKED:
        W: Any = module.weight
        if type(W) not in OWN or not W.is_floating_point():
            return Why(f"the base weight is a {type(W).__name__} of {W.dtype}")
    return kind


def _transformed() -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
