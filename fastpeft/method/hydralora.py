"""HydraLoRA: y += s sum_i p_i B_i A drop(x), p = softmax(G x): one A, `heads` N up factors, a router per token.

A [rank, in], B [out, N * rank] (the heads side by side), G [N, in]; s = alpha / rank. The router reads x before dropout; its
softmax is in fp32 at least, then cast. One dropout mask and one product with A serve all heads; the authors' loop draws a mask
per head, which has the same mean and other noise. A and G start Kaiming uniform (a = sqrt(5)), B at zero; G is never zero:
equal p would keep the heads identical for ever. There is no balance loss (the authors' is the constant 0).

With heads=1 there is no router: that is LoRA, which merges and exports. With more, no single weight exists.
Kept for backward beside x: rank + N + N * rank numbers per token. Defaults: the authors' script. Their keys are
`lora_A.weight`, `lora_B0.weight` to `lora_B{N-1}.weight`, `lora_route.weight`; B here is theirs concatenated along the rank.

Paper: arXiv 2404.19245.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


def route(u: Tensor, p: Tensor, x: Tensor) -> Tensor:
    """u [..., rank], logits p [..., N] -> [..., N * rank]: head after head, u weighted by the softmax of p."""
    gate = torch.softmax(p, -1, dtype=torch.promote_types(p.dtype, torch.float32)).to(u.dtype)
    return (gate[..., :, None] * u[..., None, :]).flatten(-2)


@method("hydralora", paper="arXiv 2404.19245")
class HydraLoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "G": "gate"}
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s sum_i softmax(x G^T)_i (drop(x) A^T) B_i^T",
        defaults="the authors' script",
        oracle="the formula head by head in fp64; with one head LoRA",
        deviations=(
            "One dropout mask serves all heads; the authors' loop draws one per head.",
            "There is no balance loss; the authors' is a constant.",
        ),
    )

    def __init__(self, site: Site, *, rank: int = 4, alpha: float = 32, dropout: float = 0.0, heads: int = 4):
        super().__init__()
        check_rank("hydralora", rank, site)
        check_int("hydralora", "heads", heads, 1, None, site.name)
        self.dropout = check_probability("hydralora", "dropout", dropout)
        self.scale = check_finite("hydralora", "alpha", alpha) / rank
        self.A = site.empty(rank, site.in_features)
        self.B = site.zeros(site.out_features, heads * rank)
        self.G = site.empty(heads, site.in_features) if heads > 1 else None
        for factor in (self.A, self.G):
            if factor is not None:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        mid = None if self.G is None else route
        return [LowRank(self.A, self.B, self.scale, mid=mid, rows=self.G, dropout=p)]
