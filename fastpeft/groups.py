"""The parameters of folded groups (fastpeft.fold), and the holders of those that several layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.fold import Group, Layout, matrix_sizes, vector_sizes
from fastpeft.option_checks import check_int
from fastpeft.registry import Holder, Site
from fastpeft.shared import Composition
from fastpeft.support import key

ROLES = {"factors": "factor", "cores": "core"}


def layout(sites: Sequence[Site], o: Mapping[str, Any], label: str) -> Layout:
    """The groups of these sites for SuperLoRA's options; label: what is random in them depends on it and on the seed."""
    spans, end = {}, 0
    for s in sites:
        spans[s.name] = (end, s.out_features, s.in_features)
        end += s.out_features * s.in_features
    count = 1 if o["groups"] == "layer" else check_int(
        "superlora", "groups", o["groups"], 1, end, sites[0].name, "the numbers of all weights"
    )  # fmt: skip
    groups = []
    for g in range(count):
        start, length = g * end // count, (g + 1) * end // count - g * end // count
        kept = math.ceil(round(o["rho"] * length, 6))
        if o["fold"] == "matrix":
            sizes = matrix_sizes(sites[0].out_features, sites[0].in_features, o["order"], o["splits"])
        else:
            sizes = vector_sizes(kept, o["order"], o["splits"])
        groups.append(Group(start, length, kept, sizes, bool(o["shuffle"]), key(o["seed"], f"{label}.{g}")))
    return Layout(tuple(groups), o["order"], o["core"] == "tucker", spans)


def parameters(site: Site, rank: int, own: Layout) -> tuple[nn.ParameterList, nn.ParameterList]:
    """factors and cores of a layout's groups, one group after another, at their start."""
    factors = [site.empty(d, rank) for g in own.groups for split in g.sizes for d in split]
    cores = [site.empty(*[rank] * own.order) for g in own.groups for _ in g.sizes] if own.core else []
    for p in (*factors, *cores):
        nn.init.kaiming_uniform_(p, a=math.sqrt(5))
    for g in range(len(own.groups)):
        splits = len(own.groups[0].sizes)
        nn.init.zeros_(cores[(g + 1) * splits - 1] if own.core else factors[(g + 1) * splits * own.order - 1])
    return nn.ParameterList(factors), nn.ParameterList(cores)


class Groups(Composition):
    """Factors and cores of groups that several layers share."""

    ROLES: ClassVar = ROLES

    def __init__(self, site: Site, rank: int, own: Layout):
        super().__init__()
        self.factors, self.cores = parameters(site, rank, own)
        self.layout, self.names = own, tuple(own.spans)
        # a layer of directly folded groups composes its own stretch, and no more
        self.per_forward = len(own.spans) > 1 and not all(g.direct for g in own.groups)

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.factors, *self.cores

    def update(self, name: str, *tensors: Tensor) -> Tensor:
        return self.layout.update(name, *tensors)

    def updates(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.layout.updates(*tensors)


class Stack(Holder):
    """The two factors [out, rank] and [in, rank] of a stack of weights and its core [rank, layers, rank]."""

    ROLES: ClassVar = ROLES

    def __init__(self, sites: Sequence[Site], rank: int):
        super().__init__()
        site = sites[0]
        self.factors = nn.ParameterList([site.empty(n, rank) for n in (site.out_features, site.in_features)])
        self.cores = nn.ParameterList([site.zeros(rank, len(sites), rank)])
        self.places = {s.name: n for n, s in enumerate(sites)}
        for p in self.factors:
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
