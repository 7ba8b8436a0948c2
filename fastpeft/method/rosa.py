"""RoSA: W + s B A + S, s = alpha / rank: a low-rank and a sparse update.   A [rank, in], B [out, rank] and values [nnz] train.

S holds `values` at nnz = int(density * out * in) entries of W and has no scale and no dropout. Which entries, `index` (int32
[2, nnz], row-major), is chosen by the gradient of W in the first steps: fastpeft.train.RoSASchedule does that, or
fastpeft.train.load_masks reads the choice of an earlier run. Until then index is -1 and the sparse part is out of the sum;
training without the schedule raises, evaluation is LoRA's. A folder holds index and values; reading them switches the sparse
part on. rank=0 is a sparse update alone, density=0 is LoRA. apply says how S reaches the product (fastpeft.terms.Sparse);
overlay=True keeps it in W instead (fastpeft.overlay).

Paper: arXiv 2401.04679.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.method.lora import scaling
from fastpeft.option_checks import check_finite, check_int, check_probability
from fastpeft.overlay import Overlay
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.term_checks import validate
from fastpeft.terms import APPLY, Dense, LowRank, Sparse, Term, collector


@method("rosa", paper="arXiv 2401.04679")
class RoSA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "values": "sparse"}
    NOTES: ClassVar = Notes(
        formula="y = x (W + S)^T + s (drop(x) A^T) B^T, S sparse on a fixed support",
        defaults="density and score of the authors' configurations",
        oracle="the dense formula in fp64; masks against a dense recomputation",
        deviations=(
            "The default is the recipe of the reported runs (collect, save the masks, start again); a "
            "single run is a schedule too.",
        ),
    )
    PROCEDURE = "RoSASchedule"

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 8, dropout: float = 0.0, density: float = 0.003,
                 rslora: bool = False, apply: str = "copy", overlay: bool = False):  # fmt: skip
        super().__init__()
        self.shape = out, size_in = site.out_features, site.in_features
        check_int("rosa", "rank", rank, 0, min(self.shape), site.name, "the smaller side of the layer")
        if not 0.0 <= check_finite("rosa", "density", density) <= 1.0:
            raise ValueError(f"rosa: density={density} at {site.name!r}; it must be 0 to 1, the share of entries that train.")
        nnz = int(density * (out * size_in))
        if rank == 0 and nnz == 0:
            raise ValueError(
                f"rosa: rank=0 and density={density} at {site.name!r} ({size_in} -> {out}) leave nothing to train; raise one."
            )
        if apply not in APPLY:
            raise ValueError(f"rosa: apply={apply!r}; it must be one of {', '.join(APPLY)}.")
        self.dropout, self.site = check_probability("rosa", "dropout", dropout), site.name
        self.apply_as, self.overlay = "overlay" if overlay else apply, Overlay() if overlay else None
        self.scale = scaling(max(rank, 1), check_finite("rosa", "alpha", alpha), rslora)
        self.A = site.empty(rank, size_in) if rank else None
        self.B = site.zeros(out, rank) if rank else None
        if rank:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.values = site.zeros(nnz) if nnz else None
        index = torch.full((2, nnz), -1, dtype=torch.int32, device=site.device) if nnz else None
        self.register_buffer("index", index)
        self.masked, self.leaf = False, None

    def terms(self, base: Any) -> list[Term]:
        if self.training and not (self.masked or self.attached or self.values is None):
            raise RuntimeError(
                f"rosa: {self.site!r} has no mask, so its sparse part cannot train; attach fastpeft.train.RoSASchedule, read "
                "masks with fastpeft.train.load_masks, or adapt with density=0."
            )
        found = [t for t in self.every_term(base) if self.masked or isinstance(t, LowRank)]
        return found if self.leaf is None or not self.training else [*found, Dense(self.leaf)]

    def every_term(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        low: list[Term] = [] if self.A is None else [LowRank(self.A, self.B, self.scale, dropout=p)]
        return low if self.values is None else [*low, Sparse(self.values, self.index, self.apply_as, self.overlay)]

    def collect(self, take: Callable[[Tensor], None] | None) -> None:
        """From the next training forward on, backward gives W's gradient [out, in] to `take`, which may keep it; None ends that."""
        self.leaf = None if take is None or self.values is None else collector(self.values, self.shape, take)

    def set_mask(self, index: Tensor) -> None:
        """Use these entries: int32 [2, nnz], row-major. In place; the sparse part is on from the next forward."""
        self.index.copy_(index)
        self.restored()

    def restored(self) -> None:
        self.masked = self.values is not None and not self.index.is_meta and bool(self.index[0, 0] >= 0)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        if self.values is not None and bool((state["index"] != -1).any()):
            validate([Sparse(self.values, state["index"])], *self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"leaf": None}
