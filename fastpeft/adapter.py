"""What an adapted layer carries, and the classes a layer changes into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.base import Plain
from fastpeft.linear import check_input, run_terms
from fastpeft.registry import Method, Recipe, Site, check_options, get_recipe
from fastpeft.terms import Term


class Adapter(nn.Module):
    """The methods of one site, by recipe name: their parameters are `<path>.adapter.<recipe>.<parameter>`."""

    def __init__(self, methods: Mapping[str, Method]):
        super().__init__()
        for name, m in methods.items():
            self.add_module(name, m)
        self.enabled = True

    def terms(self, base: Any) -> list[Term]:
        return [term for m in self._modules.values() for term in m.terms(base)]


class AdaptedLinear(nn.Linear):
    """nn.Linear with an adapter: y = gain * (x W^T + sum of terms(x)) + bias.

    `fastpeft.adapt` turns existing layers into this class in place. As a module of its own:
    AdaptedLinear(1024, 1024, method="dora", rank=8); weight and bias are initialised as nn.Linear's, and frozen.

    in_features, out_features, bias, device, dtype: as nn.Linear.   method: recipe name or list of names.
    options: the methods' options; ValueError lists what exists.
    """

    adapter: Adapter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        method: str | list[str] = "lora",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.adapter = build_adapter("linear", Plain(self.weight), recipes(method, options), options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, method: str | list[str] = "lora", **options: Any) -> AdaptedLinear:
        """A new module that shares `linear`'s weight and bias parameters (which are frozen) and adds an adapter."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"AdaptedLinear.from_linear: got {type(linear).__name__}; it takes an nn.Linear.")
        adapter = build_adapter("linear", Plain(linear.weight), recipes(method, options), options)
        if any(m.overlay for m in adapter.children()):
            raise ValueError("AdaptedLinear.from_linear: overlay=True would change the weight of the linear that was given too.")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        new.requires_grad_(False)
        new.adapter = adapter
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return adapted_forward(self, input, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        release(self)  # an overlay in the weight would count twice where the adapter is saved too
        super()._save_to_state_dict(destination, prefix, keep_vars)


def adapted_forward(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The forward of every adapted layer; weight [out, in] is the module's own, transposed where it stores [in, out]."""
    adapter = module.adapter
    if not adapter.enabled:
        if x.requires_grad and torch.is_grad_enabled() and any(m.overlay for m in adapter.children()):
            raise RuntimeError(
                "adapters_off: this layer has overlay=True, so its weight is another one by the time of a backward; run the "
                "reference forward under torch.no_grad(), or adapt with apply='copy'."
            )
        return F.linear(x, weight, module.bias)
    base = Plain(weight)
    check_input(x, base)
    return run_terms(x, base, module.bias, adapter.terms(base))


def release(module: Any) -> None:
    """Put the weight of an adapted layer back as it was, where a method holds it changed between forwards."""
    for method in module.adapter.children():
        method.release(weight_of(module).detach())


def recipes(method: str | list[str], options: Mapping[str, Any]) -> list[Recipe]:
    """The named recipes, after checking that every option belongs to one of them."""
    names = [method] if isinstance(method, str) else list(method)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"adapt: methods {names}; give one name, or a list of different names.")
    found = [get_recipe(name) for name in names]
    check_options(names, options)
    return found


def build_adapter(name: str, base: Any, found: list[Recipe], options: Mapping[str, Any]) -> Adapter:
    """The adapter of one linear layer; ValueError for two methods with a gain, or one that does not sit on a linear."""
    for r in found:
        if r.site != "linear":
            raise ValueError(
                f"adapt: {r.name} sits beside a whole {r.site} and not on a linear layer ({name!r}); call fastpeft.adapt on a "
                f"model that holds the {r.site}."
            )
    built = build_methods(name, base, found, options)
    if sum("gain" in m.ROLES.values() for m in built.values()) > 1:
        raise ValueError(f"adapt: {list(built)} both scale the output; two gains at one layer do not compose. Choose one.")
    return Adapter(built)


def build_methods(name: str, base: Any, found: list[Recipe], options: Mapping[str, Any]) -> dict[str, Method]:
    """The methods of one site. Parameters are fp32 on a 16-bit base (optimiser steps vanish in bf16), else the base's dtype."""
    site = Site(name, base, torch.promote_types(base.dtype, torch.float32))
    return {r.name: r.build(site, {k: v for k, v in options.items() if k in r.options}) for r in found}


_CLASSES: dict[type, type] = {nn.Linear: AdaptedLinear}


def adapted_class(cls: type) -> type:
    """The class that a layer of class `cls` changes into: AdaptedLinear, or a subclass of it and of `cls`.

    cls must be nn.Linear, a subclass that does not override forward, or Transformers' Conv1D.
    """
    if cls not in _CLASSES:
        if issubclass(cls, nn.Linear):
            _CLASSES[cls] = type(f"Adapted{cls.__name__}", (AdaptedLinear, cls), {"__module__": cls.__module__})
        else:
            own = {"forward": _conv1d_forward, "_save_to_state_dict": _conv1d_save, "__module__": cls.__module__}
            _CLASSES[cls] = type("AdaptedConv1DLinear", (cls,), own)
    return _CLASSES[cls]


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:
    return adapted_forward(self, x, self.weight.t())


def _conv1d_save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    release(self)
    super(type(self), self)._save_to_state_dict(destination, prefix, keep_vars)


def is_conv1d(module: nn.Module) -> bool:
    """True for Transformers' Conv1D (weight stored [in, out]), told by name so that Transformers is not imported."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear or Conv1D as [out, in]."""
    weight: Any = module.weight
    return weight.t() if is_conv1d(module) else weight


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module._modules.get("adapter"), Adapter)
