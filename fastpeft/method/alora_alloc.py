"""ALoRA (allocation): W + s B diag(gate) A, s = alpha / rank, gate 0 or 1 and not trained.   A [capacity, in], B [out, capacity].

`rank` ranks are live at the start; `capacity` (default 2 * rank, at most the layer's smaller side) are allocated, so that ranks
can move between layers without a parameter being replaced. s keeps the first rank. `close` gates ranks off and clears them, `open`
starts spare ones afresh, A uniform on +-1/sqrt(in) and B zero, which changes no output. Both clear the moments that an
optimiser keeps of those ranks, so a closed rank stays at zero. The gate is saved; merge and export take the live ranks. Which
rank goes where is fastpeft.train.ALoRAAllocation's matter. A starts Kaiming uniform (a = sqrt(5)), B at zero. Not PEFT's alora (activated LoRA).

Paper: arXiv 2403.16187.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int, check_probability, check_rank
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import LowRank, Term

Moments = Mapping[Any, Mapping[str, Any]]


@method("alora_alloc", paper="arXiv 2403.16187")
class ALoRAAlloc(Method):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    PROCEDURE: ClassVar = "ALoRAAllocation"
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * B diag(gate) A",
        defaults="rank 8 as in the paper; alpha 8 is LoRA's here (the paper gives none); capacity 2 * rank is ours",
        oracle="stock PEFT LoRA of the live ranks; this library's lora bit for bit with every gate on; the dense formula in fp64",
        deviations=(
            "spare ranks are allocated and gated, where the paper concatenates; a layer cannot grow beyond its capacity.",
            "new ranks start as LoRA's (A random, B zero), so that they change no output; the paper says only 'newly initialised'.",
            "s stays alpha / rank as ranks come and go; the paper does not say.",
            "ranks closed per round: one per type of adapted module in all; the paper's count per block would be 32 times that in LLaMA-2.",
            "K2 is a quarter of the steps before the first round, which is a quarter of an epoch where that comes after the first epoch.",
            "a layer that has lost every rank has the lowest mean score; the paper does not say.",
        ),
    )

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 8, dropout: float = 0.0, capacity: int | None = None):
        super().__init__()
        check_rank("alora_alloc", rank, site)
        limit = min(site.in_features, site.out_features)
        capacity = min(2 * rank, limit) if capacity is None else capacity
        check_int("alora_alloc", "capacity", capacity, rank, limit, site.name, "from the rank to the layer's smaller side")
        self.dropout = check_probability("alora_alloc", "dropout", dropout)
        self.scale = check_finite("alora_alloc", "alpha", alpha) / rank
        self.site, self.rank = site.name, rank
        self.A, self.B = site.zeros(capacity, site.in_features), site.zeros(site.out_features, capacity)
        self.register_buffer("gate", torch.arange(capacity, device=site.device) < rank)
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.A[:rank], a=math.sqrt(5))

    def live(self) -> int:
        """How many ranks are gated on."""
        return self.rank if self.gate.is_meta else int(self.gate.sum())

    @torch.no_grad()
    def close(self, ranks: Sequence[int], moments: Moments | None = None) -> None:
        """Gate these live ranks off and set them to zero. moments: the `state` of the optimiser that holds A and B, if there is one."""
        alive = set(self.gate.nonzero().flatten().tolist())
        if len(set(ranks)) != len(ranks) or not set(ranks) <= alive:
            raise ValueError(f"alora_alloc.close: ranks={list(ranks)} at {self.site!r}; live ranks are {sorted(alive)}, each at most once.")
        self._reset(torch.tensor(list(ranks), dtype=torch.int64, device=self.gate.device), False, 0.0, moments)

    @torch.no_grad()
    def open(self, count: int, moments: Moments | None = None, generator: torch.Generator | None = None) -> list[int]:
        """Gate `count` spare ranks on, newly started; returns which. generator: on the CPU; each process of a parallel run must draw the same."""
        spare = (~self.gate).nonzero().flatten()
        check_int("alora_alloc.open", "count", count, 0, len(spare), self.site, "the spare ranks of its capacity")
        bound = self.A.shape[1] ** -0.5
        fresh = torch.empty(count, self.A.shape[1], dtype=self.A.dtype).uniform_(-bound, bound, generator=generator)
        self._reset(spare[:count], True, fresh.to(self.A.device), moments)
        return spare[:count].tolist()

    def _reset(self, ranks: Tensor, on: bool, A: Tensor | float, moments: Moments | None) -> None:
        self.gate[ranks], self.A[ranks], self.B[:, ranks] = on, A, 0.0
        for p, where in ((self.A, (ranks,)), (self.B, (slice(None), ranks))):
            for t in (moments or {}).get(p, {}).values():
                if isinstance(t, Tensor) and t.shape == p.shape:
                    t[where] = 0.0

    def terms(self, base: Any) -> list[Term]:
        return [LowRank(self.A, self.B * self.gate, self.scale, dropout=self.dropout if self.training else 0.0)]

    def static_terms(self, base: Any) -> list[Term]:
        return [LowRank(self.A[self.gate], self.B[:, self.gate], self.scale)]


def live_parameters(model: nn.Module) -> int:
    """Trainable numbers of the live ranks of every alora_alloc layer: rank * (in + out), summed. Spare ranks do not count."""
    return sum(m.live() * (m.A.shape[1] + m.B.shape[0]) for m in model.modules() if isinstance(m, ALoRAAlloc))
