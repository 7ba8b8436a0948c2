"""BiLoRA: W + s B diag(v) A, s = alpha / rank, v = v(E).   A [rank, in], B [out, rank] and E [rank] train.

values="softmax": v = softmax(E) over the ranks of the layer; "real": v = E; "sigmoid": v = sigmoid(E), near 0 or 1 under
`binary_entropy`. A and B are the lower level of a bi-level problem and E the upper one, on other data: that is
fastpeft.train.BiLoRABilevel's matter, and without it all three train alike. A starts normal(0, 0.02), B at zero, E at zero
(v = 1/rank or 1/2), for "real" at 1/rank, since zero beside a zero B would have no gradient anywhere. v is folded into A; export
holds v and not E.

Paper: arXiv 2403.13037.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.method.adalora import gram_gap
from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term

VALUES = ("softmax", "real", "sigmoid")


def binary_entropy(v: Tensor) -> Tensor:
    """R2 = -sum of v ln v + (1 - v) ln(1 - v), smallest where every value is 0 or 1; v is held inside [1e-6, 1 - 1e-6]."""
    v = v.clamp(1e-6, 1 - 1e-6)
    return -(v * v.log() + (1 - v) * (1 - v).log()).sum()


@method("bilora", paper="arXiv 2403.13037")
class BiLoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "E": "gate"}
    PROCEDURE: ClassVar = "BiLoRABilevel"
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * B diag(v(E)) A, v = softmax, identity or sigmoid",
        defaults="values='softmax' is the paper's; rank 8 and alpha 16 are ours, its own could not be confirmed",
        oracle="stock PEFT AdaLoRA with lora_E = v(E): output and gradients; the dense formula in fp64; Betty 0.2.1, gradients and steps of both levels",
        deviations=(
            "A starts normal(0, 0.02) as AdaLoRA's and B at zero, so that every parametrisation starts at W; not confirmed.",
            "values='real' starts at 1/rank; not confirmed (zero would leave nothing with a gradient).",
            "orthogonality() squares the norms (R1); the paper's norm and averaging are not confirmed.",
            "one lower and one upper step in turn, gamma1 0.1, and the upper AdamW's settings are BiDoRA's or ours; not confirmed.",
            "the upper passes run without dropout.",
            "the upper step puts A and B back, as Betty 0.2.1 does; 0.1.1 leaves them 0.01 further down the upper loss each time. Which the paper ran is not confirmed.",
            "binary_entropy (R2) is our choice for the approximately binary values; the paper's term is not confirmed.",
        ),
    )

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0, values: str = "softmax"
    ):
        super().__init__()
        check_rank("bilora", rank, site)
        if values not in VALUES:
            raise ValueError(f"bilora: values={values!r}; it must be one of {', '.join(VALUES)}.")
        self.dropout = check_probability("bilora", "dropout", dropout)
        self.scale, self.kind = check_finite("bilora", "alpha", alpha) / rank, values
        self.A, self.B, self.E = site.empty(rank, site.in_features), site.zeros(site.out_features, rank), site.zeros(rank)
        nn.init.normal_(self.A, std=0.02)
        if values == "real":
            nn.init.constant_(self.E, 1 / rank)

    def spectrum(self) -> Tensor:
        """v [rank]."""
        return self.E if self.kind == "real" else self.E.softmax(0) if self.kind == "softmax" else self.E.sigmoid()

    def orthogonality(self) -> Tensor:
        """R1 of this layer: ||A A^T - I||_F^2 + ||B^T B - I||_F^2."""
        return gram_gap(self.A).square().sum() + gram_gap(self.B.T).square().sum()

    def terms(self, base: Any) -> list[Term]:
        A = self.spectrum()[:, None] * self.A
        return [LowRank(A, self.B, self.scale, dropout=self.dropout if self.training else 0.0)]
