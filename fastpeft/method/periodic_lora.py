"""PeriodicLoRA: W + s (B_0 A_0 + ... + B_p A_p), s = alpha / rank: a LoRA that is unloaded and started anew, stage after stage.

A [rank, in] and B [out, rank] train. At a stage's end their product joins the past, the frozen term A_past [(stages - 1) rank, in],
B_past [out, (stages - 1) rank], which is zero where no stage ended yet, and they begin again: A Kaiming uniform (a = sqrt(5)), B at
zero. W is never written: what the paper adds to W stands beside it, exactly, on a 16-bit or quantised W too. With momentum m the
past gets (1 - m) B A and the adapter keeps A and m B; for every m the layer computes the same before and after. Dropout acts on
what A reads, not on the past. When to unload, and the optimiser's fresh start, is fastpeft.train.PeriodicLoRASchedule's matter;
training without it raises. A further run on a loaded adapter goes on from the stage it is in. stages=1 is LoRA.

Paper: arXiv 2402.16141.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


@method("periodic_lora", paper="arXiv 2402.16141")
class PeriodicLoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * (B_past A_past + B A)",
        defaults="rank and alpha as lora's; stages=4, as the paper's are not known",
        oracle="stock PEFT LoRA, merged and started again at each stage's end: parameters and outputs after every step",
        deviations=(
            "The past is a frozen term of rank (stages - 1) * rank beside W and not added to W: W keeps its bits, its size and its format.",
            "The momentum form is ours: the paper's text was out of reach, and this one changes no output at an unload for any m.",
            "The per-step reading of momentum in third-party code (MyTransformers), which makes the output jump, is not offered.",
            "The learning rate restarts by the procedure's `rate`; the loop's own scheduler is not touched.",
        ),
    )
    PROCEDURE = "PeriodicLoRASchedule"

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 8, dropout: float = 0.0, stages: int = 4):
        super().__init__()
        check_rank("periodic_lora", rank, site)
        self.stages = check_int("periodic_lora", "stages", stages, 1, None, site.name)
        self.dropout = check_probability("periodic_lora", "dropout", dropout)
        self.scale = check_finite("periodic_lora", "alpha", alpha) / rank
        self.A, self.B = site.empty(rank, site.in_features), site.zeros(site.out_features, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        past = (stages - 1) * rank
        for name, shape in (("A_past", (past, site.in_features)), ("B_past", (site.out_features, past))):
            zeros = torch.zeros(shape, dtype=site.dtype, device=site.device) if past else None
            self.register_buffer(name, zeros)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64, device=site.device))

    @torch.no_grad()
    def unload(self, momentum: float, generator: torch.Generator) -> bool:
        """Move the stage's product to the past and begin the next stage, in place; False (nothing done) in the last one.

        generator: on the CPU, for the new A; momentum > 0 keeps A.
        """
        k, rank = int(self.stage), len(self.A)
        if k == self.stages - 1:
            return False
        span = slice(k * rank, (k + 1) * rank)
        self.A_past[span] = self.A
        self.B_past[:, span] = (1 - momentum) * self.B
        self.B.mul_(momentum)
        if momentum == 0.0:
            bound = 1 / math.sqrt(self.A.shape[1])
            fresh = torch.empty(self.A.shape, dtype=self.A.dtype).uniform_(-bound, bound, generator=generator)
            self.A.copy_(fresh)
        self.stage += 1
        return True

    def terms(self, base: Any) -> list[Term]:
        self.need_procedure("periodic_lora")
        low = LowRank(self.A, self.B, self.scale, dropout=self.dropout if self.training else 0.0)
        return [low] if self.A_past is None else [low, LowRank(self.A_past, self.B_past, self.scale)]

    def static_terms(self, base: Any) -> list[Term]:
        low, done = LowRank(self.A, self.B, self.scale), int(self.stage) * len(self.A)
        return [low, LowRank(self.A_past[:done], self.B_past[:, :done], self.scale)] if done else [low]

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        if not 0 <= int(state["stage"]) < self.stages:
            raise ValueError(f"periodic_lora: stage is {int(state['stage'])}; it must be 0 to {self.stages - 1}, with stages={self.stages}.")
