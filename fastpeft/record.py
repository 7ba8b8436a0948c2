"""What adapt did to a model: the record that checkpoint, adapters_off, unload and merge read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft.adapter import is_adapted
from fastpeft.ffn import FFN

RECORD = "_fastpeft_adaptation"
# where the adapted root keeps the parameters that several sites share
SHARED = "adapter_shared"


@dataclass
class Adaptation:
    """What adapt did to a model: kept on the adapted root for checkpoint, adapters_off and unload.

    sites: names of adapted layers and FFNs.   options: as given to adapt.   originals: name -> untouched copy of a module of
    modules_to_save.   biases: parameter name -> untouched copy of a bias that trains.   flags: requires_grad before.
    classes: of adapted layers.   ffns, hooks: of FFNs with an adapter beside them.   quantize, keep_base: as given to adapt.
    """

    methods: list[str]
    options: dict[str, Any]
    rank_pattern: dict[str, Any]
    alpha_pattern: dict[str, Any]
    bias: str
    quantize: str | None = None
    keep_base: bool = True
    sites: list[str] = field(default_factory=list)
    classes: dict[str, type] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    ffns: dict[str, FFN] = field(default_factory=dict)
    hooks: dict[str, list[RemovableHandle]] = field(default_factory=dict)
    input_grads: bool = False


def adaptation(model: nn.Module, who: str) -> Adaptation:
    """The record of an adapted model; ValueError if the model is not adapted."""
    record = model.__dict__.get(RECORD)
    if record is None:
        raise ValueError(
            f"{who}: this {type(model).__name__} was not adapted; call fastpeft.adapt on it, and pass the same module here."
        )
    return record


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Adapted layers and FFNs by name."""
    return {n: m for n, m in model.named_modules() if is_adapted(m)}
