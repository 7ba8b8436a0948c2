"""LoDA+: y += s (h B^T + phi(f(phi(h)) B^T)), h = drop(x) A^T: LoDA with a leaky ReLU also before the map and after B.

Parameters, starts and options are loda's, base="r" and base="s" included. The linear branch stays beside the other: M2 = 0 is LoRA.
Two terms of one A, which read x once; what stands after B is computed again in backward, so nothing of y's width is kept: beside
x, 6 * rank numbers per token.

Paper: NeurIPS 2023 ENLSP workshop, MERL TR2023-150.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastpeft.method.loda import UNVERIFIED, LoDA
from fastpeft.registry import Notes, method
from fastpeft.terms import LowRank, Term


@method("loda_plus", paper="MERL TR2023-150")
class LoDAPlus(LoDA):
    WHO: ClassVar = "loda_plus"
    NOTES: ClassVar = Notes(
        formula="x W^T + s (h B^T + phi(f(phi(h)) B^T)), f(h) = phi(phi(h M1^T) M2^T), h = x A^T",
        defaults="loda's",
        oracle="the formula in fp64; stock PEFT LoRA with M2 = 0",
        deviations=UNVERIFIED,
    )

    def middle(self, h: Tensor, p: Any, x: Tensor) -> Tensor:
        return self.f(self.phi(h))

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        linear = LowRank(self.A, self.B, self.scale, dropout=p)
        return [linear, LowRank(self.A, self.B, self.scale, mid=self.middle, post=self.phi, dropout=p)]
