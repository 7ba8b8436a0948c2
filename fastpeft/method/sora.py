"""SoRA: W + s B diag(g) A, s = alpha / rank.   A [rank, in], B [out, rank] and the gate g [rank] train.

rank is the largest one; training drives entries of g to exactly zero by a proximal step (`soft_threshold`) after each step of
the optimiser, which is fastpeft.train.SoRASchedule's matter. A starts Kaiming uniform (a = sqrt(5)), B at zero, g normal(0, 1). g is folded
into A. Where g is zero A's row and B's column have no gradient and g has one, so a rank may come back. g is fp32 on a 16-bit
base, as every parameter: a threshold of 1e-4 would be lost in 16 bits. merge and export drop the ranks whose g is zero, also
all of them, and keep s.

Paper: arXiv 2311.11696.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


def soft_threshold(v: Tensor, xi: float, *, compat_official: bool = False) -> Tensor:
    """sign(v) max(|v| - xi, 0): the proximal operator of xi |v|.

    compat_official=True is the released operator instead, which sets what it has moved below xi to zero: |v| < 2 xi becomes 0
    (but |v| = xi stays), the rest |v| - xi.
    """
    if check_finite("sora.soft_threshold", "xi", xi) < 0:
        raise ValueError(f"sora.soft_threshold: xi={xi}; it must be at least 0.")
    if not compat_official:
        return v.sign() * (v.abs() - xi).clamp_min(0.0)
    moved = torch.where(v.abs() > xi, v - xi * v.sign(), v)
    return torch.where(moved.abs() < xi, 0.0, moved)


@method("sora", paper="arXiv 2311.11696")
class SoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "g": "gate"}
    PROCEDURE: ClassVar = "SoRASchedule"
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * B diag(g) A",
        defaults="the authors' scripts: rank 8, alpha 16, dropout 0",
        oracle="stock PEFT LoRA with lora_B = B diag(g): output and gradients; the dense formula in fp64; a table of soft_threshold",
        deviations=(
            "soft_threshold is the operator of the paper; the released one zeroes up to 2 xi (compat_official=True).",
            "g is [rank]; the authors store it as [1, rank].",
            "g is a group of the one optimiser, without weight decay; with AdamW that equals the authors' second optimiser.",
            "the L1 penalty that the authors' code adds to the loss is off (SoRASchedule(l1=...)); the paper has the threshold alone.",
            "stages keep the optimiser's state; the authors' scripts go on with a learning rate of zero, by their code (rate=...).",
        ),
    )

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0):
        super().__init__()
        check_rank("sora", rank, site)
        self.dropout = check_probability("sora", "dropout", dropout)
        self.scale = check_finite("sora", "alpha", alpha) / rank
        self.A, self.B, self.g = site.empty(rank, site.in_features), site.zeros(site.out_features, rank), site.empty(rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.normal_(self.g)

    def terms(self, base: Any) -> list[Term]:
        return [LowRank(self.g[:, None] * self.A, self.B, self.scale, dropout=self.dropout if self.training else 0.0)]

    def static_terms(self, base: Any) -> list[Term]:
        kept = self.g != 0
        return [LowRank((self.g[:, None] * self.A)[kept], self.B[:, kept], self.scale)]
