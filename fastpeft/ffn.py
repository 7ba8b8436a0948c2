"""Which feed-forward blocks (FFNs) of a model carry an adapter beside them.

An FFN is the innermost module of a usual name (NAMES) that holds two or more linears. Where the blocks of a model have none,
it is the pair of a block's first and last linear outside attention (BERT: intermediate.dense and output.dense; OPT: fc1 and
fc2); a block is a child of the outermost nn.ModuleList on the way to the linear, and the pair's site has the block's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.adapter import is_conv1d
from fastpeft.targets import Targets, checked_targets, is_all, is_linear_layer, matches, output_head

# compared in lower case and without underscores
NAMES = ("mlp", "ffn", "ff", "feedforward", "densereludense")
RULE = (
    "an FFN is a module named mlp, ffn, ff, feed_forward or DenseReluDense that holds two or more linears, or the first and last "
    "linear outside attention in each child of an nn.ModuleList"
)
_EXPERTS = "its experts are 3-D parameters and not linear layers, so this is no FFN of two or more linears"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Width:
    """What a method on an FFN sees as its base: as many outputs as inputs, and where its parameters belong."""

    features: int
    dtype: torch.dtype
    device: torch.device

    @property
    def in_features(self) -> int:
        return self.features

    @property
    def out_features(self) -> int:
        return self.features


@dataclass(frozen=True)
class FFN:
    """name: of the module, or of the block whose linears `first` and `last` are the FFN (None where it is a module)."""

    name: str
    width: Width
    first: str | None = None
    last: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        return () if self.first is None or self.last is None else (self.first, self.last)


def find_ffns(
    model: nn.Module,
    target_modules: Targets,
    exclude_modules: Targets | None,
    saved: Mapping[str, nn.Module],
    who: str,
) -> tuple[dict[str, FFN], dict[str, str]]:
    """The FFNs to adapt by name, and the reasons of those that look like one and are left alone.

    target_modules filters their names; in a model where none is found, modules that hold two or more linears can be named.
    Raises ValueError, listing candidates, if nothing is left, and by name for an FFN whose output has another width than its
    input, that has an attribute `adapter` of its own, or whose weights are not initialised yet.
    """
    linears = {n: m for n, m in model.named_modules() if n and is_linear_layer(m)}
    places = _places(model, linears)
    alone = {n: _EXPERTS for n in _expert_lists(model) if not {n, *_above(n)} & places.keys()}
    if not is_all(target_modules):
        targets = checked_targets("target_modules", target_modules)
        for n in alone:
            if matches(n, targets):
                raise ValueError(f"{who}: cannot adapt {n!r}: {_EXPERTS}. Leave it out of target_modules.")
        places = places or {n: _Place(found, False) for n, found in _holders(model, linears).items()}
        places = {n: p for n, p in places.items() if matches(n, targets)}
    excluded = checked_targets("exclude_modules", exclude_modules) if exclude_modules else None
    kept = {
        n: p
        for n, p in places.items()
        if not (excluded is not None and matches(n, excluded))
        and not any(n == s or n.startswith(f"{s}.") for s in saved)
    }
    if not kept:
        raise ValueError(_nothing(model, target_modules, exclude_modules, linears, alone, who))
    return {n: _ffn(model, n, place, linears, who) for n, place in kept.items()}, alone


class _Place(NamedTuple):
    """linears: all of a module's, or the first and last of a pair."""

    linears: list[str]
    pair: bool


def _places(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, _Place]:
    """FFNs by site name, in the model's order; the output head left out."""
    head = output_head(model)
    free = {n: m for n, m in linears.items() if not (head and (n == head or n.startswith(f"{head}.")))}
    named = {n: found for n, found in _holders(model, free).items() if _has_ffn_name(n)}
    inner = named.keys() - {above for n in named for above in _above(n)}
    lists = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    # a list of blocks some of which hold a named FFN (or experts) has no pairs: their other linears are no FFN
    settled = {_block(n, lists)[0] for n in (*inner, *_expert_lists(model))}
    pairs: dict[str, list[str]] = {}
    for n in free:
        parent, block = _block(n, lists)
        rest = n[len(block) + 1 :].lower()
        if block and parent not in settled and "attn" not in rest and "attention" not in rest:
            pairs.setdefault(block, []).append(n)
    found = {n: _Place(named[n], False) for n in inner}
    found |= {block: _Place([names[0], names[-1]], True) for block, names in pairs.items() if len(names) > 1}
    return {n: found[n] for n, _ in model.named_modules() if n in found}


