"""LoDA: y += s (h + f(h)) B^T, h = drop(x) A^T, f(h) = phi(phi(h M1^T) M2^T), phi a leaky ReLU: LoRA with a small map in the middle.

A [rank, in], B [out, rank], M1 and M2 [rank, rank] train. A, M1 and M2 start Kaiming uniform (a = sqrt(5)), B at zero. M2 = 0 is
LoRA, slope = 1 a linear map. scaling="alpha_over_r": s = alpha / rank; "inv_sqrt_out": s = 1 / sqrt(out), whatever alpha is.
Kept for backward beside x: 5 * rank numbers per token. No single weight exists, so nothing merges.

base="r" (R-LoDA): W is replaced by its best approximation of rank base_rank, as two frozen factors and never formed.
base="s" (S-LoDA): by its largest entries in magnitude, a share base_density of them, or "2:4". Both are saved with the adapter, and
the layer is not the pre-trained one at the start.

Paper: NeurIPS 2023 ENLSP workshop, MERL TR2023-150.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.start.approximate import check_base, replaced
from fastpeft.terms import LowRank, Term

UNVERIFIED = (
    "the paper's text was not to be had: the formula is that of the one public code base with it (hhnqqq/MyTransformers).",
    "s is alpha / rank; that code has 1 / sqrt(out) and no alpha (scaling=\"inv_sqrt_out\").",
    "A starts Kaiming uniform, that code's normal(0, 1/in).",
    "one dropout mask on x; that code draws one per branch.",
    "base: how the paper approximates W is not known; best low rank (\"r\") and largest magnitudes (\"s\") are our choice.",
)  # fmt: skip


@method("loda", paper="MERL TR2023-150")
class LoDA(Method):
    WHO: ClassVar = "loda"
    ROLES: ClassVar = {"A": "down", "B": "up", "M1": "mid", "M2": "mid"}
    NOTES: ClassVar = Notes(
        formula="x W^T + s (h + phi(phi(h M1^T) M2^T)) B^T, h = x A^T",
        defaults="lora's; slope 0.8 as in the public code",
        oracle="the formula in fp64; stock PEFT LoRA with M2 = 0",
        deviations=UNVERIFIED,
    )

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 8, dropout: float = 0.0, slope: float = 0.8,
        scaling: str = "alpha_over_r", base: str | None = None, base_rank: int | None = None, base_density: Any = None,
    ):  # fmt: skip
        super().__init__()
        who = self.WHO
        check_rank(who, rank, site)
        if scaling not in ("alpha_over_r", "inv_sqrt_out"):
            raise ValueError(f"{who}: scaling={scaling!r}; it must be 'alpha_over_r' or 'inv_sqrt_out'.")
        self.dropout = check_probability(who, "dropout", dropout)
        by_rank = check_finite(who, "alpha", alpha) / rank
        self.scale = by_rank if scaling == "alpha_over_r" else site.out_features**-0.5
        self.phi = functools.partial(leaky_relu, negative_slope=check_finite(who, "slope", slope))
        self.replace = check_base(who, site, base, base_rank, base_density)
        self.A, self.B = site.empty(rank, site.in_features), site.zeros(site.out_features, rank)
        self.M1, self.M2 = site.empty(rank, rank), site.empty(rank, rank)
        for p in (self.A, self.M1, self.M2):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))

    def start(self, site: Site, weight: Callable[[], Tensor], blank: bool) -> nn.Module | None:
        return replaced(site.base, *self.replace, weight, blank)

    def f(self, h: Tensor) -> Tensor:
        return self.phi(linear(self.phi(linear(h, self.M1.to(h.dtype))), self.M2.to(h.dtype)))

    def middle(self, h: Tensor, p: Any, x: Tensor) -> Tensor:
        return h + self.f(h)

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        return [LowRank(self.A, self.B, self.scale, mid=self.middle, dropout=p)]
