"""SuperLoRA: W + s (a cut of) vec(X), s = alpha / rank: the updates of all layers as one vector, split into groups, each folded to
a tensor X of Kronecker and Tucker or CP factors, then optionally projected by a fixed matrix and permuted.

X = X_1 o .. o X_splits, X_k = C_k x_1 A_k1 .. x_order A_k,order (fastpeft.fold): factors A_km [d_km, rank] and cores C_k [rank, .., rank]
train. groups: how many groups the vector is split into (layers of one rank, rows of W one after another), or "layer": one a weight.
fold="vector": near equal modes, trimmed. fold="matrix" (groups="layer"): the first order // 2 modes are out and the others
in. fold="stack": weights of one shape as [out, layers, in] with an identity for the factor of the layers, that is LoTR.
core: "tucker", or "cp" for superdiagonal ones. rho < 1: X makes ceil(rho n) of a group's n numbers, and a Fastfood projection
from `seed` and the group the rest; shuffle permutes them. alpha=None is alpha = rank.

LoRA is order=2, core="cp", groups="layer", fold="matrix"; LoKr that with splits=2, LoNKr with more; LoRTA order > 2. The last
of an X's objects starts at zero, C_splits or A_splits,order, all else Kaiming uniform (a = sqrt(5), bound 1/sqrt(rank)).
With sides apart nothing is materialised. Elsewhere each layer's update is composed where it is used and again in backward;
with rho < 1 or shuffle over several layers, all are composed once a forward and held until its backward (fastpeft.shared).

Paper: arXiv 2403.11887.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpeft.fold import canonical, sides, tucker
from fastpeft.groups import ROLES, Groups, Stack, layout, parameters
from fastpeft.option_checks import check_finite, check_int
from fastpeft.registry import Holder, Method, Notes, Site, method, recipe
from fastpeft.terms import Composed, Dense, Kron, LowRank, Term, kron


def check(site: Site, o: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless the options make sense together."""
    for name, low in (("rank", 1), ("order", 2), ("splits", 1)):
        check_int("superlora", name, o[name], low, None, site.name)
    if o["groups"] != "layer":
        check_int("superlora", "groups", o["groups"], 1, None, site.name, "or 'layer'")
    check_int("superlora", "seed", o["seed"], 0, None, site.name)
    for name, menu in (("core", ("tucker", "cp")), ("fold", ("vector", "matrix", "stack"))):
        if o[name] not in menu:
            raise ValueError(f"superlora: {name}={o[name]!r}; it must be one of {', '.join(menu)}.")
    rho = check_finite("superlora", "rho", o["rho"])
    if not 0 < rho <= 1:
        raise ValueError(f"superlora: rho={rho}; it must be more than 0 and at most 1.")
    if o["fold"] != "vector" and (rho < 1 or o["shuffle"]):
        raise ValueError(f"superlora: fold={o['fold']!r} with rho={rho}, shuffle={o['shuffle']}; only fold='vector' has those.")
    if o["fold"] == "matrix" and o["groups"] != "layer":
        raise ValueError(f"superlora: fold='matrix' with groups={o['groups']!r}; it folds one weight: groups='layer'.")
    if o["fold"] == "stack" and (o["groups"], o["order"], o["splits"], o["core"]) != (1, 3, 1, "tucker"):
        raise ValueError("superlora: fold='stack' takes groups=1, order=3, splits=1 and core='tucker'.")


