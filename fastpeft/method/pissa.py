"""PiSSA: W + s (B A - B0 A0), s = alpha / rank: LoRA that begins at the principal part of W, s B0 A0.

A0 [rank, in] and B0 [out, rank] hold the roots of W's largest singular values, divided by s; A and B start there and train. Said
as a difference, (B - B0) A + B0 (A - A0), formed in the parameters' dtype: one low-rank term of rank 2 * rank, zero to the bit at
the start, which loses no small step in 16 bits. W stays, so a folder is a plain LoRA of rank 2 * rank on W, which PEFT loads.
niter: None is the exact SVD, a number a randomised one under `seed` (None: torch's generator). rslora as in lora. No dropout,
which would drop principal parts of W itself.

fold=True: the base is W - s B0 A0 and the term B A, of half the rank; rounded to W's dtype. bits=4 (2 to 8): QPiSSA, the base
is NF4(W - B A), from `iterations` rounds of SVD and quantisation; s must be 1.

Paper: arXiv 2404.02948.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.method.lora import peft_lora, scaling
from fastpeft.option_checks import check_finite, check_int, check_rank
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.start.pissa import dense_room, principal, quantised, residual
from fastpeft.start.quantise import BLOCK, check_blocks, normal_float, room
from fastpeft.terms import LowRank, Term


def peft_pissa(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """PEFT LoraConfig fields of the LoRA on W that the difference is: twice the rank, the same s; None where W is replaced."""
    if options["fold"] or options["bits"] is not None:
        return None
    wider = math.sqrt(2) if options["rslora"] else 2
    ranks, alphas = options.get("rank_pattern", {}), options.get("alpha_pattern", {})
    doubled = options | {"rank": 2 * options["rank"], "alpha": wider * options["alpha"], "dropout": 0.0}
    return peft_lora(doubled) | {
        "rank_pattern": {k: 2 * r for k, r in ranks.items()},
        "alpha_pattern": {k: wider * a for k, a in alphas.items()},
    }


@method("pissa", paper="arXiv 2404.02948")
class PiSSA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    A0: Tensor
    B0: Tensor
    BEGIN: ClassVar = frozenset({"niter", "seed", "iterations"})
    NOTES: ClassVar = Notes(
        formula="W + s ((B - B0) A + B0 (A - A0)), s B0 A0 the principal part of W, s = alpha / rank",
        defaults="rank and alpha of lora, with the paper's s = 1 (its scripts: rank = alpha = 128); QPiSSA: 5 rounds",
        oracle="stock PEFT: PiSSA's start, output and gradients, and its conversion to a plain LoRA; the dense formula in fp64",
        deviations=(
            "the base stays W: the authors and PEFT fold s B0 A0 into it (fold=True), which rounds and loses small steps in bf16.",
            "the difference form computes with rank 2 * rank.",
            "a folder of fold=True or bits holds the replaced base, whole; export_lora refuses those.",
            "niter uses no oversampling, as in PEFT; the SVD of an fp64 weight is in fp64.",
        ),
    )
    PEFT = PeftFormat("LORA", {"A": "lora_A.weight", "B": "lora_B.weight"}, peft_pissa)

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 8, rslora: bool = False, niter: int | None = None,
        seed: int | None = 0, fold: bool = False, bits: int | None = None, iterations: int = 5,
    ):  # fmt: skip
        super().__init__()
        check_rank("pissa", rank, site)
        for name, value, low in (("niter", niter, 0), ("seed", seed, 0), ("iterations", iterations, 1)):
            if value is not None or name == "iterations":
                check_int("pissa", name, value, low, None, site.name)
        self.scale = scaling(rank, check_finite("pissa", "alpha", alpha), rslora)
        if self.scale <= 0:
            raise ValueError(f"pissa: alpha={alpha} at {site.name!r}; it must be positive: the start is divided by its root.")
        if bits is not None:
            if self.scale != 1 or fold:
                raise ValueError(f"pissa: bits={bits} at {site.name!r} takes no fold and needs alpha = rank: s is {self.scale}, not 1.")
            check_blocks("pissa", site.name, site.base, bits, BLOCK)
        self.svd, self.fold, self.bits, self.iterations = (niter, seed), fold, bits, iterations
        self.A, self.B = site.zeros(rank, site.in_features), site.zeros(site.out_features, rank)
        for name, p in (("A0", self.A), ("B0", self.B)):
            self.register_buffer(name, None if fold or bits is not None else p.detach().clone())

    def start(self, site: Site, weight: Callable[[], Tensor], blank: bool) -> nn.Module | None:
        base, rank, stored = site.base, self.A.shape[0], None
        if blank:
            return dense_room(base) if self.fold else room(base, self.bits, BLOCK) if self.bits else None
        W = weight()
        if self.bits:
            A, B, stored = quantised(W, rank, self.iterations, normal_float(self.bits, BLOCK, base.dtype), *self.svd)
        else:
            A, B = (factor / math.sqrt(self.scale) for factor in principal(W, rank, *self.svd))
        self.A.copy_(A), self.B.copy_(B)
        if self.A0 is not None:
            self.A0.copy_(A), self.B0.copy_(B)
        return residual(W, self.A, self.B, self.scale, base.dtype, site.name) if self.fold else stored

    def terms(self, base: Any) -> list[Term]:
        if self.A0 is None:
            return [LowRank(self.A, self.B, self.scale)]
        return [LowRank(torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], 1), self.scale)]

    def saved(self) -> dict[str, Tensor]:
        if self.A0 is None:
            return super().saved()
        return {"A": torch.cat([self.A, self.A0]), "B": torch.cat([self.B, -self.B0], 1)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.A0 is None:
            return super().load(tensors)
        rank = self.A.shape[0]
        (A, A0), (B, B0) = tensors["A"].split(rank), tensors["B"].split(rank, 1)
        self.A.copy_(A), self.A0.copy_(A0), self.B.copy_(B), self.B0.copy_(-B0)
        self.restored()
