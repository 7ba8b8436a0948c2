"""What adapt did to a model: the record that checkpoint, adapters_off, unload and merge read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft.adapter import is_adapted
from fastpeft.ffn import FFN

RECORD = "_fastpeft_adaptation"
# the child that keeps the parameters that several sites share: of the adapted root, or of the first site where the root is a
# container, which would run or list it among its own
SHARED = "adapter_shared"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Adaptation:
    """What adapt did to a model: kept on the adapted root for checkpoint, adapters_off and unload.

    sites: names of adapted layers and FFNs.   options: as given to adapt.   originals: name -> untouched copy of a module of
    modules_to_save.   biases: parameter name -> untouched copy of a bias that trains.   flags: requires_grad before.
    classes: of adapted layers.   ffns, hooks: of FFNs with an adapter beside them.   shared_at: name of the module
    with the child SHARED.   shared_hooks: of the root, around what layers share.   quantize, keep_base: as given to adapt.
    trained: names of the model's own parameters that a method trains (LISA, GaLore, Delta-LoRA in place).   kept: name -> copy of
    each on the CPU as it was before, with keep_base.   peft_fields: of a saved PEFT config, what a procedure knows (AdaLoRA's schedule).
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
    shared_at: str = ""
    shared_hooks: list[RemovableHandle] = field(default_factory=list)
    input_grads: bool = False
    trained: list[str] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    peft_fields: dict[str, Any] = field(default_factory=dict)


def adaptation(model: nn.Module, who: str) -> Adaptation:
    """The record of an adapted model; ValueError if the model is not adapted."""
    record = model.__dict__.get(RECORD)
    if record is None:
        raise ValueError(
            f"{who}: this {type(model).__name__} was not adapted; call fastpeft.adapt on it, and pass the same module here."
        )
    return record


def holders_of(model: nn.Module, record: Adaptation) -> dict[str, Any]:
    """What several sites of an adapted model share: holders by their names in SHARED."""
    child = model.get_submodule(record.shared_at)._modules.get(SHARED)
    return {} if child is None else dict(child.named_children())


def opened(model: nn.Module, record: Adaptation) -> list[Any]:
    """The holders that are opened around each forward."""
    return [h for h in holders_of(model, record).values() if h.per_forward]


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Adapted layers and FFNs by name."""
    return {n: m for n, m in model.named_modules() if is_adapted(m)}