def _holders(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Modules that hold two or more of `linears` and are called themselves, which a ModuleList or ModuleDict is not."""
    inside: dict[str, list[str]] = {}
    for n in linears:
        for above in _above(n):
            inside.setdefault(above, []).append(n)
    called = (n for n, m in model.named_modules() if type(m).forward is not nn.Module.forward)
    return {n: inside[n] for n in called if len(inside.get(n, ())) > 1}


def _above(path: str) -> list[str]:
    """The modules around `path`, the outermost first, the model itself left out."""
    parts = path.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _has_ffn_name(path: str) -> bool:
    return path.rpartition(".")[2].lower().replace("_", "") in NAMES


def _block(path: str, lists: set[str]) -> tuple[str, str]:
    """The outermost nn.ModuleList above `path` and that list's child on the way to it; ("", "") without one."""
    return next(((a, block) for a, block in pairwise((*_above(path), path)) if a in lists), ("", ""))


def _expert_lists(model: nn.Module) -> list[str]:
    """Modules whose experts are stacked in 3-D parameters: the FFN-named one around them, or the one that holds them."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS) or not any(_stacked(p) for p in module._parameters.values()):
            continue
        around = [n for n in (*_above(name), name) if _has_ffn_name(n)]
        if around or "expert" in name.lower():
            found[around[-1] if around else name] = None
    return list(found)


def _stacked(parameter: nn.Parameter | None) -> bool:
    lazy = parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter)
    return not lazy and parameter.dim() == 3


def _ffn(model: nn.Module, name: str, place: _Place, linears: Mapping[str, nn.Module], who: str) -> FFN:
    module, start = model.get_submodule(name), linears[place.linears[0]]
    if hasattr(module, "adapter"):
        raise ValueError(
            f"{who}: {name!r} has an attribute `adapter` already, which is where an adapter would go; exclude it."
        )
    weight: Any = start.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"{who}: the weights of {name!r} are not initialised yet (lazy); run one forward first."
        )
    size = _features(start)[0]
    outs = [_features(linears[n])[1] for n in (place.linears[-1:] if place.pair else place.linears)]
    if size not in outs:
        raise ValueError(
            f"{who}: the FFN {name!r} reads {size} features and gives {outs[-1]}; an adapter beside it needs as many outputs as "
            "inputs. Leave it out with exclude_modules."
        )
    # a quantised weight has no dtype of its own that a parameter could have
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
    first, last = (place.linears[0], place.linears[-1]) if place.pair else (None, None)
    return FFN(name, Width(size, dtype, weight.device), first, last)


def _features(linear: Any) -> tuple[int, int]:
    return tuple(linear.weight.shape) if is_conv1d(linear) else (linear.in_features, linear.out_features)


def _nothing(
    model: nn.Module,
    target_modules: Targets,
    exclude_modules: Targets | None,
    linears: Mapping[str, nn.Module],
    alone: Mapping[str, str],
    who: str,
) -> str:
    known = list(_places(model, linears))
    if known:
        message = (
            f"{who}: target_modules={target_modules!r}, exclude_modules={exclude_modules!r} leave no FFN of "
            f"{type(model).__name__}; its FFNs are {_some(known)}."
        )
    else:
        held = list(_holders(model, linears))
        message = (
            f"{who}: target_modules={target_modules!r} matches no FFN of {type(model).__name__}: {RULE}. Modules that hold two or "
            f"more linears, to be named in target_modules: {_some(held)}."
        )
    return message + "".join(f" Left alone: {n}: {reason}." for n, reason in alone.items())


def _some(names: list[str]) -> str:
    return (", ".join(names[:12]) or "none") + (" ..." if len(names) > 12 else "")
