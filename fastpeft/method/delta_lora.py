"""Delta-LoRA: W_t + s B A, s = alpha / rank, where W_t follows each change of B A: W_{t+1} = W_t + lam s (B' A' - B A).

A [rank, in] and B [out, rank] train, W_t has no gradient, moment or decay. The sum telescopes to W_0 + lam s (B A - B0 A0), with
(A0, B0) the factors when the updates began, so W is never written: the second term is a LowRank of rank 2 rank whose B A lets a
gradient through to x but not to A and B. `on` [1] is 0 before the updates begin (fastpeft.train.DeltaLoRASchedule says when; training
without it raises), so shapes never change. inplace=True writes W instead, literally, and needs an fp32 W: on a 16-bit one each
step's change is lost. There is no dropout, because dW = d(B A) holds only without. A starts Kaiming uniform (a = sqrt(5)), B at
zero. lam=0 is LoRA. What is learned has rank 2 rank at most.

Paper: arXiv 2309.02411.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


@method("delta_lora", paper="arXiv 2309.02411")
class DeltaLoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    NOTES: ClassVar = Notes(
        formula="W + s B A + lam s (B A - B0 A0), the last term without a gradient to A and B, s = alpha / rank",
        defaults="lam 2 and rank 8 as reported for the paper; alpha as lora's",
        oracle="a literal loop that adds lam s (B' A' - B A) to W after each AdamW step, in fp64",
        deviations=(
            "W is not written: a snapshot of A and B stands for all that was added to it (inplace=True writes it).",
            "Third-party code (MyTransformers) begins one step later; the algorithm's t > K is kept.",
        ),
    )
    PROCEDURE = "DeltaLoRASchedule"
    A0: Tensor
    B0: Tensor
    on: Tensor | None

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 8, lam: float = 2.0, inplace: bool = False):
        super().__init__()
        check_rank("delta_lora", rank, site)
        self.scale = check_finite("delta_lora", "alpha", alpha) / rank
        self.lam, self.writes_base = check_finite("delta_lora", "lam", lam), bool(inplace)
        if inplace and site.base.dtype != site.dtype:
            raise ValueError(
                f"delta_lora: inplace=True at {site.name!r}, whose weight is {site.base.dtype}: a step's change is less than its rounding; "
                "use an fp32 weight, or inplace=False, which writes no weight."
            )
        self.A, self.B = site.empty(rank, site.in_features), site.zeros(site.out_features, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        for name, shape in (("A0", self.A.shape), ("B0", self.B.shape), ("on", (1,))):
            zeros = None if inplace else torch.zeros(shape, dtype=site.dtype, device=site.device)
            self.register_buffer(name, zeros)

    @property
    def begun(self) -> bool:
        """Whether the updates of W began."""
        return self.on is not None and bool(self.on)

    @torch.no_grad()
    def begin(self, A: Tensor, B: Tensor) -> None:
        """W follows B A from these factors on."""
        self.A0.copy_(A)
        self.B0.copy_(B)
        self.on.fill_(1.0)

    @torch.no_grad()
    def follow(self, W: Tensor, A: Tensor, B: Tensor) -> None:
        """inplace: W += lam s (B' A' - B A), with A and B as they were before the step."""
        W.addmm_(torch.cat([self.B, -B], 1), torch.cat([self.A, A]), alpha=self.lam * self.scale)

    def terms(self, base: Any) -> list[Term]:
        self.need_procedure("delta_lora")
        low = LowRank(self.A, self.B, self.scale)
        if self.writes_base or self.lam == 0.0:
            return [low]
        A = torch.cat([self.A.detach(), self.A0])
        B = torch.cat([self.on * self.B.detach(), -self.B0], 1)
        return [low, LowRank(A, B, self.lam * self.scale)]

    def static_terms(self, base: Any) -> list[Term]:
        if not self.begun or self.lam == 0.0:
            return [LowRank(self.A, self.B, self.scale)]
        B = torch.cat([(1 + self.lam) * self.B, -self.lam * self.B0], 1)
        return [LowRank(torch.cat([self.A, self.A0]), B, self.scale)]
