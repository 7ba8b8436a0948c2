"""Random Masking: W + M o V, M a random 0/1 mask that is drawn once; the entries of V under the mask train, from zero.

structure="random": each entry of W is in the mask with probability `density`, independently (so the number of entries is
random too). structure="head" or "tail": the authors' ablation, int(in * out * density) entries in the first or last input columns,
the first rows of the one column that is not whole. rank=r: exactly r * (in + out) entries, as many numbers as a LoRA of that
rank trains, whatever `density` says; that is the mask of SHiRA, and saved as PEFT saves it.

The mask comes from a counter-based generator keyed by `seed` and the
layer's name: it is the same on every device and rank, and a checkpoint holds the seed and the values alone (with rank=, the entries too).

apply says how the entries reach the product (fastpeft.terms.Sparse); overlay=True keeps them in W (fastpeft.overlay).

The sparser the mask, the larger the learning rate should be: `learning_rate(density)`.

Paper: arXiv 2405.02596.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fastpeft.option_checks import check_int, check_probability, check_rank
from fastpeft.overlay import Overlay
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.support import bernoulli, columns, counted, key
from fastpeft.term_checks import validate
from fastpeft.terms import APPLY, Sparse, Term

STRUCTURES = ("random", "head", "tail")


def peft_shira(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """PEFT ShiraConfig fields; None for a mask that is not counted. PEFT draws another mask of that size, then reads ours."""
    if options["rank"] is None:
        return None
    return {"r": options["rank"], "random_seed": options["seed"], "mask_type": "random", "init_weights": True}


def learning_rate(density: float) -> float:
    """1e-4 / sqrt(density), from 1e-5 to 1e-1: what to start a search from. At density 1e-4 it is the paper's 1e-2."""
    return min(max(1e-4 / max(density, 1e-12) ** 0.5, 1e-5), 1e-1)


@method("random_masking", paper="arXiv 2405.02596")
class RandomMasking(Method):
    ROLES: ClassVar = {"values": "sparse"}
    NOTES: ClassVar = Notes(
        formula="y = x (W + M o V)^T, M drawn once",
        defaults="density 1e-3, inside the paper's range; learning rate 1e-4 / sqrt(density)",
        oracle="stock PEFT SHiRA under the same mask; the mask's law",
        deviations=(
            "The mask comes from a counter-based generator, so its entries are not those of the authors' "
            "torch seeds.",
        ),
    )
    PEFT = PeftFormat("SHIRA", {"values": "shira_weight", "index": "shira_indices"}, peft_shira, "ShiraConfig",
                      {"r": "rank", "random_seed": "seed"}, "init_weights",
                      lacks=frozenset({"bias", "rank_pattern", "alpha_pattern"}))  # fmt: skip

    def __init__(
        self, site: Site, *, density: float = 1e-3, seed: int | None = 0, structure: str = "random", apply: str = "copy",
        rank: int | None = None, overlay: bool = False,
    ):  # fmt: skip
        super().__init__()
        if rank is not None:
            check_rank("random_masking", rank, site)
            if structure != "random":
                raise ValueError(f"random_masking: rank={rank} with structure={structure!r}; a counted mask is random.")
        if structure not in STRUCTURES:
            raise ValueError(f"random_masking: structure={structure!r}; it must be one of {', '.join(STRUCTURES)}.")
        if apply not in APPLY:
            raise ValueError(f"random_masking: apply={apply!r}; it must be one of {', '.join(APPLY)}.")
        seed = 0 if seed is None else check_int("random_masking", "seed", seed, -(2**63), 2**63 - 1, site.name, "64 bits")
        if density != 1:
            check_probability("random_masking", "density", density)
        self.overlay = Overlay() if overlay else None
        self.apply_as, self.structure, self.density = "overlay" if overlay else apply, structure, float(density)
        self.key, self.shape = key(seed, site.name), (site.out_features, site.in_features)
        self.count = None if rank is None else min(rank * sum(self.shape), self.shape[0] * self.shape[1])
        index = self.draw()
        self.checksum = int(index.long().sum())
        self.values = site.zeros(index.shape[1])
        self.register_buffer("index", index.to(site.device), persistent=rank is not None)

    @classmethod
    def learning_rate(cls, options: Mapping[str, Any]) -> float | None:
        return learning_rate(options["density"])

    def draw(self) -> torch.Tensor:
        if self.count is not None:
            return counted(self.key, *self.shape, self.count)
        if self.structure == "random":
            return bernoulli(self.key, *self.shape, self.density)
        return columns(*self.shape, self.density, tail=self.structure == "tail")

    def refill(self) -> None:
        if not self.index.is_meta and int(self.index.long().sum()) != self.checksum:
            self.index.copy_(self.draw())

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if self.count is not None:
            validate([Sparse(self.values, state["index"])], *self.shape)

    def restored(self) -> None:
        self.checksum = int(self.index.long().sum())

    def terms(self, base: Any) -> list[Term]:
        return [Sparse(self.values, self.index, self.apply_as, self.overlay)]
