"""What a call of adapt is about: the layers, their blocks, the modules that train whole, and what is left alone and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fastpeft import routing_hooks
from fastpeft.adapter import is_adapted
from fastpeft.blocks import Block, blocks_of
from fastpeft.ffn import FFN
from fastpeft.record import SHARED
from fastpeft.registry import Recipe
from fastpeft.report import Report, Route
from fastpeft.shards import refuse_sharded
from fastpeft.targets import Targets, checked_targets, is_all, matches, output_head, refusal, select


def refuse_second(model: nn.Module) -> None:
    """ValueError for a model that has adapters already, or whose weights lie in shards, beside which new ones would be no part of them."""
    refuse_sharded(model, "adapt", "adapt or load_adapter comes first, and what shards the model (fully_shard, accelerator.prepare) after it.")
    if hasattr(model, SHARED):
        raise ValueError(f"adapt: this {type(model).__name__} has an attribute {SHARED!r} already; rename it.")
    for name, module in model.named_modules():
        if is_adapted(module):
            raise ValueError(
                f"adapt: {name!r} is adapted already; call fastpeft.unload first, or pass several methods as one list."
            )
        if type(module).__module__.startswith("peft.tuners."):
            raise ValueError(
                f"adapt: {name!r} carries a PEFT adapter ({type(module).__name__}); merge or unload it with PEFT first."
            )


def saved_modules(model: nn.Module, names: list[str] | None) -> dict[str, nn.Module]:
    """Modules of modules_to_save by name; ValueError if an entry matches none."""
    if not names:
        return {}
    wanted = checked_targets("modules_to_save", names)
    found = {n: m for n, m in model.named_modules() if n and matches(n, wanted)}
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        if not any(matches(n, entry if isinstance(wanted, str) else [entry]) for n in found):
            raise ValueError(f"adapt: modules_to_save entry {entry!r} matches no module of {type(model).__name__}.")
    return {n: m for n, m in found.items() if not any(n.startswith(o + ".") for o in found)}


def sites_of(
    model: nn.Module,
    target_modules: Targets,
    exclude_modules: Targets | None,
    saved: Mapping[str, nn.Module],
    report: Report,
    ffns: Mapping[str, FFN],
) -> dict[str, nn.Module]:
    """The layers to adapt; what is left alone goes into the report with its reason."""
    found, named = select(model, target_modules, ffns)
    excluded = checked_targets("exclude_modules", exclude_modules) if exclude_modules else None
    sites: dict[str, nn.Module] = {}
    for name, module in found.items():
        if excluded is not None and matches(name, excluded):
            continue
        if any(name == s or name.startswith(s + ".") for s in saved):
            continue
        reason = refusal(model, name, module)
        if reason is None:
            sites[name] = module
        elif named:
            raise ValueError(f"adapt: cannot adapt {name!r}: {reason}. Leave it out of target_modules.")
        else:
            report.layers[name] = Route((), str(tuple(getattr(module, "weight", torch.empty(0)).shape)), 0, reason)
    if not sites:
        reasons = "; ".join(f"{n}: {r}" for n, r in report.skipped.items())
        raise ValueError(
            f"adapt: no layer is left to adapt with target_modules={target_modules!r}, exclude_modules={exclude_modules!r}"
            f"{' (' + reasons + ')' if reasons else ''}."
        )
    return sites


def blocks_around(
    model: nn.Module, modules: dict[str, nn.Module], found: list[Recipe], options: Mapping[str, Any], report: Report, every: bool
) -> dict[str, Block]:
    """The block of each layer, if some recipe routes by block. Layers in none go out of `modules` and into the report.

    every: whether they were asked for as all; ValueError by name for others, and where none is left.
    """
    if not any(r.cls.ROUTED for r in found):
        return {}
    routing_hooks.refuse(model)
    blocks, alone = blocks_of(model, modules, options.get("blocks"))
    if alone and (not every or not blocks):
        raise ValueError(
            f"adapt: {', '.join(alone[:6])}{' ...' if len(alone) > 6 else ''} lie in no block, whose router would choose their experts; leave "
            "them out, or name modules around them in blocks=."
        )
    for name in alone:
        report.layers[name] = Route((), str(tuple(getattr(modules.pop(name), "weight", torch.empty(0)).shape)), 0, "it lies in no block")
    return blocks


def note_targets(
    model: nn.Module, targets: Targets, saved: Mapping[str, nn.Module], report: Report, sites: list[str]
) -> None:
    """Notes on targets that match none of `sites`, on the output head, and on stacks of matrices, which no target reaches."""
    if isinstance(targets, (list, tuple, set)):
        unused = [t for t in targets if not any(matches(n, [t]) for n in sites)]
        if unused:
            report.notes.append(f"target_modules entries that match no layer: {', '.join(unused)}.")
    head = output_head(model)
    if is_all(targets) and head and head not in saved:
        report.notes.append(f"the output head {head!r} is frozen; name it in modules_to_save to train it.")
    if is_all(targets) and (stacks := _stacks(model)):
        numbers = sum(p.numel() for p in stacks.values())
        report.notes.append(
            f"{len(stacks)} stacks of matrices ({numbers:,} numbers, {next(iter(stacks))} the first) belong to no linear layer, as the experts of a "
            "mixture do not; they have no adapter."
        )


def _stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating-point parameters [n, a, b] that no convolution owns, itself or through a parametrization: a mixture's experts in
    Transformers 5."""
    others = (nn.modules.conv._ConvNd, ParametrizationList)
    owned = {f"{name}.{leaf}" if name else leaf: p for name, m in model.named_modules() if not isinstance(m, others) for leaf, p in m._parameters.items()}
    return {n: p for n, p in owned.items() if p is not None and p.dim() == 3 and min(p.shape) > 1 and p.is_floating_point()}
