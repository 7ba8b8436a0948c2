"""What is compared: one frozen linear, and the same under stock PEFT and under fastpeft, on equal values.

The layers come from fastpeft.job.layerbench. All arms of one comparison share one weight in memory, every arm
of a method starts from the same factors (none zero, all exact in the layer's dtype), and what is called is
the layer itself, without the wrapper of PEFT's model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import name_of
from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT, copy_start, peft_counterpart
from fastpeft.job.layerbench import Shape, layers
from fastpeft.ops.family import implementation

AGAIN = "frozen again"


@dataclass
class Arm:
    """library: "torch", "PEFT", "fastpeft" or "hand".   parameters: the adapter's own, by fastpeft's names.

    start: their values in fp64, which the check computes with.   impl: FASTPEFT_IMPL while it runs.
    autocast: dtype while its forward runs.   mask: [tokens, in], 0 or 1 / (1 - p), of an arm that keeps its
    own.
    """

    name: str
    library: str
    method: str | None
    layer: nn.Module
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    dropout: float = 0.0
    impl: str | None = None
    autocast: torch.dtype | None = None

    @property
    def adapter_dtype(self) -> list[str]:
        return sorted({name_of(p.dtype) for p in self.parameters.values()})

    def using(self) -> contextlib.AbstractContextManager[None]:
        """Everything that runs the arm stands in here."""
        return contextlib.nullcontext() if self.impl is None else implementation(self.impl)

    def forward(self, x: Tensor) -> Tensor:
        if self.autocast is None:
            return self.layer(x)
        with torch.autocast(x.device.type, dtype=self.autocast):
            return self.layer(x)


@dataclass(frozen=True)
class Variant:
    """A method with its options, under the name that its arms bear."""

    name: str
    method: str
    options: Mapping[str, Any]


def lowrank_variant(name: str, method: str, rank: int, dropout: float, **more: Any) -> Variant:
    """scale 2 throughout."""
    return Variant(name, method, {"rank": rank, "alpha": 2 * rank, "dropout": dropout, **more})


def arms(shape: Shape, variants: list[Variant], *, peft_dtypes: str = "both") -> dict[str, Arm]:
    """frozen, frozen again, then PEFT's arms (adapters in the layer's dtype, and in fp32) and fastpeft's of
    each variant.

    peft_dtypes: "both", or "same" for the layer's dtype only.
    """
    found: dict[str, Arm] = {}
    for variant in variants:
        built = layers(shape, variant.method, variant.options)
        if not found:
            found = _frozen(built[FROZEN].linear)
        ours = _fastpeft(variant, built[FASTPEFT], shape.dtype)
        new = [*_peft(variant, built, ours, shape.dtype, peft_dtypes), ours]
        for arm in new:
            share_weight(arm.layer, found[FROZEN].layer)
        found |= {arm.name: arm for arm in new}
    return found


def _frozen(linear: nn.Linear) -> dict[str, Arm]:
    twin = copy.deepcopy(linear)
    share_weight(twin, linear)
    return {name: Arm(name, "torch", None, layer) for name, layer in ((FROZEN, linear), (AGAIN, twin))}


def share_weight(layer: nn.Module, frozen: nn.Module) -> None:
    base = getattr(layer, "base_layer", layer)
    assert torch.equal(base.weight, frozen.weight) and torch.equal(base.bias, frozen.bias)
    base.weight, base.bias = frozen.weight, frozen.bias


@torch.no_grad()
def _fastpeft(variant: Variant, holder: nn.Module, dtype: torch.dtype) -> Arm:
    own = holder.linear.adapter.get_submodule(variant.method)
    parameters = dict(own.named_parameters())
    for p in parameters.values():
        if not p.any():  # what starts at zero (B, and its like in other methods)
            p.normal_(0, 0.02)
        p.copy_(p.to(dtype))
    start = {name: p.detach().double() for name, p in parameters.items()}
    return Arm(
        f"fastpeft {variant.name}", "fastpeft", variant.method, holder.linear, parameters, start, own.scale,
        float(variant.options.get("dropout", 0.0)),
    )  # fmt: skip


def _peft(
    variant: Variant, built: dict[str, nn.Module], ours: Arm, dtype: torch.dtype, wanted: str
) -> list[Arm]:
    """As PEFT makes it (fp32 adapters), and with every adapter parameter in the layer's dtype; one arm if
    that is fp32.
    """
    if not peft_counterpart(variant.method):
        return []
    wide = built[PEFT]
    copy_start(built[FASTPEFT], wide, variant.method)
    same = copy.deepcopy(wide)
    for p in same.parameters():
        p.data = p.data.to(dtype)
    models = {name_of(dtype): same} | ({"float32": wide} if wanted == "both" else {})
    return [_peft_arm(variant, name, model, ours) for name, model in models.items()]


def _peft_arm(variant: Variant, adapter_dtype: str, model: nn.Module, ours: Arm) -> Arm:
    from fastpeft.registry import get_recipe

    layer = model.get_submodule("base_model.model.linear")
    live = dict(layer.named_parameters())
    keys = get_recipe(variant.method).cls.PEFT.keys  # type: ignore[union-attr]
    parameters = {name: live[_in_memory(keys[name], live)] for name in ours.parameters}
    return Arm(
        peft_name(variant.name, adapter_dtype),
        "PEFT",
        variant.method,
        layer,
        parameters,
        ours.start,
        ours.scale,
        ours.dropout,
    )


def _in_memory(key: str, live: Mapping[str, Any]) -> str:
    """lora_A.weight is lora_A.default.weight in memory, hada_w1_a is hada_w1_a.default, and lora_magnitude_vector
    lora_magnitude_vector.default.weight.
    """
    stem, dot, leaf = key.partition(".")
    name = f"{stem}.default"
    return name if name in live else f"{name}.{leaf if dot else 'weight'}"


def peft_name(variant: str, adapter_dtype: str) -> str:
    return f"PEFT {variant}, {adapter_dtype} adapters"
