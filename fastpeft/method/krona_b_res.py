"""KronA_B_res: FFN(x) + s x (A o B) + s_res x, KronA_B with a trained factor s_res [1] on the FFN's input itself.

s_res starts at res_init. The published 1 adds x to the output from the first step on, so the adapted model is not the base
model at the start; res_init=0.0 makes it so. All else is krona_b's.

Paper: arXiv 2212.10650.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from fastpeft.method.krona_b import KronAB
from fastpeft.option_checks import check_finite
from fastpeft.registry import Notes, Site, method


@method("krona_b_res", paper="arXiv 2212.10650")
class KronABRes(KronAB):
    ROLES: ClassVar = {**KronAB.ROLES, "s_res": "gate"}
    NOTES: ClassVar = Notes(
        formula="y = FFN(x) + s (x (A (x) B) + bias) + s_res x",
        defaults="res_init 1 of the paper; the rest krona_b's",
        oracle="the paper's formula with torch.kron",
        deviations=(
            "With the published res_init=1 the start is not the base model; res_init=0.0 makes it so.",
        ),
    )

    def __init__(
        self,
        site: Site,
        *,
        shape: Sequence[int] | None = None,
        scale: float = 1.0,
        res_init: float = 1.0,
        krona_bias: bool = False,
    ):
        super().__init__(site, shape=shape, scale=scale, krona_bias=krona_bias)
        self.s_res = site.zeros(1)
        torch.nn.init.constant_(self.s_res, check_finite("krona_b_res", "res_init", res_init))

    def residual(self) -> torch.Tensor | None:
        return self.s_res
