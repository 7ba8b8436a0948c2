"""O-LoRA: W + s B_prev A_prev + s B A, s = alpha / rank: one LoRA per task, the earlier ones frozen and active.

A [rank, in] and B [out, rank] train; A_prev [previous * rank, in] and B_prev [out, previous * rank], frozen, are saved with them.
`penalty` (fastpeft.train.OLoRAPenalty) pulls the row space of A away from those of earlier tasks. Between two tasks
fastpeft.train.next_task stacks A and B under the earlier factors and starts new ones, in place (`advance` for one layer); the
optimiser must be a new one. A starts Kaiming uniform (a = sqrt(5)), B at zero. One dropout mask on x serves old and new factors.
With previous=n in adapt, n tasks' factors of zeros wait to be loaded. Not PEFT's olora (a QR start of LoRA).

Paper: arXiv 2310.14152.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


def overlap(A_prev: Tensor | None, A: Tensor, orth: str = "l1") -> Tensor:
    """Sum over the entries of A_prev A^T of |entry| ("l1") or entry^2 ("fro2"), in fp32 or wider; zero without A_prev."""
    if orth not in ("l1", "fro2"):
        raise ValueError(f"o_lora: orth={orth!r}; it must be 'l1' or 'fro2'.")
    wide = torch.promote_types(A.dtype, torch.float32)
    if A_prev is None:
        return A.new_zeros((), dtype=wide)
    with torch.autocast(A.device.type, enabled=False):
        product = A_prev.to(wide) @ A.to(wide).T
    return product.abs().sum() if orth == "l1" else product.square().sum()


@method("o_lora", paper="arXiv 2310.14152")
class OLoRA(Method):
    A_prev: Tensor | None
    B_prev: Tensor | None
    ROLES: ClassVar = {"A": "down", "B": "up"}
    PROCEDURE: ClassVar = "OLoRAPenalty"
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * (B_prev A_prev + B A)",
        defaults="the authors' code: rank 8, alpha 32",
        oracle="stock PEFT LoRA of rank t * rank and alpha t * alpha with the stacked factors: output, gradients, exported folder",
        deviations=(
            "dropout is 0 by default, as for every method here; the authors' scripts say 0.1.",
            "penalty() sums absolute values as the authors' code does; the paper's squared form is orth='fro2'.",
            "the penalty counts once per optimiser step; the authors' code, without DeepSpeed, once per micro-batch.",
            "penalty() is computed in fp32 or wider; the authors' code takes the training dtype.",
            "export writes the stacked rank with its own scale; the authors' folders keep the first task's rank and alpha.",
        ),
    )

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 32, dropout: float = 0.0, previous: int = 0
    ):
        super().__init__()
        check_rank("o_lora", rank, site)
        check_int("o_lora", "previous", previous, 0, None, site.name)
        self.dropout = check_probability("o_lora", "dropout", dropout)
        self.scale = check_finite("o_lora", "alpha", alpha) / rank
        self.A, self.B = site.empty(rank, site.in_features), site.zeros(site.out_features, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        stacked = previous * rank
        for name, shape in (("A_prev", (stacked, site.in_features)), ("B_prev", (site.out_features, stacked))):
            zeros = torch.zeros(shape, dtype=site.dtype, device=site.device) if previous else None
            self.register_buffer(name, zeros)

    def penalty(self, orth: str = "l1") -> Tensor:
        """`overlap` of this layer's A with those of the earlier tasks."""
        return overlap(self.A_prev, self.A, orth)

    def magnitude(self) -> Tensor:
        """||A||_F + ||B||_F, the second regulariser."""
        return self.A.norm() + self.B.norm()

    @torch.no_grad()
    def advance(self) -> None:
        """Stack A and B under the earlier tasks' factors and start them anew, in place. Not between a forward and its backward."""
        A, B = self.A_prev, self.B_prev
        self.A_prev = self.A.clone() if A is None else torch.cat([A, self.A])
        self.B_prev = self.B.clone() if B is None else torch.cat([B, self.B], 1)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B.zero_()
        self.A.grad = self.B.grad = None

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        new = LowRank(self.A, self.B, self.scale, dropout=p)
        return [new] if self.A_prev is None else [LowRank(self.A_prev, self.B_prev, self.scale, dropout=p), new]
