"""LoKr: W + s w1 (x) w2, the Kronecker product, s = alpha / rank.   w1 [a, c], w2 [b, d], a * b = out, c * d = in.

out and in are split by `factor` (-1: nearest the square). w2 is w2_a [b, rank] w2_b [rank, d] while rank < max(b, d) / 2, and
with decompose_both w1 is w1_a w1_b while rank < max(a, c) / 2; else they are full. Kept for backward: x alone.

flavor="peft": w1 (or w1_a) starts at zero, all else Kaiming uniform (a = sqrt(5)). flavor="lycoris": w2 (or w2_b) starts at
zero; a split is ascending; s = 1 where both halves are full; and it has full_matrix (both halves full whatever the rank),
unbalanced (the split of `out` swapped), rslora (alpha / sqrt(rank)) and alpha=None (alpha = rank). Defaults are PEFT's in
both. In training rank_dropout drops rows of the update, which is then formed as a whole; rank_dropout_scale divides the
others by the share kept. module_dropout drops the update of a whole forward.

Paper: arXiv 2309.14859 (LyCORIS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.method.lora import scaling
from fastpeft.option_checks import check_finite, check_int, check_probability
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.terms import Dense, Kron, Term, kron

READS = {"r": "rank", "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout", "decompose_both":
         "decompose_both", "decompose_factor": "factor", "rank_dropout_scale": "rank_dropout_scale"}  # fmt: skip


def peft_lokr(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """PEFT LoKrConfig fields of LoKr's options; None for the other flavour: its splits and scales differ."""
    fields = {field: options[name] for field, name in READS.items()} | {"init_weights": True}
    return fields if options["flavor"] == "peft" else None


def factorization(n: int, factor: int, flavor: str) -> tuple[int, int]:
    """n as a product of two: (factor, n / factor) if it divides n, ascending in LyCORIS; else of the largest divisor that
    is at most sqrt(n) and, unless factor is -1, at most factor, and the other one."""
    if factor > 0 and n % factor == 0:
        pair = (factor, n // factor)
        return (min(pair), max(pair)) if flavor == "lycoris" else pair
    low = max(m for m in range(1, math.isqrt(n) + 1) if n % m == 0 and (factor < 0 or m <= factor))
    return low, n // low


@method("lokr", paper="arXiv 2309.14859")
class LoKr(Method):
    ROLES: ClassVar = {"w1": "left", "w1_a": "left", "w1_b": "left", "w2": "right", "w2_a": "right", "w2_b": "right"}
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s x (w1 (x) w2)^T, (x) the Kronecker product",
        defaults="PEFT's LoKrConfig",
        oracle="stock PEFT LoKr; LyCORIS 4.1 weights, gradients, files and splits",
        deviations=(
            'With rslora and both halves full the scale of flavor="lycoris" is 1, as its reader has it; '
            "its module scales.",
        ),
    )
    PEFT = PeftFormat("LOKR", {name: f"lokr_{name}" for name in ROLES}, peft_lokr, "LoKrConfig", READS, "init_weights",
                      lacks=frozenset({"bias", "fan_in_fan_out"}))  # fmt: skip

    def __init__(self, site: Site, *, rank: int = 8, alpha: float | None = 8, factor: int = -1, decompose_both: bool = False,
                 flavor: str = "peft", full_matrix: bool = False, unbalanced: bool = False, rslora: bool = False,
                 rank_dropout: float = 0.0, rank_dropout_scale: bool = False, module_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        check_int("lokr", "rank", rank, 1, None, site.name)
        if factor != -1:
            check_int("lokr", "factor", factor, 1, None, site.name)
        if flavor not in ("peft", "lycoris"):
            raise ValueError(f"lokr: flavor={flavor!r}; it must be 'peft' or 'lycoris'.")
        if flavor == "peft" and (full_matrix or unbalanced or rslora or alpha is None):
            raise ValueError(f"lokr: {full_matrix=}, {unbalanced=}, {rslora=}, {alpha=}; flavor='lycoris' only has such a LoKr.")
        self.drop = [check_probability("lokr", f"{k}_dropout", p) for k, p in (("module", module_dropout), ("rank", rank_dropout))]
        self.rescale, (c, d) = rank_dropout_scale, factorization(site.in_features, factor, flavor)
        a, b = factorization(site.out_features, factor, flavor)[:: -1 if unbalanced else 1]
        full = (full_matrix or not (decompose_both and rank < max(a, c) / 2), full_matrix or rank >= max(b, d) / 2)
        self.scale = scaling(rank, rank if alpha is None else check_finite("lokr", "alpha", alpha), rslora)
        if flavor == "lycoris" and all(full):
            self.scale = 1.0
        for name, rows, cols, whole in (("w1", a, c, full[0]), ("w2", b, d, full[1])):
            setattr(self, name, site.empty(rows, cols) if whole else None)
            setattr(self, f"{name}_a", None if whole else site.empty(rows, rank))
            setattr(self, f"{name}_b", None if whole else site.empty(rank, cols))
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        zero = (self.w1, self.w1_a) if flavor == "peft" else (self.w2, self.w2_b)
        nn.init.zeros_(next(p for p in zero if p is not None))

    def terms(self, base: Any) -> list[Term]:
        w1 = self.w1_a @ self.w1_b if self.w1 is None else self.w1
        w2 = self.w2_a @ self.w2_b if self.w2 is None else self.w2
        p_module, p_rank = self.drop if self.training else (0.0, 0.0)
        if p_module:  # in PEFT's order, so that one seed drops the same
            w1 = w1 * torch.rand(1, device=w1.device).gt(p_module)
        if not p_rank:
            return [Kron(w1, w2, self.scale)]
        kept = torch.rand(base.out_features, 1, device=w1.device).gt(p_rank).to(w1.dtype)
        kept = kept / kept.mean().clamp_min(1 / len(kept)) if self.rescale else kept
        return [Dense(kron(w1, w2) * (self.scale * kept))]
