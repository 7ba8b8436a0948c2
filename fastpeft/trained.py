"""The model's own parameters that a method trains: which they are, how they were before, and putting that back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.adapter import Adapter
from fastpeft.record import Adaptation
from fastpeft.registry import Recipe


def own_parameters(
    model: nn.Module, found: Sequence[Recipe], adapters: Mapping[str, Adapter], saved: Collection[str]
) -> list[str]:
    """Names of the model's parameters that these methods train, those of modules_to_save (`saved`) aside.

    With TRAINS_ALL all that wanted a gradient before; where a method writes the layer's weight (writes_base), that weight.
    """
    every = any(r.cls.TRAINS_ALL for r in found)
    writers = written(adapters)
    names = []
    for name, p in model.named_parameters():
        if any(name.startswith(s + ".") for s in saved):
            continue
        path, _, leaf = name.rpartition(".")
        if (every and p.requires_grad) or (leaf == "weight" and path in writers):
            names.append(name)
    if every and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"adapt: {'+'.join(r.name for r in found)} trains the parameters of the model itself, and none of this "
            f"{type(model).__name__}'s has requires_grad; set it where they should train."
        )
    return names


def written(adapters: Mapping[str, Adapter]) -> list[str]:
    """Names of the layers whose weight a method writes."""
    return [name for name, a in adapters.items() if any(m.writes_base for m in a.methods().values())]


def check_own(
    record: Adaptation, found: Sequence[Recipe], adapters: Mapping[str, Adapter], bases: Mapping[str, Any], shared: Mapping[str, str]
) -> None:
    """Raise ValueError where a weight that should train cannot: quantised or replaced, or shared with a layer that would follow.

    bases: name -> the layer's own base.   shared: name -> partner (fastpeft.targets.shared_weights).
    """
    every = [r.name for r in found if r.cls.TRAINS_ALL]
    for name in adapters if every else written(adapters):
        who = every[0] if every else next(k for k, m in adapters[name].methods().items() if m.writes_base)
        if "base" in adapters[name]._modules or bases[name].W is None:
            raise ValueError(f"adapt: {who} trains the weight of {name!r} itself, which is quantised or replaced; use the plain weight.")
    for name in written(adapters):
        if name in shared:
            raise ValueError(f"adapt: the weight of {name!r} would be written, and {shared[name]!r} shares it; untie them, or exclude {name!r}.")
    if every and record.bias != "none":
        raise ValueError(f"adapt: bias={record.bias!r} with {every[0]}, which trains every bias already; leave it out.")


def begin(model: nn.Module, record: Adaptation, trained: list[str], writers: Collection[str]) -> None:
    """Write down and keep what will train, and let it: all but the written weights, which no gradient reaches."""
    record.trained = trained
    for name in trained:
        parameter = model.get_parameter(name)
        if record.keep_base and not parameter.is_meta:
            record.kept[name] = parameter.detach().to("cpu", copy=True)
        path, _, leaf = name.rpartition(".")
        parameter.requires_grad_(not (leaf == "weight" and path in writers))


def refuse_lost(model: nn.Module, record: Adaptation, who: str) -> None:
    """Raise ValueError for `who` (unload, adapters_off) where parameters trained and their beginnings were not kept."""
    lost = [n for n in record.trained if n not in record.kept and not model.get_parameter(n).is_meta]
    if lost:
        raise ValueError(
            f"{who}: {'+'.join(record.methods)} trained {len(lost)} of the model's own parameters ({lost[0]}, ...), and what they were "
            "was not kept; adapt with keep_base=True. merge keeps the trained model."
        )


@torch.no_grad()
def restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """These parameters as they were before, in place."""
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


@contextlib.contextmanager
def beginnings(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it other parameters stand in for these, with the values from before; no tensor is written."""
    live = {model.get_parameter(name): value for name, value in values.items()}
    places = [(m, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if p is not None and p in live]
    stand_ins = {p: nn.Parameter(value.to(p.device, p.dtype), requires_grad=False) for p, value in live.items()}
    try:
        for module, leaf, p in places:
            module._parameters[leaf] = stand_ins[p]
        yield
    finally:
        for module, leaf, p in places:
            module._parameters[leaf] = p
