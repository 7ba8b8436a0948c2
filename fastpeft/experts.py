"""Trained LoRAs as the experts of a routed method: reading their folders, and stacking their factors site by site.

A folder is a LoRA that PEFT or fastpeft wrote; rank and alpha patterns and rsLoRA are understood. DoRA, trained biases and
modules_to_save are refused: they have no place in a mixture. Experts may have different ranks, scales and layers. A site gets
those that have it; where their scales differ there, each is folded into its B.

What adapt keeps of them in its options, and a checkpoint in its config, is a layout:
    {"names": [...], "groups": [{"ranks": [one per name, 0 where absent], "scale": s, "sites": [...]}, ...]}
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.adapter import is_adapted, own_base, site_of
from fastpeft.folder import CheckpointError, read_folder, read_gates
from fastpeft.option_checks import check_finite
from fastpeft.patterns import by_pattern, check_pattern
from fastpeft.stack import GATE, Experts
from fastpeft.targets import checked_targets, matches, refusal, select

Folders = Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]


@dataclass(frozen=True)
class Expert:
    """A trained LoRA, on the CPU. factors: site -> (A [r, in], B [out, r], scale).   gates: site -> [in], or empty."""

    name: str
    factors: Mapping[str, tuple[Tensor, Tensor, float]]
    gates: Mapping[str, Tensor]


def read_experts(model: nn.Module, experts: Folders) -> list[Expert]:
    """The experts of these folders, checked against the model, which stays as it is.

    experts: folders, each named by its last part, or name -> folder. TypeError / ValueError for what is neither or names twice,
    FileNotFoundError, CheckpointError for a folder that is damaged, no plain LoRA, or does not fit the model.
    """
    if isinstance(experts, (str, os.PathLike)) or not isinstance(experts, (Sequence, Mapping)):
        raise TypeError(f"adapt: experts={experts!r}; give a list of folders, a dict of name -> folder, or a number of fresh experts.")
    pairs = list(experts.items()) if isinstance(experts, Mapping) else [(Path(f).resolve().name, f) for f in experts]
    names = [name for name, _ in pairs]
    if not pairs or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"adapt: experts={experts!r}; give at least one folder, and names that are strings.")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"adapt: several experts are named {', '.join(twice)}; give a dict of name -> folder with names of your own.")
    return [_read(model, name, Path(folder)) for name, folder in pairs]


def _read(model: nn.Module, name: str, folder: Path) -> Expert:
    try:
        config, tensors, _ = read_folder(folder)
        sites = _sites(model, config)
        expected = {}
        for site, (base, rank, _) in sites.items():
            dtype = site_of(site, base).dtype
            expected[_key(site, "lora_A.weight")] = torch.empty(rank, base.in_features, dtype=dtype, device="meta")
            expected[_key(site, "lora_B.weight")] = torch.empty(base.out_features, rank, dtype=dtype, device="meta")
        _check(expected, tensors, folder)
        gates = read_gates(folder, tensors)
        if gates:
            like = {_key(s, GATE): expected[_key(s, "lora_A.weight")].new_empty(1, base.in_features) for s, (base, *_) in sites.items()}
            _check(like, gates, folder)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"adapt: expert {name!r}: {e}") from e
    except (ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"adapt: expert {name!r}: {e}") from e
    factors = {s: (tensors[_key(s, "lora_A.weight")], tensors[_key(s, "lora_B.weight")], scale) for s, (_, _, scale) in sites.items()}
    return Expert(name, factors, {s: gates[_key(s, GATE)].flatten() for s in sites} if gates else {})


def _key(site: str, leaf: str) -> str:
    from fastpeft.checkpoint import file_key  # which imports adapt, and adapt this file

    return file_key(site, leaf)


def _check(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    from fastpeft.checkpoint import check_tensors

    check_tensors(expected, tensors, folder, {})


def _sites(model: nn.Module, config: Mapping[str, Any]) -> dict[str, tuple[Any, int, float]]:
    """Site -> (base, rank, scale) of a LoRA's config; ValueError where it is none that can be one of several."""
    from fastpeft.integrations.peft import from_dict
    from fastpeft.method.lora import scaling

    if config.get("peft_type") != "LORA":
        raise ValueError(f"experts are LoRA folders, and this one's peft_type is {config.get('peft_type')!r}; train it as a LoRA.")
    alone = {k: config[k] for k in ("use_dora", "lora_bias", "modules_to_save") if config.get(k)}
    alone |= {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
    if alone:
        raise ValueError(f"a mixture has no place for {alone} of its config; train this expert without.")
    _, settings, options = from_dict(config, model)
    if settings["target_modules"] is None:
        raise ValueError("its config has no target_modules.")
    for option in ("rank_pattern", "alpha_pattern"):
        check_pattern(option, settings[option])
    found, _ = select(model, settings["target_modules"])
    excluded = checked_targets("exclude_modules", settings["exclude_modules"]) if settings["exclude_modules"] else ()
    sites = {}
    for site, module in found.items():
        if matches(site, excluded):
            continue
        if not is_adapted(module) and (reason := refusal(model, site, module)):
            raise ValueError(f"its layer {site!r} cannot be adapted: {reason}.")
        rank = by_pattern(site, settings["rank_pattern"], options.get("rank", 8))
        alpha = by_pattern(site, settings["alpha_pattern"], options.get("alpha", 8))
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (rank, alpha))
        if not numbers or not 1 <= rank <= sys.maxsize or rank != int(rank):
            raise ValueError(f"its config gives {site!r} the rank {rank!r} and the alpha {alpha!r}.")
        alpha = check_finite(f"the config at {site!r}", "alpha", alpha)
        sites[site] = (own_base(module), int(rank), scaling(int(rank), alpha, bool(options.get("rslora", False))))
    return sites