@method("superlora", paper="arXiv 2403.11887")
class SuperLoRA(Method):
    SHARES = True
    ROLES: ClassVar = ROLES
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * cut(shuffle(P vec(X))), X = X_1 o .. o X_splits, X_k = C_k x_1 A_k1 .. x_order A_k,order",
        defaults="one group, order 3, no split, no projection, scale 1; rank 8 is ours",
        oracle="the dense formula in fp64; its special cases: stock PEFT LoRA and LoKr, and lotr; Fastfood against a dense Hadamard matrix",
        deviations=(
            "the paper's text was out of reach: formula and order of the five operations follow its abstract and a re-implementation.",
            "one zero object a group makes the start an identity; the re-implementation's random cores do not.",
            "groups differ in length by at most one number; what is random depends on the seed and the group's name, not on seed + g.",
            "two modes are divisors where the smaller is at least half the root, else both the root rounded up; more modes always are.",
            "layers of another rank (rank_pattern) are a vector of their own.",
            "order=3 with fold='matrix' leaves out whole and folds in.",
            "the projection's permutation sorts random keys; Fastfood's own scaling of rows is left out, as in the specification followed.",
        ),
    )

    def __init__(
        self, site: Site, holder: Any, *, rank: int = 8, alpha: float | None = None, groups: int | str = 1, order: int = 3,
        splits: int = 1, core: str = "tucker", rho: float = 1.0, shuffle: bool = False, seed: int = 0, fold: str = "vector",
    ):  # fmt: skip
        super().__init__()
        o = {"rank": rank, "groups": groups, "order": order, "splits": splits, "core": core, "rho": rho, "shuffle": shuffle,
             "seed": seed, "fold": fold}  # fmt: skip
        self.scale = 1.0 if alpha is None else check_finite("superlora", "alpha", alpha) / rank
        self.name, self.fold, self.splits, self.layout = site.name, fold, splits, None
        if holder is None:
            self.layout = layout([site], o, site.name)
            self.factors, self.cores = parameters(site, rank, self.layout)

    @classmethod
    def share(cls, sites: Any, blank: bool) -> dict[str, tuple[Holder, list[str]]]:
        alike: dict[str, tuple[list[Site], Mapping[str, Any]]] = {}
        for site, o in sites:
            check(site, o)
            if o["groups"] != "layer":
                shape = f"{site.out_features}x{site.in_features}_" if o["fold"] == "stack" else ""
                alike.setdefault(f"{shape}rank{o['rank']}", ([], o))[0].append(site)
        found: dict[str, tuple[Holder, list[str]]] = {}
        for name, (own, o) in alike.items():
            stack = o["fold"] == "stack"
            holder: Holder = Stack(own, o["rank"]) if stack else Groups(own[0], o["rank"], layout(own, o, name))
            found[name] = (holder, [s.name for s in own])
        return found

    def terms(self, base: Any) -> list[Term]:
        if self.fold == "vector" or (self.splits > 1 and self.layout.order > 2):
            return [Dense(self._update(), self.scale)]
        with torch.autocast(base.device.type, enabled=False):
            if self.fold == "stack":
                self.holder.used()
                (L, R), core = self.holder.factors, self.holder.cores[0]
                return [LowRank(R.t(), L @ core[:, self.holder.places[self.name]], self.scale)]
            if self.splits == 1:
                A, B = sides(list(self.factors), self.cores[0] if self.layout.core else None)
                return [LowRank(A, B, self.scale)]
            return [Kron(*self._halves(base), self.scale)]

    def _update(self) -> Tensor | Composed:
        if self.layout is None:
            return self.holder.read(self.name)
        return Composed(functools.partial(self.layout.update, self.name), (*self.factors, *self.cores))

    def _halves(self, base: Any) -> tuple[Tensor, Tensor]:
        """The Kronecker factors in two, where the products C x and D x cost least."""
        pairs = list(zip(self.factors[::2], self.factors[1::2], strict=True))
        cuts = range(1, self.splits)
        cost = [
            base.in_features * math.prod([u.shape[0] for u, _ in pairs[n:]])
            + base.out_features * math.prod([v.shape[0] for _, v in pairs[:n]])
            for n in cuts
        ]
        made = [
            tucker(u, [v], self.cores[k]) if self.layout.core else canonical(u, [v]) for k, (u, v) in enumerate(pairs)
        ]
        n = cuts[cost.index(min(cost))]
        return functools.reduce(kron, made[:n]), functools.reduce(kron, made[n:])


recipe(
    "lonkr", SuperLoRA, paper="arXiv 2403.11887", groups="layer", order=2, splits=3, core="cp", fold="matrix",
    notes=Notes(
        formula="W + alpha / rank * (A_11 A_12^T) (x) (A_21 A_22^T) (x) (A_31 A_32^T)",
        defaults="three Kronecker factors of one weight; rank 8, scale 1 are ours",
        oracle="the dense Kronecker product in fp64; with two factors stock PEFT LoKr",
        deviations=("superlora with other defaults; what is said there holds here.",),
    ),
)  # fmt: skip
recipe(
    "lorta", SuperLoRA, paper="arXiv 2403.11887", groups="layer", order=3, fold="matrix",
    notes=Notes(
        formula="W + alpha / rank * unfold(C x_1 A_1 x_2 A_2 x_3 A_3), A_1 [out, rank], A_2 and A_3 of sizes whose product is in",
        defaults="a tensor of order 3 a weight; rank 8, scale 1 are ours",
        oracle="the dense formula in fp64",
        deviations=("superlora with other defaults; what is said there holds here.",),
    ),
)  # fmt: skip
