"""Random Masking: W + M o V, M a random 0/1 mask that is drawn once; the entries of V under the mask train, from zero.

structure="random": each entry of W is in the mask with probability `density`, independently (so the number of entries is
random too). structure="head" or "tail": the authors' ablation, int(in * out * density) entries in the first or last input columns,
the first rows of the one column that is not whole. The mask comes from a counter-based generator keyed by `seed` and the
layer's name and shape: it is the same on every device and rank, and a checkpoint holds the seed and the values alone.

The sparser the mask, the larger the learning rate should be: `learning_rate(density)`.

Paper: arXiv 2405.02596.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fastpeft.registry import Method, Site, check_int, check_probability, method
from fastpeft.support import bernoulli, columns, key
from fastpeft.terms import APPLY, Sparse, Term

STRUCTURES = ("random", "head", "tail")


def learning_rate(density: float) -> float:
    """1e-4 / sqrt(density), from 1e-5 to 1e-1: what to start a search from. At density 1e-4 it is the paper's 1e-2."""
    return min(max(1e-4 / density**0.5, 1e-5), 1e-1)


@method("random_masking", paper="arXiv 2405.02596")
class RandomMasking(Method):
    ROLES: ClassVar = {"values": "sparse"}

    def __init__(
        self, site: Site, *, density: float = 1e-3, seed: int = 0, structure: str = "random", apply: str = "copy",
    ):  # fmt: skip
        super().__init__()
        if structure not in STRUCTURES:
            raise ValueError(f"random_masking: structure={structure!r}; it must be one of {', '.join(STRUCTURES)}.")
        if apply not in APPLY:
            raise ValueError(f"random_masking: apply={apply!r}; it must be one of {', '.join(APPLY)}.")
        check_int("random_masking", "seed", seed, -(2**63), 2**63 - 1, site.name, "64 bits")
        if density != 1:
            check_probability("random_masking", "density", density)
        self.apply_as, self.structure, self.density = apply, structure, float(density)
        self.key, self.shape = key(seed, site.name), (site.out_features, site.in_features)
        index = self.draw()
        self.checksum = int(index.long().sum())
        self.values = site.zeros(index.shape[1])
        self.register_buffer("index", index.to(site.device), persistent=False)

    def draw(self) -> torch.Tensor:
        if self.structure == "random":
            return bernoulli(self.key, *self.shape, self.density)
        return columns(*self.shape, self.density, tail=self.structure == "tail")

    def refill(self) -> None:
        if not self.index.is_meta and int(self.index.long().sum()) != self.checksum:
            self.index.copy_(self.draw())

    def terms(self, base: Any) -> list[Term]:
        return [Sparse(self.values, self.index, self.apply_as)]
