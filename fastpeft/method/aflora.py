"""AFLoRA: W + s diag(db) B diag(d) A, s = 1, or alpha / rank with alpha.   A [rank, in], B [out, rank], d [rank], db [out].

d and db always train. A and B train until fastpeft.train.AFLoRAFreezing freezes them one by one: `requires_grad_(False)` on the matrix and its
grad set to None, from then on; their gradient stops and d's and db's does not. Where in == out they are frozen from the start
unless train_square=True, as in the authors' GLUE code (only the feed-forward projections train there).
A and B start Kaiming uniform with a = 0, that is uniform on +-sqrt(6 / in) and +-sqrt(6 / rank), d at 0.1, db at zero. The vectors
are folded into the matrices. Everything is saved, the frozen matrices too, since no seed is kept.

Paper: arXiv 2403.13269.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


@method("aflora", paper="arXiv 2403.13269")
class AFLoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "d": "gate", "db": "gate"}
    PROCEDURE: ClassVar = "AFLoRAFreezing"
    NOTES: ClassVar = Notes(
        formula="W + s diag(db) B diag(d) A, s = 1 or alpha / rank",
        defaults="the authors' GLUE code: rank 4, no alpha (s = 1), train_square False; their GSM8K code: rank 32, alpha 64, True",
        oracle="stock PEFT VeRA with this layer's A and B in its shared buffers: output and gradients; the dense formula in fp64",
        deviations=(
            "a checkpoint does not say which matrices a procedure had frozen: train_square alone decides on load.",
            "AFLoRAFreezing counts optimiser steps; the authors' code scores every micro-batch as a step of its own.",
            "the lowest matrices are frozen, as in the paper; the authors' code compares means with a quantile of entries (threshold='elementwise').",
            "a frozen matrix has no gradient and no optimiser state from its step on; in the GLUE code it still moves in that step.",
            "the quadratic schedule of the authors' GSM8K code is not offered.",
        ),
    )

    def __init__(
        self, site: Site, *, rank: int = 4, alpha: float | None = None, dropout: float = 0.0, train_square: bool = False
    ):
        super().__init__()
        check_rank("aflora", rank, site)
        self.dropout = check_probability("aflora", "dropout", dropout)
        self.scale = 1.0 if alpha is None else check_finite("aflora", "alpha", alpha) / rank
        self.A, self.B = site.empty(rank, site.in_features), site.empty(site.out_features, rank)
        self.d, self.db = site.empty(rank), site.zeros(site.out_features)
        for p in (self.A, self.B):
            nn.init.kaiming_uniform_(p, a=0)
            p.requires_grad_(train_square or site.in_features != site.out_features)
        nn.init.constant_(self.d, 0.1)

    def terms(self, base: Any) -> list[Term]:
        A, B = self.d[:, None] * self.A, self.db[:, None] * self.B
        return [LowRank(A, B, self.scale, dropout=self.dropout if self.training else 0.0)]
