"""Which layers adapt changes: PEFT's target rules, and the layers that a changed class would not reach."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastpeft.adapter import has_linear_forward, is_adapted, is_conv1d
from fastpeft.packed import is_packed
from fastpeft.uncalled import why_uncalled

Targets = str | Iterable[str]

_CLASSIFIER_HEADS = ("score", "classifier")


def matches(name: str, targets: Targets) -> bool:
    """PEFT's rule: a string is a regex for the whole name; a list holds names or dotted suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def checked_targets(option: str, targets: Any) -> Targets:
    """A regex string or a list of names; ValueError for what can be neither."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as e:
            raise ValueError(f"adapt: {option}={targets!r} is no valid regular expression ({e}).") from None
        return targets
    names = list(targets) if isinstance(targets, Iterable) else None
    if not names or not all(isinstance(t, str) and t for t in names):
        raise ValueError(f"adapt: {option}={targets!r}; give 'all-linear', a regex string, or a list of module names.")
    return names


def all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D by name, but the output head (PEFT's 'all-linear')."""
    head = output_head(model)
    return {n: m for n, m in model.named_modules() if is_linear_layer(m) and not (head and (n == head or n.startswith(head + ".")))}


def output_head(model: nn.Module) -> str | None:
    """Name of a Transformers model's output embedding, or of its classification head; None for other models."""
    get = getattr(model, "get_output_embeddings", None)
    embedding = get() if callable(get) else None
    if embedding is not None:
        return next((n for n, m in model.named_modules() if m is embedding), None)
    if re.search(r"For\w*Classification", type(model).__name__):
        return next((n for n in _CLASSIFIER_HEADS if isinstance(getattr(model, n, None), nn.Module)), None)
    return None


def is_all(target_modules: Targets) -> bool:
    """True for 'all-linear', which is every site of a kind and not a name."""
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def select(
    model: nn.Module, target_modules: Targets, other_sites: Collection[str] = ()
) -> tuple[dict[str, nn.Module], bool]:
    """The targeted modules by name, and whether they were asked for by name (not by 'all-linear').

    other_sites: names that are targets of another kind (FFNs), which are left out.
    Raises ValueError if nothing matches, or if a named target is no linear layer.
    """
    if is_all(target_modules):
        found, named = all_linear(model), False
    else:
        targets = checked_targets("target_modules", target_modules)
        found, named = {n: m for n, m in model.named_modules() if n and matches(n, targets)}, True
    found = {n: m for n, m in found.items() if n not in other_sites}
    if not found:
        names = [n for n, m in model.named_modules() if is_linear_layer(m)]
        raise ValueError(
            f"adapt: target_modules={target_modules!r} matches no layer of {type(model).__name__}; "
            f"its linear layers are {', '.join(names[:12]) or 'none'}{' ...' if len(names) > 12 else ''}."
        )
    wrong = [f"{n} ({type(m).__name__})" for n, m in found.items() if not is_linear_layer(m)]
    if wrong:
        raise ValueError(f"adapt: targets {', '.join(wrong[:6])} are no linear layers; name nn.Linear or Conv1D layers only.")
    return found, named


def refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why an adapter on this layer would be skipped or lost, or None if nothing speaks against it."""
    if is_adapted(module):
        return "it already carries an adapter"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    if skipped := why_uncalled(parent, name.rpartition(".")[2]):
        return skipped
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet (lazy); run one forward first"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if is_packed(type(module)):
        return None
    if not is_conv1d(module) and not has_linear_forward(type(module)):
        return f"{type(module).__name__} has a forward of its own, which an adapter would replace"
    if not module.weight.dtype.is_floating_point or module.weight.dtype.itemsize < 2:
        return f"its weight is {module.weight.dtype}; supported are float64, float32, bfloat16 and float16"
    return None


def fast_path_owners(model: nn.Module, names: Iterable[str]) -> list[tuple[nn.Module, str, Any]]:
    """(module, attribute, value) to set so that no fused encoder path skips the adapted layers' forward.

    nn.TransformerEncoderLayer in eval hands its linears' weights to one fused op; nn.TransformerEncoder packs its input for it.
    """
    changes: list[tuple[nn.Module, str, Any]] = []
    touched = set(names)
    for name, module in model.named_modules():
        inside = any(n.startswith(f"{name}." if name else "") for n in touched)
        if inside and isinstance(module, nn.TransformerEncoderLayer):
            changes.append((module, "activation_relu_or_gelu", 0))
        if inside and isinstance(module, nn.TransformerEncoder):
            changes.append((module, "use_nested_tensor", False))
    return changes


def shared_weights(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Adapted layer -> name of another module that holds the same weight Parameter."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if isinstance(parameter, torch.Tensor):
                owners.setdefault(id(parameter), []).append(name)
    result = {}
    for name in names:
        others = [o for o in owners.get(id(model.get_submodule(name).weight), []) if o != name]  # none of a weight let go
        if others:
            result[name] = others[0]
    return result


def is_linear_layer(module: nn.Module) -> bool:
    """nn.Linear, or Transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)
