"""DyLoRA: one adapter for every rank b = 1 .. rank: W + (alpha / b) B[:, :b] A[:b].   A [rank, in], B [out, rank] train.

The scale follows b, in training and in evaluation. mode="full" (the better one in the paper's ablation): all b rows of A and
columns of B have gradients. mode="frozen" (the released script): only row and column b do; those before them enter as
constants. All others get zeros, not None: weight decay and momentum still move them unless the loop restores them.
b starts at `rank`; `set_rank` changes it for a layer or a model, in place, so that one compiled graph serves every b, at the
price of the largest. b is not saved: a folder holds all ranks, and a loaded adapter starts at `rank`. merge and export take
the b in use. A starts Kaiming uniform (a = sqrt(5)), B at zero. fastpeft.train.DyLoRASampling draws b for each step.

Paper: arXiv 2210.07558.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.option_checks import check_finite, check_int, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


@method("dylora", paper="arXiv 2210.07558")
class DyLoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    PROCEDURE = "DyLoRASampling"
    NOTES: ClassVar = Notes(
        formula="y = x W^T + alpha/b (drop(x) A[:b]^T) B[:, :b]^T",
        defaults="alpha 16 and rank 8 of the authors' script",
        oracle="stock PEFT LoRA of rank b for every b, in one compiled graph",
        deviations=(
            "mode=\"full\" is the default, the better one in the paper's ablation; the released script has "
            '"frozen".',
        ),
    )

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0, mode: str = "full"
    ):
        super().__init__()
        check_rank("dylora", rank, site)
        if mode not in ("full", "frozen"):
            raise ValueError(f"dylora: mode={mode!r}; it must be 'full' or 'frozen'.")
        self.dropout = check_probability("dylora", "dropout", dropout)
        self.alpha, self.mode, self.site = check_finite("dylora", "alpha", alpha), mode, site.name
        self.A = site.empty(rank, site.in_features)
        self.B = site.zeros(site.out_features, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.register_buffer("live", torch.empty(rank, dtype=site.dtype, device=site.device), persistent=False)
        self.register_buffer("trains", torch.empty(rank, dtype=torch.bool, device=site.device), persistent=False)
        self.set_rank(rank)

    def check(self, b: Any) -> None:
        """Raise unless b is a rank of this layer."""
        check_int("dylora.set_rank", "b", b, 1, self.A.shape[0], self.site, "the layer's rank")

    def set_rank(self, b: int) -> None:
        """Use the first b ranks from the next forward on; 1 <= b <= rank. Not between a forward and its backward."""
        self.check(b)
        self.b = b
        self.refill()

    def refill(self) -> None:
        self.live.zero_()[: self.b] = self.alpha / self.b
        self.trains.zero_()[self.b - 1] = True

    def terms(self, base: Any) -> list[Term]:
        A, B = self.A, self.B
        if self.mode == "frozen":
            A = torch.where(self.trains[:, None], A, A.detach())
            B = torch.where(self.trains, B, B.detach())
        return [LowRank(A, B * self.live, dropout=self.dropout if self.training else 0.0)]

    def static_terms(self, base: Any) -> list[Term]:
        return [LowRank(self.A[: self.b], self.B[:, : self.b], self.alpha / self.b)]


def set_rank(model: nn.Module, b: int) -> None:
    """DyLoRA.set_rank on every dylora layer of `model`; ValueError, changing none, if there is none or b fits not all."""
    found = [m for m in model.modules() if isinstance(m, DyLoRA)]
    if not found:
        raise ValueError(f"dylora.set_rank: this {type(model).__name__} has no dylora layer; adapt it with 'dylora'.")
    for layer in found:
        layer.check(b)
    for layer in found:
        layer.set_rank(b)
