"""PEFT's shira.Linear: entries on a fixed support, added to a copy of the base weight and rounded to its dtype, as PEFT does.

The fused product needs the support in row-major order without repetition. PEFT makes it so; a file may hold another. Each index
tensor is looked at once, and again whenever it was written since.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastpeft.accelerated.reading import NONE_ACTIVE, OWN, Found, Why, active
from fastpeft.term_checks import in_order
from fastpeft.terms import Sparse, Term

COMPILED = Why("compiled code cannot look at the order of the support")
UNORDERED = Why("the support is not in row-major order, has an entry twice or lies outside of the weight")
# index -> (its version, the shape it was checked for, whether it is in order)
_CHECKED: Any = WeakIdKeyDictionary()


def read(layer: Any) -> Found | Why:
    """The active adapters of a SHiRA layer."""
    names = active(layer, layer.shira_weight)
    if not names:
        return NONE_ACTIVE
    if layer.quantization_backend is not None:
        return Why("PEFT computes SHiRA on a quantised base another way")
    if torch.compiler.is_compiling():
        return COMPILED
    shape = (layer.out_features, layer.in_features)
    values, indices, scales = [], [], []
    for name in names:
        v, index = layer.shira_weight[name], layer.shira_indices[name]
        if type(index) not in OWN or index.device != v.device or index.dtype is not torch.int32:
            return Why("the support lies on another device than its values, or is not int32")
        if index.shape[1:] != v.shape or not _ordered(index, shape):
            return UNORDERED
        values.append(v)
        indices.append(index)
        scales.append(layer.scaling[name])

    def terms() -> list[Term]:
        return [Sparse(v if s == 1.0 else v * s, i) for v, i, s in zip(values, indices, scales, strict=True)]

    return Found("shira", tuple(values), terms, rounds=True)


def _ordered(index: Tensor, shape: tuple[int, int]) -> bool:
    if index.is_inference():  # has no version
        return in_order(index, *shape)
    known = _CHECKED.get(index)
    if known is None or known[:2] != (index._version, shape):
        known = _CHECKED[index] = (index._version, shape, in_order(index, *shape))
    return known[2]
