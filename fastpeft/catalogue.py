"""What exists: fastpeft.methods() and METHODS.md, both read off the registry and the built methods."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastpeft.adapter import build_alone
from fastpeft.base import Plain
from fastpeft.registry import Notes, Recipe, Site, every_recipe
from fastpeft.terms import Bias, Kron, LowRank, is_linear

# the layer that METHODS.md counts parameters on
WIDTH = 4096


@dataclass(frozen=True)
class MethodInfo:
    """One row of fastpeft.methods(). summary: the first paragraph of its file."""

    name: str
    paper: str
    summary: str
    terms: tuple[str, ...]
    options: Mapping[str, Any]
    mergeable: bool
    exportable: bool
    site: str
    notes: Notes | None


class MethodTable(tuple[MethodInfo, ...]):
    """What fastpeft.methods() returns: a tuple of MethodInfo that prints as a table."""

    def __str__(self) -> str:
        rows = [("method", "paper", "site", "terms", "merge", "to LoRA", "options")]
        for m in self:
            terms = " ".join(m.terms)
            rows.append((m.name, m.paper, m.site, terms, _yes(m.mergeable), _yes(m.exportable), _options(m.options)))
        widths = [max(len(row[k]) for row in rows) for k in range(6)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[6]]) for r in rows)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in options.items())


def methods() -> MethodTable:
    """Every recipe: name, paper, terms, options with defaults, whether it merges into W, whether it exports to plain LoRA.

    The last three are read off the terms of the method built on a 32 x 32 layer, not declared.
    """
    return MethodTable(_describe(r) for r in every_recipe())


def _describe(r: Recipe) -> MethodInfo:
    base = Plain(torch.eye(32))
    replaced = False
    with torch.random.fork_rng(devices=[]):
        if r.site == "linear":
            adapter, _ = build_alone("example", base, [r], {})
            (method,), replaced = adapter.methods().values(), "base" in adapter._modules
            base = adapter.base.view() if replaced else base
        else:
            method = r.build(Site("example", base, torch.float32), {})
        terms = method.eval().every_term(base)
    kinds = tuple(dict.fromkeys(type(t).__name__ for t in terms))
    linear = is_linear(terms) and r.site == "linear"
    # a LoRA for a base that only this adapter has is none that others could use
    own = replaced or method.writes_base or r.cls.TRAINS_ALL
    exportable = linear and not own and all(isinstance(t, (LowRank, Kron, Bias)) for t in terms)
    return MethodInfo(r.name, r.paper, _summary(r), kinds, r.options, linear, exportable, r.site, r.notes)


def _summary(r: Recipe) -> str:
    """The first paragraph of the method's file."""
    text = inspect.getdoc(inspect.getmodule(r.cls)) or inspect.getdoc(r.cls) or ""
    return " ".join(text.split("\n\n")[0].split())


def trainable(r: Recipe) -> int:
    """Numbers that train on one WIDTH -> WIDTH layer or FFN with the recipe's defaults, shared ones included; W's where W trains."""
    if r.cls.TRAINS_ALL:
        return WIDTH * WIDTH
    base = Plain(torch.empty(WIDTH, WIDTH, device="meta"))
    modules: list[torch.nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        if r.site == "linear":
            modules += build_alone("example", base, [r], {})
        else:
            modules.append(r.build(Site("example", base, torch.float32), {}))
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


def markdown() -> str:
    """The text of METHODS.md."""
    recipes = {r.name: r for r in every_recipe()}
    lines = [
        "# Methods",
        "",
        "Made by `fastpeft methods --markdown`; a test holds this file against the code. Terms are the vocabulary of",
        "[docs/DESIGN.md](docs/DESIGN.md). *Trains*: numbers that train on one 4096 x 4096 layer with the defaults, what several",
        "layers share included. *Merges*: folds into the weight. *To LoRA*: `export_lora` writes it as a plain LoRA on the original",
        "weights, without loss. *PEFT*: the peft_type in whose own layout a folder is saved with the defaults. Each name leads to",
        "a page with formula, options, oracle and deviations; [docs/MATRIX.md](docs/MATRIX.md) says what works with what.",
        "",
        "| method | paper | sits on | trains | terms | merges | to LoRA | PEFT |",
        "| --- | --- | --- | ---: | --- | --- | --- | --- |",
    ]
    table = methods()
    for m in table:
        r = recipes[m.name]
        form = r.cls.PEFT
        peft = form.peft_type if form is not None and form.config(r.options) is not None else ""
        terms = " ".join(m.terms)
        row = (f"[{m.name}](docs/methods/{m.name}.md)", m.paper, m.site, f"{trainable(r):,d}", terms, _yes(m.mergeable), _yes(m.exportable), peft)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"
