"""What an adapted layer carries, and the classes a layer changes into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.base import Plain
from fastpeft.linear import check_input, run_terms
from fastpeft.packed import is_packed, packed_base, packed_forward
from fastpeft.registry import Holder, Method, Recipe, Site, check_options, get_recipe
from fastpeft.terms import Term

FREED = (
    "the base weight was replaced and let go (keep_base=False), so the layer cannot compute as before adapt; adapt with "
    "keep_base=True."
)


class Adapter(nn.Module):
    """The methods of one site, by recipe name: their parameters are `<path>.adapter.<recipe>.<parameter>`.

    base: a module that stands for the layer's weight where a start or `quantize` replaced it; `base.view()` is what ops see.
    """

    def __init__(self, methods: Mapping[str, Method], base: nn.Module | None = None):
        super().__init__()
        for name, m in methods.items():
            self.add_module(name, m)
        if base is not None:
            self.base = base
        self.enabled = True

    def methods(self) -> dict[str, Method]:
        """The methods by recipe name."""
        return {name: m for name, m in self._modules.items() if name != "base"}  # type: ignore[misc]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.methods())

    def terms(self, base: Any) -> list[Term]:
        return [term for name, m in self._modules.items() if name != "base" for term in m.terms(base)]  # type: ignore[union-attr,operator]


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
        _give(self, Plain(self.weight), method, options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, method: str | list[str] = "lora", **options: Any) -> AdaptedLinear:
        """A new module that shares `linear`'s weight and bias parameters (which are frozen) and adds an adapter."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"AdaptedLinear.from_linear: got {type(linear).__name__}; it takes an nn.Linear.")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        _give(new, Plain(linear.weight), method, options)
        if any(m.overlay for m in new.adapter.methods().values()):
            raise ValueError("AdaptedLinear.from_linear: overlay=True would change the weight of the linear that was given too.")
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        for parameter in (new.weight, new.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return adapted_forward(self, input, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        release(self)  # an overlay in the weight would count twice where the adapter is saved too
        super()._save_to_state_dict(destination, prefix, keep_vars)


def _give(layer: nn.Module, base: Plain, method: str | list[str], options: Mapping[str, Any]) -> None:
    """Give a layer that stands alone its adapter, and what that would share with others."""
    layer.adapter, holders = build_alone("linear", base, recipes(method, options), options)
    if holders:
        layer.adapter_shared = holders


def build_alone(name: str, base: Plain, found: list[Recipe], options: Mapping[str, Any]) -> tuple[Adapter, nn.ModuleDict]:
    """The adapter of a layer that shares with no other, and its holders."""
    holders, by_site = shared_holders(found, {name: (base, options)})
    return build_adapter(name, base, Build(found), options, by_site[name]), holders


def adapted_forward(module: Any, x: Tensor, weight: Tensor | None) -> Tensor:
    """The forward of every adapted layer; weight [out, in] is the module's own, transposed where it stores [in, out]."""
    adapter = module.adapter
    if not adapter.enabled:
        if weight is None:
            raise RuntimeError(f"adapters_off: {FREED}")
        if x.requires_grad and torch.is_grad_enabled() and any(m.overlay for m in adapter.methods().values()):
            raise RuntimeError(
                "adapters_off: this layer has overlay=True, so its weight is another one by the time of a backward; run the "
                "reference forward under torch.no_grad(), or adapt with apply='copy'."
            )
        return F.linear(x, weight, module.bias)
    stored = adapter._modules.get("base")
    base = Plain(weight) if stored is None else stored.view()
    check_input(x, base)
    terms = adapter.terms(base)
    if stored is None and len(terms) == 0:
        return F.linear(x, weight, module.bias)
    return run_terms(x, base, module.bias, terms)


def base_of(module: Any) -> Any:
    """What the terms of an adapted layer are added to: the view of its own weight, or of what replaced it."""
    stored = module.adapter._modules.get("base")
    return own_base(module) if stored is None else stored.view()


def own_base(module: Any) -> Any:
    """The view of a layer's own weight."""
    return packed_base(module) if is_packed(type(module)) else Plain(weight_of(module).detach())


def release(module: Any) -> None:
    """Put the weight of an adapted layer back as it was, where a method holds it changed between forwards."""
    if not freed(module) and not is_packed(type(module)):
        for method in module.adapter.methods().values():
            method.release(weight_of(module).detach())


def recipes(method: str | list[str], options: Mapping[str, Any]) -> list[Recipe]:
    """The named recipes, after checking that every option belongs to one of them."""
    names = [method] if isinstance(method, str) else list(method)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"adapt: methods {names}; give one name, or a list of different names.")
    found = [get_recipe(name) for name in names]
    check_options(names, options)
    return found


@dataclass(frozen=True)
class Build:
    """How the adapters of a model are built. quantize: a kind of fastpeft.quantised.KINDS that replaces each base, or None.

    blank: a checkpoint's values follow, so starts need not look at the weights.
    """

    recipes: list[Recipe]
    quantize: str | None = None
    blank: bool = False


def build_adapter(
    name: str, base: Any, build: Build, options: Mapping[str, Any], holders: Mapping[str, Holder] | None = None
) -> Adapter:
    """The adapter of one linear layer; holders: of the recipes that share parameters between sites.

    ValueError for two methods with a gain, two that replace the base, or one that does not sit on a linear.
    """
    for r in build.recipes:
        if r.site != "linear":
            raise ValueError(
                f"adapt: {r.name} sits beside a whole {r.site} and not on a linear layer ({name!r}); call fastpeft.adapt on a "
                f"model that holds the {r.site}."
            )
    stored = None
    if build.quantize is not None:
        from fastpeft.quantised import store

        stored = store(name, base, build.quantize)
    seen = base if stored is None else stored.view()
    built = build_methods(name, seen, build.recipes, options, holders)
    if sum("gain" in m.ROLES.values() for m in built.values()) > 1:
        raise ValueError(f"adapt: {list(built)} both scale the output; two gains at one layer do not compose. Choose one.")
    return Adapter(built, _started(name, base, seen, stored, built, build))


def _started(
    name: str, base: Any, seen: Any, stored: nn.Module | None, built: Mapping[str, Method], build: Build
) -> nn.Module | None:
    """What stands for the base weight after every method's start; stored: what stands for it already. ValueError if it cannot."""
    site = site_of(name, seen)
    blank = build.blank or base.device.type == "meta"
    for kind, m in built.items():
        with torch.no_grad():
            replaced = m.start(site, lambda: base.dense(torch.promote_types(base.dtype, torch.float32)), blank)
        if replaced is None:
            continue
        if stored is not None:
            other = f"quantize={build.quantize!r}" if build.quantize else "another method of the list"
            raise ValueError(f"adapt: {kind} replaces the base weight of {name!r}, and so does {other}; leave one of them out.")
        if base.W is None:
            raise ValueError(f"adapt: {kind} replaces the base weight of {name!r}, which is quantised already; load it unquantised.")
        stored = replaced
    if any(m.overlay for m in built.values()) and (stored is not None or base.W is None):
        how = "quantised" if stored is None else "replaced"
        raise ValueError(f"adapt: overlay=True at {name!r}, whose base weight is {how}; use apply='copy'.")
    if stored is not None and build.quantize is None and any("gain" in m.ROLES.values() for m in built.values()):
        raise ValueError(f"adapt: a gain at {name!r} starts at the norm of its weight, which {list(built)} replaces; choose one.")
    return stored


def build_methods(
    name: str, base: Any, found: list[Recipe], options: Mapping[str, Any], holders: Mapping[str, Holder] | None = None
) -> dict[str, Method]:
    """The methods of one site."""
    site, holders = site_of(name, base), holders or {}
    return {r.name: r.build(site, own_options(r, options), holders.get(r.name)) for r in found}


def site_of(name: str, base: Any) -> Site:
    """Parameters are fp32 on a 16-bit base (optimiser steps vanish in bf16), else the base's dtype."""
    return Site(name, base, torch.promote_types(base.dtype, torch.float32))


def own_options(recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that are the recipe's."""
    return {k: v for k, v in options.items() if k in recipe.options}


def shared_holders(
    found: list[Recipe],
    sites: Mapping[str, tuple[Any, Mapping[str, Any]]],
    blank: bool = False,
    blocks: Mapping[str, Any] | None = None,
) -> tuple[nn.ModuleDict, dict[str, dict[str, Holder]]]:
    """(all holders by `<recipe>_<key>`, site -> recipe -> holder) for sites: name -> (base, options); blank: as Build has it.

    blocks: site -> the Block around it, of methods that route by block.

    ValueError where sites that would share parameters lie on several devices, or want them in several dtypes.
    """
    blank = blank or any(base.device.type == "meta" for base, _ in sites.values())
    every, by_site = nn.ModuleDict(), {name: {} for name in sites}  # type: ignore[var-annotated]
    for r in found:
        if r.cls.SHARES:
            own = {
                n: (replace(site_of(n, base), block=(blocks or {}).get(n)), r.options | own_options(r, options))
                for n, (base, options) in sites.items()
            }
            for key, (holder, names) in r.cls.share(list(own.values()), blank).items():
                kinds = sorted({f"{own[n][0].dtype} on {own[n][0].device}" for n in names})
                if len(kinds) > 1:
                    raise ValueError(
                        f"adapt: {r.name} shares parameters between {names[0]!r} and {len(names) - 1} other layers, which need "
                        f"them as {' and as '.join(kinds)}; put these layers in one place and dtype, or choose fewer of them."
                    )
                every[f"{r.name}_{key}"] = holder
                for name in names:
                    by_site[name][r.name] = holder
    return every, by_site


_CLASSES: dict[type, type] = {nn.Linear: AdaptedLinear}


def adapted_class(cls: type) -> type:
    """The class that a layer of class `cls` changes into: AdaptedLinear, or a subclass of it and of `cls`.

    cls must be nn.Linear, a subclass that does not override forward, bitsandbytes' Linear4bit or Linear8bitLt, or Transformers'
    Conv1D.
    """
    if cls not in _CLASSES:
        if is_packed(cls):
            own = {"forward": packed_forward, "__module__": cls.__module__}
            _CLASSES[cls] = type(f"Adapted{cls.__name__}", (AdaptedLinear, cls), own)
        elif issubclass(cls, nn.Linear):
            _CLASSES[cls] = type(f"Adapted{cls.__name__}", (AdaptedLinear, cls), {"__module__": cls.__module__})
        else:
            own = {"forward": _conv1d_forward, "_save_to_state_dict": _conv1d_save, "__module__": cls.__module__}
            _CLASSES[cls] = type("AdaptedConv1DLinear", (cls,), own)
    return _CLASSES[cls]


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:
    return adapted_forward(self, x, None if self.weight is None else self.weight.t())


def _conv1d_save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    release(self)
    super(type(self), self)._save_to_state_dict(destination, prefix, keep_vars)


def is_conv1d(module: nn.Module) -> bool:
    """True for Transformers' Conv1D (weight stored [in, out]), told by name so that Transformers is not imported."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def has_linear_forward(cls: type[nn.Module]) -> bool:
    """True where a linear class computes x W^T + b and nothing else: with nn.Linear's forward, or as Transformers' FalconLinear does
    (bias added to the rounded product), told by name likewise."""
    own = next((c for c in cls.__mro__ if "forward" in vars(c)), nn.Module)
    return own is nn.Linear or (own.__name__ == "FalconLinear" and own.__module__ == "transformers.models.falcon.modeling_falcon")


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear or Conv1D as [out, in]."""
    weight: Any = module.weight
    return weight.t() if is_conv1d(module) else weight


def free(module: Any) -> None:
    """Let go of the weight of an adapted layer whose base was replaced: `weight` is None from here on."""
    module.register_parameter("weight", None)


def freed(module: Any) -> bool:
    return module.weight is None


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module._modules.get("adapter"), Adapter)
