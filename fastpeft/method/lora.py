"""LoRA: W + s B A, s = alpha / rank.   A [rank, in], B [out, rank] train; B starts at zero, W is frozen.

start="kaiming": A is uniform on +-1/sqrt(in) (Kaiming with a = sqrt(5)), as in the authors' code and in PEFT (the paper
says Gaussian). PEFT's others: "gaussian", A normal(0, 1/rank); "orthogonal", A and B both random, of even rank, with B A = 0.
rslora=True: s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). lora_bias=True: B has a bias [out], whose share of y is
s * bias (PEFT). Dropout acts on what A reads, in training only.

Paper: arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.start.factors import fill
from fastpeft.terms import Bias, LowRank, Term

READS = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "lora_bias": "lora_bias",
}  # fmt: skip


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732, theorem 3.2)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def peft_lora(options: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT LoraConfig fields of LoRA's options."""
    return {
        "r": options["rank"],
        "lora_alpha": options["alpha"],
        "lora_dropout": options["dropout"],
        "use_rslora": options["rslora"],
        "lora_bias": options.get("lora_bias", False),
        "use_dora": False,
        "init_lora_weights": True,
    }


@method("lora", paper="arXiv 2106.09685")
class LoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "bias": "bias"}
    BEGIN: ClassVar = frozenset({"start"})
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s (drop(x) A^T) B^T, s = alpha / rank",
        defaults="PEFT's LoraConfig",
        oracle="stock PEFT LoRA, outputs, gradients and folders; the paper's formula in fp64",
        deviations=(
            "A starts uniform on +-1/sqrt(in), as in the authors' code and PEFT; the paper says Gaussian "
            '(start="gaussian").',
        ),
    )
    PEFT = PeftFormat(
        "LORA", {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}, peft_lora, reads=READS
    )

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        start: str = "kaiming",
    ):
        super().__init__()
        check_rank("lora", rank, site)
        self.dropout = check_probability("lora", "dropout", dropout)
        self.scale = scaling(rank, check_finite("lora", "alpha", alpha), rslora)
        self.A = site.empty(rank, site.in_features)
        self.B = site.zeros(site.out_features, rank)
        self.bias = site.zeros(site.out_features) if lora_bias else None
        fill("lora", start, self.A, self.B)

    def terms(self, base: Any) -> list[Term]:
        low = LowRank(self.A, self.B, self.scale, dropout=self.dropout if self.training else 0.0)
        return [low] if self.bias is None else [low, Bias(self.bias * self.scale)]
