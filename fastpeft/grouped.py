"""From a Grouped term to a part of the seam: what its tokens choose, in ordinary autograd, and their order by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import grouped, lowrank
from fastpeft.ops.parts import Part
from fastpeft.ops.probe import probe
from fastpeft.terms import Grouped, LowRank


def part_of(
    term: Grouped, x: Tensor, dtype: torch.dtype, ops: Any, autocast: tuple[str, torch.dtype] | None
) -> tuple[Part, tuple[Tensor, ...]]:
    """The part of a Grouped term and its tensors: A, B, the sorted pairs and the weights, which carry choose's gradients.

    dtype: y's.   ops: the low-rank family.   autocast: (device, dtype) as the caller has it, under which choose runs, or None.
    Raises ValueError / TypeError where choose returns something else than index and weight of x's tokens.
    """
    index, weight = _chosen(term, x, dtype, ops, autocast)
    k = index.shape[-1]
    own: tuple[Tensor, ...] = (term.A, term.B, *grouped.segments(index.reshape(-1, k), len(term.ranks)))
    if weight is not None:
        own = (*own, weight.reshape(-1))
    return Part(_family(ops)(term.ranks, k), len(own), term.scale), own


def as_low_rank(term: Grouped) -> LowRank:
    """The same sum with every expert computed for every token, and its ranks weighted by `mid`: zero where it is not used."""
    owner = [z for z, rank in enumerate(term.ranks) for _ in range(rank)]

    def mid(u: Tensor, p: Tensor | None, x: Tensor) -> Tensor:
        index, weight = term.choose(p, x)
        if weight is None:
            weight = torch.ones_like(index, dtype=u.dtype)
        gate = weight.new_zeros(*index.shape[:-1], len(term.ranks)).scatter_add(-1, index, weight)
        return u * gate[..., torch.tensor(owner, device=u.device)].to(u.dtype)

    return LowRank(term.A, term.B, term.scale, mid=mid, rows=term.rows)


def _family(ops: Any) -> Any:
    if ops is lowrank:
        return grouped.Family
    from fastpeft.ops import grouped_triton

    return grouped_triton.Family


def _chosen(
    term: Grouped, x: Tensor, dtype: torch.dtype, ops: Any, autocast: tuple[str, torch.dtype] | None
) -> tuple[Tensor, Tensor | None]:
    p = None if term.rows is None else probe(x, term.rows, dtype, ops)
    if autocast is None:
        index, weight = term.choose(p, x)
    else:
        with torch.autocast(autocast[0], dtype=autocast[1]):
            index, weight = term.choose(p, x)
    _check(index, weight, x, len(term.ranks))
    return index, weight


def _check(index: Tensor, weight: Tensor | None, x: Tensor, experts: int) -> None:
    if index.dtype is not torch.int64 or index.shape[:-1] != x.shape[:-1] or index.dim() != x.dim() or not index.shape[-1]:
        raise ValueError(
            f"adapted_linear: Grouped.choose gave an index of {index.dtype} {tuple(index.shape)} for x {tuple(x.shape)}; needed is "
            "int64 with x's leading dimensions and k >= 1 experts of each token."
        )
    if weight is not None and (weight.shape != index.shape or not weight.is_floating_point()):
        raise ValueError(
            f"adapted_linear: Grouped.choose gave a weight of {weight.dtype} {tuple(weight.shape)} for an index of "
            f"{tuple(index.shape)}; needed is a float for each entry, or None."
        )
    if index.device.type == "cpu" and index.numel():
        low, high = torch.aminmax(index)
        if low < 0 or high >= experts:
            raise ValueError(
                f"adapted_linear: Grouped.choose gave experts {int(low)} to {int(high)}; there are {experts}, numbered from 0."
            )
