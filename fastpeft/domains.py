"""A mixture of LoRAs (moa) at work: fix an expert by hand, switch one off, add one, and see what was chosen."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.blocks import blocks_of
from fastpeft.experts import Expert, layout, read_experts
from fastpeft.leave import unload
from fastpeft.option_checks import check_finite, check_int
from fastpeft.patterns import exactly
from fastpeft.record import Adaptation, adaptation
from fastpeft.report import Report
from fastpeft.routing import Routing
from fastpeft.routing_hooks import routing_of
from fastpeft.swap import build_and_attach


def use_expert(model: nn.Module, expert: int | str | None) -> None:
    """Every sequence uses this expert from here on, in every block; None: the routers choose again. merge and export_lora then know it.

    ValueError for one that there is not, or that is disabled.
    """
    routing = routing_of(model, "use_expert")
    number = None if expert is None else routing.number(expert, "use_expert")
    if number is not None and not routing.allowed()[number]:
        raise ValueError(f"use_expert: {routing.names[number]!r} is disabled; enable_expert it first.")
    routing.fixed = number


@contextlib.contextmanager
def using_expert(model: nn.Module, expert: int | str | None) -> Iterator[nn.Module]:
    """use_expert for a while."""
    routing = routing_of(model, "using_expert")
    was = routing.fixed
    use_expert(model, expert)
    try:
        yield model
    finally:
        routing.fixed = was


def disable_expert(model: nn.Module, expert: int | str) -> None:
    """No router chooses this expert any more (its logit is minus infinity). Saved with the adapter. ValueError for the last one left."""
    routing = routing_of(model, "disable_expert")
    number = routing.number(expert, "disable_expert")
    left = routing.allowed()
    left[number] = False
    if not any(left) or routing.fixed == number:
        why = "it is fixed (use_expert)" if routing.fixed == number else "no other is left"
        raise ValueError(f"disable_expert: {routing.names[number]!r} cannot be disabled: {why}.")
    _allow(routing, number, False)


def enable_expert(model: nn.Module, expert: int | str) -> None:
    """Undo disable_expert."""
    routing = routing_of(model, "enable_expert")
    _allow(routing, routing.number(expert, "enable_expert"), True)


def choices(model: nn.Module) -> dict[str, Tensor]:
    """Block -> [batch], the number of the expert that each sequence of the last routed forward used; {} before the first."""
    last = routing_of(model, "choices").last
    return {} if last is None else dict(last.choices)


@torch.no_grad()
def predictions(model: nn.Module) -> dict[str, Tensor]:
    """Block -> [batch], what each router makes of the last routed forward, whatever label it had; {} where that kept decisions (a decode step)."""
    routing = routing_of(model, "predictions")
    pooled = {} if routing.last is None else routing.last.pooled
    return {name: routing.routers[name].logits(h).argmax(-1) for name, h in pooled.items()}


def add_expert(
    model: nn.Module,
    folder: str | os.PathLike[str] | None = None,
    *,
    name: str,
    rank: int = 8,
    alpha: float = 8,
    train_expert: bool = True,
) -> Report:
    """Append an expert and its row to every router. The experts and rows that were there are frozen; the new ones train.

    folder: of a trained LoRA; None begins a fresh one of this rank and alpha at every layer that the model's experts have.
    While the new expert is disabled the model computes as before. Every adapter parameter is a new object: make a new optimiser.
    ValueError (or CheckpointError for the folder), leaving the model as it was, for a name that is taken, a model with modules_to_save,
    trained biases or other methods beside moa, and a base that was let go.
    """
    routing, record = routing_of(model, "add_expert"), adaptation(model, "add_expert")
    if name in routing.names or not isinstance(name, str) or not name:
        raise ValueError(f"add_expert: name={name!r}; it must be a string that is none of {', '.join(map(repr, routing.names))}.")
    if len(record.methods) > 1 or record.originals or record.biases or not record.keep_base:
        raise ValueError(
            "add_expert: the adapter is built anew around the model's own weights, which modules_to_save, trained biases, other methods "
            "and keep_base=False do not allow; save the experts one by one, and adapt with experts=[...]."
        )
    old = _experts(model, record, routing)
    scales = {site: scale for e in old for site, (_, _, scale) in e.factors.items()}
    if folder is None:
        new = Expert(name, {s: _fresh(model, s, rank, alpha) for s in record.sites}, {})
    else:
        (new,) = read_experts(model, {name: folder})
    new = Expert(name, {s: _rescaled(*f, scales.get(s, f[2])) for s, f in new.factors.items()}, {})
    plan = layout(model, [*old, new])
    sites = [site for group in plan["groups"] for site in group["sites"]]
    alone = blocks_of(model, sites, record.options.get("blocks"))[1]
    if alone:
        raise ValueError(f"add_expert: {', '.join(alone[:6])} of {name!r} lie in no block of this model.")
    rows = {n: (_rows(r.old_R, r.R), _rows(r.old_b, r.b)) for n, r in routing.routers.items()}
    disabled = [z for z, allowed in enumerate(routing.allowed()) if not allowed]
    options = {k: v for k, v in record.options.items() if k not in ("rank", "alpha")}
    options |= {"experts": plan, "frozen": len(old), "train_experts": train_expert, "train_router": True}
    quantize, fixed = record.quantize, routing.fixed
    unload(model)
    report = build_and_attach(
        model, "moa", target_modules=exactly(sites), exclude_modules=None, modules_to_save=None, rank_pattern=None,
        alpha_pattern=None, bias="none", quantize=quantize, given=[*old, new], **options,
    )  # fmt: skip
    again = routing_of(model, "add_expert")
    again.fixed = fixed
    for block, (R, b) in rows.items():
        router = again.routers[block]
        with torch.no_grad():
            router.old_R.copy_(R)
            if b is not None:
                router.old_b.copy_(b)
    for z in disabled:  # in the routers of blocks that the new expert brought, too
        _allow(again, z, False)
    return report


def _experts(model: nn.Module, record: Adaptation, routing: Routing) -> list[Expert]:
    """The model's own experts as they are now."""
    parts: dict[str, Any] = {site: model.get_submodule(site).adapter.methods()["moa"] for site in record.sites}
    found = []
    for z, name in enumerate(routing.names):
        factors = {}
        for site, m in parts.items():
            if m.experts.ranks[z]:
                A, B = (t.detach() for t in m.stack())
                at = m.experts.span(z)
                factors[site] = A[at].clone(), B[:, at].clone(), m.experts.scale
        found.append(Expert(name, factors, {}))
    return found


def _fresh(model: nn.Module, site: str, rank: int, alpha: float) -> tuple[Tensor, Tensor, float]:
    """LoRA's start at a site."""
    m: Any = model.get_submodule(site).adapter.methods()["moa"]
    check_int("add_expert", "rank", rank, 1, min(m.A.shape[1], m.B.shape[0]), site, "the smaller side of the layer")
    check_finite("add_expert", "alpha", alpha)
    A, B = m.A.new_empty(rank, m.A.shape[1]), m.B.new_zeros(m.B.shape[0], rank)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, B, alpha / rank


def _rescaled(A: Tensor, B: Tensor, scale: float, wanted: float) -> tuple[Tensor, Tensor, float]:
    """The same update under the scale that the layer's other experts have, so that theirs need no change."""
    return (A, B, scale) if scale == wanted else (A, (B.double() * (scale / wanted)).to(B.dtype), wanted)


def _rows(old: Tensor | None, own: Tensor | None) -> Tensor | None:
    if own is None:
        return None
    return own.detach().clone() if old is None else torch.cat([old, own]).detach()


def _allow(routing: Routing, number: int, now: bool) -> None:
    routing.decoded = None
    for router in routing.routers.values():
        router.allowed[number] = now
