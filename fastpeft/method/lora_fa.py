"""LoRA-FA: LoRA whose A stays at its random start: W + s B A, s = alpha / rank.   A [rank, in] is frozen, B [out, rank] trains.

Nothing that trains meets x, so the layer keeps rank numbers per token for backward and no x, with dropout too: the mask is
made again from its seed. Per step dB = s dy^T u with u = drop(x) A^T, dx = dy W + s mask * (dy B A). This is the plain mode,
for any optimiser on B; the preconditioned mode is a procedure, fastpeft.train.LoRAFAPreconditioner.

A starts as LoRA's (Kaiming uniform, a = sqrt(5), that is +-1/sqrt(in)), B at zero; A is saved, since no seed is kept.
rslora=True: s = alpha / sqrt(rank). The folder is a plain LoRA for PEFT; here it becomes `lora_fa` again.
UNVERIFIED: the paper's A is said to be normal (PEFT's is this uniform one), and where it puts dropout is not known to us.

Paper: arXiv 2308.03303.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from fastpeft.method.lora import peft_lora, scaling
from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.terms import LowRank, Term


@method("lora_fa", paper="arXiv 2308.03303")
class LoRAFA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s (drop(x) A^T) B^T, A constant",
        defaults="LoRA's",
        oracle="stock PEFT LoRA with a frozen A; saved tensors counted",
        deviations=(
            "A starts as PEFT's LoRA does; the paper's text could not be read and is said to take a "
            "normal one.",
            "The layer is the paper's plain mode; the preconditioned one, which PEFT's optimiser has, is asked for by "
            "attaching fastpeft.train.LoRAFAPreconditioner.",
        ),
    )
    PEFT = PeftFormat("LORA", {"A": "lora_A.weight", "B": "lora_B.weight"}, peft_lora)

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 8, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        check_rank("lora_fa", rank, site)
        self.dropout = check_probability("lora_fa", "dropout", dropout)
        self.scale = scaling(rank, check_finite("lora_fa", "alpha", alpha), rslora)
        self.A = site.empty(rank, site.in_features).requires_grad_(False)
        self.B = site.zeros(site.out_features, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def terms(self, base: Any) -> list[Term]:
        return [LowRank(self.A, self.B, self.scale, dropout=self.dropout if self.training else 0.0)]
