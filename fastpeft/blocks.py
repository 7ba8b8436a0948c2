"""Which transformer block each layer belongs to.

A block is the child of the outermost nn.ModuleList on the way to the layer (right for Llama, Mixtral, Gemma, Phi, OPT, T5, BERT,
GPT-NeoX, GPT-2, ViT), unless `blocks=` names others. A model whose layers lie in no list at all is one block: itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastpeft.adapter import is_conv1d
from fastpeft.targets import Targets, checked_targets, is_linear_layer, matches


@dataclass(frozen=True)
class Block:
    """name: of the module, "" for the model itself.   width: of its input, taken to be what its first linear layer reads."""

    name: str
    width: int


def blocks_of(model: nn.Module, layers: Iterable[str], wanted: Targets | None = None) -> tuple[dict[str, Block], list[str]]:
    """(layer -> its block, the layers in no block). wanted: names, dotted suffixes or a regex of the blocks, instead of the rule.

    ValueError where `wanted` matches no module, or only blocks without layers.
    """
    layers = list(layers)
    if wanted is None:
        lists = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        names = {n for n, _ in model.named_modules() if n.rpartition(".")[0] in lists}
        if not any(_around(layer, names) for layer in layers):
            names = {""}
    else:
        targets = checked_targets("blocks", wanted)
        names = {n for n, _ in model.named_modules() if n and matches(n, targets)}
        if not any(_around(layer, names) for layer in layers):
            raise ValueError(
                f"adapt: blocks={wanted!r} names no module of {type(model).__name__} around an adapted layer; those are "
                f"{', '.join(layers[:6])}{' ...' if len(layers) > 6 else ''}."
            )
    found: dict[str, Block] = {}
    made: dict[str, Block] = {}
    for layer in layers:
        around = _around(layer, names)
        if around:
            name = around[0]
            if name not in made:
                made[name] = Block(name, _width(model.get_submodule(name)))
            found[layer] = made[name]
    return found, [layer for layer in layers if layer not in found]


def _around(layer: str, names: set[str]) -> list[str]:
    """Those of `names` that are modules around the layer (or the layer itself), the outermost first."""
    parts = layer.split(".")
    return [n for n in ("", *(".".join(parts[:k]) for k in range(1, len(parts) + 1))) if n in names]


def _width(block: nn.Module) -> int:
    first: Any = next(m for m in block.modules() if is_linear_layer(m))
    return first.weight.shape[0] if is_conv1d(first) else first.in_features
