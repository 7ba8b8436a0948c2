"""KronA_B: FFN(x) + s x (A o B), o the Kronecker product, beside a whole feed-forward block.   A [a1, a2], B [b1, b2] train.

a1 b1 = a2 b2 = hidden, in the paper's row-vector form: x is what the FFN reads, the sum is what it gives (before a dropout,
residual or norm that follows). shape=(a1, a2) chooses the split; None takes the most even one, the larger factor first: 768 is
(32, 24) and (24, 32), 1536 parameters. A starts Kaiming uniform (a = sqrt 5), B at zero. krona_bias=True: a bias [hidden]
that starts at zero joins the product inside the scale. There is no weight to merge into, and PEFT has no such method.

Paper: arXiv 2212.10650.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from fastpeft.method.krona import split
from fastpeft.option_checks import check_finite
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import Bias, Kron, Term


@method("krona_b", paper="arXiv 2212.10650")
class KronAB(Method):
    ROLES: ClassVar = {"A": "left", "B": "right", "bias": "bias"}
    NOTES: ClassVar = Notes(
        formula="y = FFN(x) + s (x (A (x) B) + bias)",
        defaults="scale 1, the most even split: ours",
        oracle="the paper's formula with torch.kron",
        deviations=(
            "The paper leaves start, scale and shapes open: A Kaiming uniform, B zero.",
            "bias enters inside the scale, and only with krona_bias=True.",
        ),
    )
    SITE = "ffn"

    def __init__(
        self, site: Site, *, shape: Sequence[int] | None = None, scale: float = 1.0, krona_bias: bool = False
    ):
        super().__init__()
        a, b = split("krona_b", site, shape)
        self.scale = check_finite("krona_b", "scale", scale)
        self.A, self.B = site.empty(*a), site.zeros(*b)
        self.bias = site.zeros(site.in_features) if krona_bias else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def terms(self, base: Any) -> list[Term]:
        kron = Kron(self.A.t(), self.B.t(), self.scale)
        return [kron] if self.bias is None else [kron, Bias(self.bias * self.scale)]

