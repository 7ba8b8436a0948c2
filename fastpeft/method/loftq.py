"""LoftQ: Q + s B A, s = alpha / rank: LoRA on a quantised weight Q, begun where Q + s B A is near W.

Q is NormalFloat of `bits` bits (2 to 8) in blocks of `block`, without double quantisation; A [rank, in] and B [out, rank] train.
Start, from B A = 0, `iterations` times: Q = NF(W - s B A), then s B A = the best approximation of W - Q of that rank. So Q is
not NF(W) with more than one round, and the layer is not the pre-trained one. compat_unscaled=True: A and B are not divided by
sqrt(s), as in the authors' code and PEFT, whose layer then begins at Q + s (W - Q) up to rank; equal where alpha = rank.

Q replaces the base and is saved with the factors. merge gives Q + s B A, dense. Defaults: the authors' scripts.

Paper: arXiv 2310.08659.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.start.loftq import loftq
from fastpeft.start.quantise import check_blocks, normal_float, room
from fastpeft.terms import LowRank, Term


@method("loftq", paper="arXiv 2310.08659")
class LoftQ(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    BEGIN: ClassVar = frozenset({"iterations", "compat_unscaled"})
    NOTES: ClassVar = Notes(
        formula="Q + s B A, Q = NF4(W - s B A) of the round before, s = alpha / rank",
        defaults="the authors' scripts: rank 16, alpha 16, 5 rounds, blocks of 64 (PEFT: 1 round)",
        oracle="algorithm 1 written slowly in fp64, with levels and codes of its own; bitsandbytes' codes of Q",
        deviations=(
            "A and B are divided by sqrt(s), so that Q + s B A is near W for any alpha; compat_unscaled=True is the authors' way.",
            "of two levels at equal distance bitsandbytes' rule takes one, not the authors' argmin; a block of zeros is zero.",
            "no uniform quantisation of the authors' GLUE code, and no int8.",
            "no PEFT oracle: its LoftQ needs a GPU since 0.20.",
        ),
    )

    def __init__(
        self, site: Site, *, rank: int = 16, alpha: float = 16, dropout: float = 0.0, bits: int = 4, iterations: int = 5,
        block: int = 64, compat_unscaled: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_rank("loftq", rank, site)
        check_int("loftq", "iterations", iterations, 1, None, site.name)
        check_blocks("loftq", site.name, site.base, bits, block)
        self.dropout = check_probability("loftq", "dropout", dropout)
        self.scale = check_finite("loftq", "alpha", alpha) / rank
        if self.scale <= 0:
            raise ValueError(f"loftq: alpha={alpha} at {site.name!r}; it must be positive: the start is divided by its root.")
        self.store, self.iterations, self.unscaled = (bits, block), iterations, compat_unscaled
        self.A, self.B = site.zeros(rank, site.in_features), site.zeros(site.out_features, rank)

    def start(self, site: Site, weight: Callable[[], Tensor], blank: bool) -> nn.Module:
        if blank:
            return room(site.base, *self.store)
        quantise = normal_float(*self.store, site.base.dtype)
        A, B, stored = loftq(weight(), self.A.shape[0], self.iterations, quantise)
        root = 1.0 if self.unscaled else math.sqrt(self.scale)
        self.A.copy_(A / root), self.B.copy_(B / root)
        return stored

    def terms(self, base: Any) -> list[Term]:
        return [LowRank(self.A, self.B, self.scale, dropout=self.dropout if self.training else 0.0)]
