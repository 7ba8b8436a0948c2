"""DoRA: diag(m / c) (W + s B A), c the norm of each row of W + s B A.   A, B as in LoRA, also their start; m [out] trains, starts at ||W||.

grad="simple" (the authors' default) holds c constant in backward; grad="full" differentiates through it. c is computed anew
in every forward. With dropout, dropout_base=True is the law of the authors' code and of PEFT: the magnitude's part of the
base product reads the dropped x too, which costs a second base product in training. dropout_base=False keeps one product
and drops only what A reads: the same mean, not the same noise; this variant is fastpeft's own. A row of W of norm zero
has c = 0 until B moves; its m / c is defined as 1 there, so the row stays finite.

Paper: arXiv 2402.09353, equation 5 and section 4.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fastpeft.method.lora import peft_lora, scaling
from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.start.factors import fill
from fastpeft.terms import Gain, LowRank, Term


def peft_dora(options: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT LoraConfig fields of DoRA's options."""
    return peft_lora(options) | {"use_dora": True}


@method("dora", paper="arXiv 2402.09353")
class DoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "m": "gain"}
    BEGIN: ClassVar = frozenset({"start"})
    NOTES: ClassVar = Notes(
        formula="y = m / ||W + s B A|| * (x W^T + s x A^T B^T), the norm per row of the weight",
        defaults="LoRA's; grad and dropout as in the authors' code and PEFT",
        oracle='stock PEFT DoRA (grad="simple"), autograd of the dense weight in fp64 ("full")',
        deviations=(
            "A row of W of norm zero has the factor 1 until B moves; PEFT gives NaN.",
            "dropout_base=False is our own: one base product, the same mean, another noise.",
            "no PiSSA start: PEFT puts DoRA's norm over the residual and the factors together; use pissa or dora.",
        ),
    )
    PEFT = PeftFormat(
        "LORA", {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}, peft_dora
    )

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        rslora: bool = False,
        grad: str = "simple",
        dropout_base: bool = True,
        start: str = "kaiming",
    ):
        super().__init__()
        check_rank("dora", rank, site)
        if grad not in ("simple", "full"):
            raise ValueError(f"dora: grad={grad!r}; it must be 'simple' or 'full'.")
        self.dropout = check_probability("dora", "dropout", dropout)
        self.scale = scaling(rank, check_finite("dora", "alpha", alpha), rslora)
        self.grad, self.dropout_base = grad, dropout_base
        self.A = site.empty(rank, site.in_features)
        self.B = site.zeros(site.out_features, rank)
        norm = site.base.row_sq_norm().sqrt()
        self.m = nn.Parameter(norm.to(site.dtype))
        fill("dora", start, self.A, self.B)
        if not norm.is_meta and (empty := int((norm == 0).sum())):
            warnings.warn(
                f"dora: {empty} of {site.out_features} rows of {site.name!r} have norm zero; their gain is 1 until B moves.",
                stacklevel=2,
            )

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        low = LowRank(self.A, self.B, self.scale, dropout=p)
        p = p if self.dropout_base else 0.0
        if self.grad == "simple":
            return [low, Gain(self.m, p, over=low)]
        return [low, Gain(base.row_gain(self.m, self.A, self.B, self.scale), p)]
