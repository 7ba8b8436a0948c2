"""LoTR: W + s L M R, s = alpha / rank.   L [out, rank] and R [rank, in] are shared by all adapted layers of one shape and rank,
M [rank, rank] is a layer's own; all train.

The updates of a group, stacked, have Tucker-2 form. L and R start normal(0, 1), M at zero; scale 1 of the authors' code is
alpha=1. left, right: "zeros", "normal" or "svd"; middle: "zeros", "identity" or "svd". The svd starts are the Tucker-2
factors of the group's pre-trained weights, stacked: the leading singular vectors of [W_1 .. W_n] and of [W_1; ..; W_n],
and M = L^T W R^T. Two zeros would never move and are refused;
with none the layers do not start at their base output. Dropout acts on what R reads; the authors' code has none.

With M = 0 only M has a gradient in the first step. B = L M is one small product a forward; merge and export are exact, and an
exported folder repeats the shared factors in every layer.

Paper: arXiv 2402.01376.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Holder, Method, Notes, Site, method
from fastpeft.terms import LowRank, Term

_MENU = {"left": ("normal", "zeros", "svd"), "middle": ("zeros", "identity", "svd"), "right": ("normal", "zeros", "svd")}


class Factors(Holder):
    """L and R of a group, and `cores` [rank, rank] by site for an svd middle, each until its layer takes it."""

    ROLES: ClassVar = {"L": "up", "R": "down"}

    def __init__(self, sites: Sequence[Site], rank: int, starts: dict[str, str], blank: bool):
        super().__init__()
        first = sites[0]
        self.L, self.R = first.zeros(first.out_features, rank), first.zeros(rank, first.in_features)
        self.cores: dict[str, Tensor] = {}
        for p, start in ((self.L, starts["left"]), (self.R, starts["right"])):
            if start == "normal":
                nn.init.normal_(p)
        if "svd" in starts.values() and not blank:
            U, V = tucker2([s.base for s in sites], rank)
            with torch.no_grad():
                for p, factor, start in ((self.L, U, starts["left"]), (self.R, V, starts["right"])):
                    if start == "svd":
                        p.copy_(factor)
            if starts["middle"] == "svd":
                self.cores = {s.name: U.T @ s.base.dense(U.dtype) @ V.T for s in sites}


@torch.no_grad()
def tucker2(bases: Sequence[Any], rank: int) -> tuple[Tensor, Tensor]:
    """U [out, rank] and V [rank, in], fp64: the leading singular vectors of the weights side by side and one below the other."""
    rows = columns = 0
    for base in bases:
        W = base.dense(torch.float64)
        rows, columns = rows + W @ W.T, columns + W.T @ W
    # eigenvalues come in ascending order
    U, V = (torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1) for gram in (rows, columns))
    return U, V.T


@method("lotr", paper="arXiv 2402.01376")
class LoTR(Method):
    SHARES = True
    ROLES: ClassVar = {"M": "core"}
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * L M R, L and R shared by all layers of one shape",
        defaults="the authors' code: scale 1 (alpha 1), normal, zeros, normal; rank 8 is ours",
        oracle="the dense formula in fp64; stock PEFT LoRA of A = R, B = L M: output, gradients, exported folder; 3168 parameters on RoBERTa-base",
        deviations=(
            "a group is every adapted layer of one shape and rank, where the code leaves the containers to the user.",
            "the svd starts take the exact SVD of each unfolding; the code a randomised one (torch.svd_lowrank).",
            "the svd middle is L^T W R^T; the code assigns it to its transposed core without transposing it.",
            "two zero starts are refused, because nothing would ever train.",
            "dropout on what R reads is an option; the code has none.",
            "L and R are saved once, where the code's state dict repeats them in every layer.",
        ),
    )

    def __init__(
        self, site: Site, holder: Factors, *, rank: int = 8, alpha: float = 1, dropout: float = 0.0,
        left: str = "normal", middle: str = "zeros", right: str = "normal",
    ):  # fmt: skip
        super().__init__()
        self.dropout = check_probability("lotr", "dropout", dropout)
        self.scale = check_finite("lotr", "alpha", alpha) / rank
        self.M = site.zeros(rank, rank)
        with torch.no_grad():
            if middle == "identity":
                nn.init.eye_(self.M)
            elif site.name in holder.cores:
                self.M.copy_(holder.cores.pop(site.name))

    @classmethod
    def share(cls, sites: Any, blank: bool) -> dict[str, tuple[Factors, list[str]]]:
        groups: dict[tuple[int, int, int], list[Site]] = {}
        for site, options in sites:
            starts = {name: _choice(name, options[name]) for name in _MENU}
            if list(starts.values()).count("zeros") > 1:
                raise ValueError(f"lotr: {starts}; two of them start at zero, so that no gradient ever moves either. Keep one.")
            check_rank("lotr", options["rank"], site)
            groups.setdefault((site.out_features, site.in_features, options["rank"]), []).append(site)
        return {
            f"{out}x{into}_rank{rank}": (Factors(own, rank, starts, blank), [s.name for s in own])
            for (out, into, rank), own in groups.items()
        }

    def terms(self, base: Any) -> list[Term]:
        self.holder.used()
        with torch.autocast(self.M.device.type, enabled=False):
            B = self.holder.L @ self.M
        return [LowRank(self.holder.R, B, self.scale, dropout=self.dropout if self.training else 0.0)]


def _choice(name: str, start: str) -> str:
    if start not in _MENU[name]:
        raise ValueError(f"lotr: {name}={start!r}; it must be one of {', '.join(_MENU[name])}.")
    return start
