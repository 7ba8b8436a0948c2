"""Several LoRAs at one layer as one low-rank term: A [R, in] and B [out, R] hold them one after the other along the rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int, check_rank
from fastpeft.registry import Site

# an expert folder's key of a site's gate, after PEFT's prefix and the site's name
GATE = "gate"


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    names: of all experts of the model, in their order.   ranks: of each at this layer; 0 where it has none here.
    scale: of all (where theirs differ it is 1, and each is folded into its B).
    fresh: they begin here and train; otherwise they come trained, and their values follow (Method.take, or a checkpoint's).
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scale: float
    fresh: bool = False

    @property
    def present(self) -> tuple[int, ...]:
        """Numbers of the experts that this layer has."""
        return tuple([z for z, rank in enumerate(self.ranks) if rank])

    def span(self, z: int) -> slice:
        """The ranks of expert number z in the stack."""
        start = sum(self.ranks[:z])
        return slice(start, start + self.ranks[z])


def experts_of(who: str, site: Site, experts: Any, rank: Any, alpha: Any) -> Experts:
    """What a method's option `experts` means at a site: a number of fresh ones of this rank and alpha, or an Experts as it is."""
    if isinstance(experts, Experts):
        return experts
    count = check_int(who, "experts", experts, 1, None, site.name, "a number of fresh experts; adapt(experts=[folders]) takes trained ones")
    check_rank(who, rank, site)
    scale = check_finite(who, "alpha", alpha) / rank
    return Experts(tuple(map(str, range(count))), (rank,) * count, scale, fresh=True)


def factors(site: Site, experts: Experts) -> tuple[nn.Parameter, nn.Parameter]:
    """(A [R, in], B [out, R]) of a stack: each expert as LoRA begins, A Kaiming uniform (a = sqrt 5) and B zero."""
    total = sum(experts.ranks)
    A, B = site.empty(total, site.in_features), site.zeros(site.out_features, total)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, B


def gated(u: Tensor, gate: Tensor, ranks: Sequence[int]) -> Tensor:
    """u [..., R] with the ranks of each expert multiplied by its entry of gate [..., len(ranks)]; R = sum(ranks)."""
    if len(set(ranks)) == 1:
        return (gate[..., :, None] * u.unflatten(-1, (len(ranks), ranks[0]))).flatten(-2)
    parts = u.split(list(ranks), -1)
    return torch.cat([part * gate[..., z : z + 1] for z, part in enumerate(parts)], -1)
