"""MELoRA: W + blockdiag(s B_1 A_1, ..., s B_n A_n), s = alpha / rank.   Each A_i [rank, in/n], B_i [out/n, rank] trains.

`rank` is the rank of one mini-LoRA, so the update has rank n * rank at the parameter count of LoRA with that rank; the scale
uses the mini rank, as in the authors' code. A_i starts Kaiming uniform over its own slice (bound sqrt(n / in)), B_i at zero.
Output slice i sees input slice i only; in a fused qkv weight the slices cut across the projections.

Paper: arXiv 2402.17263.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from fastpeft.option_checks import check_finite, check_int, check_probability
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


@method("melora", paper="arXiv 2402.17263")
class MELoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s blockdiag(B_i A_i) drop(x), s = alpha / rank of one mini",
        defaults="rank and n small; the paper varies both per task",
        oracle="stock PEFT LoRA with block-diagonal factors",
        deviations=(
            "A layer whose sides n does not divide is refused; the authors' code floors silently.",
        ),
    )

    def __init__(self, site: Site, *, rank: int = 4, alpha: float = 8, dropout: float = 0.0, n: int = 2):
        super().__init__()
        side = min(site.out_features, site.in_features)
        check_int("melora", "n", n, 1, side, site.name, "the smaller side of the layer")
        if site.in_features % n or site.out_features % n:
            raise ValueError(
                f"melora: n={n!r} at {site.name!r} ({site.in_features} -> {site.out_features}); it must divide both sides."
            )
        check_int("melora", "rank", rank, 1, side // n, site.name, f"the smaller side of one of the {n} blocks")
        self.n = n
        self.dropout = check_probability("melora", "dropout", dropout)
        self.scale = check_finite("melora", "alpha", alpha) / rank
        bound = math.sqrt(n / site.in_features)
        self.A = site.empty(n, rank, site.in_features // n)
        self.B = site.zeros(n, site.out_features // n, rank)
        self.A.data.uniform_(-bound, bound)

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        if self.n == 1:
            return [LowRank(self.A[0], self.B[0], self.scale, dropout=p)]
        return [LowRank(self.A, self.B, self.scale, dropout=p, blocks=self.n)]
