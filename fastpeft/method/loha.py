"""LoHa: W + s (w1_a w1_b) o (w2_a w2_b), o elementwise, s = alpha / rank.   w?_a [out, rank] and w?_b [rank, in] train.

One low-rank term of rank rank^2, by Khatri-Rao products: B [out, rank^2] holds each column of w1_a times each of w2_a,
A [rank^2, in] each row of w1_b times each of w2_b. Kept for backward: x alone.

flavor="peft": all start Kaiming uniform (a = sqrt(5)) but w2_b, which is zero. flavor="lycoris": w1_a normal(0, 0.1), w1_b
and w2_b normal(0, 1), w2_a zero; alpha=None is alpha = rank (LyCORIS: None or 0); rslora=True: s = alpha / sqrt(rank). In
training rank_dropout drops rows of the update, not ranks; PEFT divides the others by the share of rows kept, LyCORIS only
with rank_dropout_scale. module_dropout drops the update of a whole forward. If no row is kept the update is zero here and NaN in PEFT.
Defaults are PEFT's in both flavours (LyCORIS: rank 4, alpha 1). With rslora or alpha=None the folder is fastpeft's own.

Papers: arXiv 2108.06098 (FedPara, proposition 1), 2309.14859 (LyCORIS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.method.lora import scaling
from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.terms import KhatriRao, LowRank, Term

READS = {"r": "rank", "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout"}


def peft_loha(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """PEFT LoHaConfig fields of LoHa's options; None for a scale that PEFT's LoHa does not have."""
    plain = not options["rslora"] and options["alpha"] is not None
    return {field: options[name] for field, name in READS.items()} | {"init_weights": True} if plain else None


@method("loha", paper="arXiv 2108.06098")
class LoHa(Method):
    ROLES: ClassVar = {"w1_a": "up", "w1_b": "down", "w2_a": "up", "w2_b": "down"}
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s x ((w1_a w1_b) o (w2_a w2_b))^T, o elementwise",
        defaults="PEFT's LoHaConfig",
        oracle="stock PEFT LoHa; LyCORIS 4.1 weights, gradients and files",
        deviations=(
            "If rank_dropout keeps no row the update is zero; PEFT gives NaN.",
        ),
    )
    PEFT = PeftFormat("LOHA", {name: f"hada_{name}" for name in ROLES}, peft_loha, "LoHaConfig", READS, "init_weights",
                      lacks=frozenset({"bias", "fan_in_fan_out"}))  # fmt: skip

    def __init__(self, site: Site, *, rank: int = 8, alpha: float | None = 8, flavor: str = "peft", rslora: bool = False,
                 rank_dropout: float = 0.0, rank_dropout_scale: bool = False, module_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        check_rank("loha", rank, site)
        if flavor not in ("peft", "lycoris"):
            raise ValueError(f"loha: flavor={flavor!r}; it must be 'peft' or 'lycoris'.")
        if flavor == "peft" and (rslora or alpha is None):
            raise ValueError(f"loha: rslora={rslora}, alpha={alpha} with flavor='peft'; only flavor='lycoris' has that scale.")
        if flavor == "peft" and rank_dropout_scale:
            raise ValueError("loha: rank_dropout_scale=True with flavor='peft', which always rescales; leave it out.")
        if flavor == "lycoris" and alpha == 0:
            raise ValueError("loha: alpha=0 with flavor='lycoris', where LyCORIS takes the rank; say alpha=None for that.")
        self.scale = scaling(rank, rank if alpha is None else check_finite("loha", "alpha", alpha), rslora)
        self.drop = [check_probability("loha", f"{k}_dropout", p) for k, p in (("module", module_dropout), ("rank", rank_dropout))]
        self.rescales, up, down = flavor == "peft" or rank_dropout_scale, (site.out_features, rank), (rank, site.in_features)
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (site.empty(*shape) for shape in (up, down, up, down))
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=math.sqrt(5)) if flavor == "peft" else nn.init.normal_(p)
        if flavor == "lycoris":
            nn.init.normal_(self.w1_a, std=0.1)
        nn.init.zeros_(self.w2_b if flavor == "peft" else self.w2_a)

    def terms(self, base: Any) -> list[Term]:
        up = self.w1_a
        if self.training and any(self.drop):
            # in PEFT's order, so that one seed drops the same rows there
            on, kept = (torch.rand(n, 1, device=up.device).ge(p).to(up.dtype) for n, p in zip((1, len(up)), self.drop, strict=True))
            up = up * on * (kept / kept.mean().clamp_min(1 / len(up)) if self.rescales else kept)
        return [LowRank(KhatriRao(self.w1_b, self.w2_b), KhatriRao(up, self.w2_a), self.scale)]
