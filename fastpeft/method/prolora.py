"""PRoLoRA: W + s [B_sh | Bu] [A_sh ; Au], s = alpha / rank: chunks of one small factor, each rotated along the rank.

With u = unshared ranks, q = rank - u shared ones and ci = ceil(in / m): A_sh [q, in] is m chunks of width ci, chunk j being
A0 [q, ci] with its rows rolled up by j * max(q // m, 1); the last chunk is cut at `in`. B_sh [out, q] is n chunks of
ceil(out / n) rows, each B0 [ceil(out / n), q] with its columns rolled alike. Au [u, in] and Bu [out, u] are ordinary LoRA.
`rank` is the total. q = 0 or m = n = 1 is LoRA.

A0 and Au start uniform on +-1/sqrt(in), the full width for both ("rectified"); B0 and Bu at zero. The direction of the roll and
the strides (from q, where the paper has the rank) are those of the authors' code, which the paper leaves open. Defaults:
the paper's setting at the budget of LoRA of rank 2. A and B are expanded, one gather each; merge and export are exact.

Paper: arXiv 2402.16902.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term


def rotation(q: int, chunks: int) -> Tensor:
    """[q, chunks]: which row of the small factor stands in row i of chunk j."""
    return (torch.arange(q)[:, None] + torch.arange(chunks) * max(q // chunks, 1)) % q


def expand(small: Tensor, index: Tensor, size: int) -> Tensor:
    """small [q, c], index [q, chunks] -> [q, size]: the rotated chunks side by side, cut at `size`."""
    return small[index].flatten(1)[:, :size]


@method("prolora", paper="arXiv 2402.16902")
class PRoLoRA(Method):
    ROLES: ClassVar = {"A0": "down", "B0": "up", "Au": "down", "Bu": "up"}
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s [B_sh | Bu] [A_sh ; Au] drop(x), chunks of A_sh and B_sh rolled along the "
        "rank",
        defaults="the paper's setting at the budget of LoRA of rank 2",
        oracle="stock PEFT LoRA with the chunks rolled one by one by torch.roll",
        deviations=(
            "Direction of the roll and strides (from the shared ranks) are the authors' code's; the paper "
            "leaves them open.",
        ),
    )

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0,
        unshared: int = 1, m: int = 7, n: int = 7,
    ):  # fmt: skip
        super().__init__()
        check_rank("prolora", rank, site)
        check_int("prolora", "unshared", unshared, 0, rank, site.name, "the rank, of which it is a part")
        check_int("prolora", "m", m, 1, site.in_features, site.name, "the input width, which it divides into chunks")
        check_int("prolora", "n", n, 1, site.out_features, site.name, "the output width, which it divides into chunks")
        self.dropout = check_probability("prolora", "dropout", dropout)
        self.scale = check_finite("prolora", "alpha", alpha) / rank
        self.sizes, q, bound = (site.in_features, site.out_features), rank - unshared, site.in_features**-0.5
        self.A0 = site.empty(q, math.ceil(site.in_features / m)) if q else None
        self.B0 = site.zeros(math.ceil(site.out_features / n), q) if q else None
        self.Au = site.empty(unshared, site.in_features) if unshared else None
        self.Bu = site.zeros(site.out_features, unshared) if unshared else None
        for name, chunks in (("roll_A", m), ("roll_B", n)):
            index = torch.empty(q, chunks, dtype=torch.int64, device=site.device)
            self.register_buffer(name, index, persistent=False)
        self.refill()
        for A in (self.A0, self.Au):
            if A is not None:
                nn.init.uniform_(A, -bound, bound)

    def refill(self) -> None:
        for index in (self.roll_A, self.roll_B):
            index.copy_(rotation(*index.shape))

    def terms(self, base: Any) -> list[Term]:
        As, Bs = [], []
        if self.A0 is not None:
            As.append(expand(self.A0, self.roll_A, self.sizes[0]))
            Bs.append(expand(self.B0.T, self.roll_B, self.sizes[1]).T)
        if self.Au is not None:
            As.append(self.Au)
            Bs.append(self.Bu)
        p = self.dropout if self.training else 0.0
        return [LowRank(torch.cat(As), torch.cat(Bs, 1), self.scale, dropout=p)]