def layout(model: nn.Module, found: Sequence[Expert]) -> dict[str, Any]:
    """The layout of these experts: sites in the model's order, those with equal ranks and scale together."""
    groups: dict[tuple[tuple[int, ...], float], list[str]] = {}
    for site, _ in model.named_modules():
        own = [e.factors.get(site) for e in found]
        scales = {f[2] for f in own if f is not None}
        if scales:
            ranks = tuple([0 if f is None else f[0].shape[0] for f in own])
            groups.setdefault((ranks, scales.pop() if len(scales) == 1 else 1.0), []).append(site)
    return {
        "names": [e.name for e in found],
        "groups": [{"ranks": list(ranks), "scale": scale, "sites": sites} for (ranks, scale), sites in groups.items()],
    }


def experts_by_site(plan: Any) -> dict[str, Experts]:
    """Site -> Experts of a layout. ValueError for what is none."""
    try:
        names = tuple(plan["names"])
        found: dict[str, Experts] = {}
        for group in plan["groups"]:
            ranks, scale = tuple(group["ranks"]), float(group["scale"])
            if len(ranks) != len(names) or not any(ranks) or not all(type(r) is int and r >= 0 for r in ranks):
                raise ValueError(f"ranks {list(ranks)} for {len(names)} experts")
            found |= {site: Experts(names, ranks, scale) for site in group["sites"]}
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"adapt: the layout of the experts is damaged: {e!r}.") from e
    return found


def stacked(found: Sequence[Expert], site: str, own: Experts, like: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(A [R, in], B [out, R], gate [in] or None of every expert) at a site.   like: the Site, for dtype and device."""
    As, Bs = [], []
    for expert in found:
        if site in expert.factors:
            A, B, scale = expert.factors[site]
            As.append(A.to(like.device, like.dtype))
            B = B if scale == own.scale else B.double() * scale
            Bs.append(B.to(like.device, like.dtype))
    gates = [None if site not in e.gates else e.gates[site].to(like.device, like.dtype) for e in found]
    return torch.cat(As), torch.cat(Bs, 1), gates


def absences(plan: Mapping[str, Any]) -> list[str]:
    """A sentence for every expert that some of the layers do without."""
    notes = []
    for z, name in enumerate(plan["names"]):
        lacking = [s for g in plan["groups"] if not g["ranks"][z] for s in g["sites"]]
        if lacking:
            notes.append(f"expert {name!r} has {len(lacking)} of the layers not ({lacking[0]}, ...): it adds nothing there.")
    return notes
