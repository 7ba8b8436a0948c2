"""KronA: y += s x (A (x) B), the Kronecker product in the row-vector form of the paper: A [a1, a2], B [b1, b2], a1 * b1 = in,
a2 * b2 = out; so the update of W is s A^T (x) B^T.   A starts Kaiming uniform (a = sqrt(5)), B at zero.

The shape of A is free: shape=(a1, a2), each a divisor. None splits either side as evenly as it can, the larger factor of `in`
and the smaller one of `out` for A: (32, 24) and (24, 32) at 768, 1536 parameters. The paper leaves start, scale and shapes
open; here the scale is 1. Kept for backward: x alone.

Paper: arXiv 2212.10650.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from fastpeft.option_checks import check_finite, check_int
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import Kron, Term


def split(who: str, site: Site, shape: Sequence[int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B. TypeError for what is no pair of ints, ValueError where it does not divide (in, out)."""
    sizes = (site.in_features, site.out_features)
    if shape is None:
        low_in, low_out = (max(m for m in range(1, math.isqrt(n) + 1) if n % m == 0) for n in sizes)
        return (sizes[0] // low_in, low_out), (low_in, sizes[1] // low_out)
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise TypeError(f"{who}: shape={shape!r} at {site.name!r}; it must be a pair (a1, a2), the shape of A, or None.")
    for name, m, n in zip(("a1", "a2"), shape, sizes, strict=True):
        if n % check_int(who, f"shape {name}", m, 1, n, site.name, "the side that it divides"):
            raise ValueError(f"{who}: shape={shape!r} at {site.name!r} ({sizes[0]} -> {sizes[1]}); {m} does not divide {n}.")
    return (shape[0], shape[1]), (sizes[0] // shape[0], sizes[1] // shape[1])


@method("krona", paper="arXiv 2212.10650")
class KronA(Method):
    ROLES: ClassVar = {"A": "left", "B": "right"}
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s x (A (x) B), row-vector form",
        defaults="scale 1, the most even split of either side: ours",
        oracle="torch.kron; stock PEFT LoKr with transposed factors",
        deviations=(
            "The paper leaves start, scale and shapes open: A Kaiming uniform, B zero.",
        ),
    )

    def __init__(self, site: Site, *, shape: Sequence[int] | None = None, scale: float = 1.0):
        super().__init__()
        a, b = split("krona", site, shape)
        self.scale = check_finite("krona", "scale", scale)
        self.A, self.B = site.empty(*a), site.zeros(*b)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def terms(self, base: Any) -> list[Term]:
        return [Kron(self.A.t(), self.B.t(), self.scale)]
