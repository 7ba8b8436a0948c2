"""Mixture-of-LoRAs: y += s B_k A_k drop(x), one expert k per sequence and transformer block, chosen by the block's router.

Router: logits R h [experts], h the block's input pooled over the prompt; k = argmax. `experts` are LoRAs trained one per domain (folders of
PEFT or fastpeft), or a number of fresh ones; ranks, scales and layers may differ, and a layer that an expert lacks adds nothing for it.
At a layer they are stacked: one product with all A, the ranks of other experts set to zero sequence by sequence, one with all B; past a
measured total rank, without dropout, tokens are grouped by expert instead (fastpeft.grouping; never in code that torch.compile traces).

1. The experts, one LoRA per domain, each trained alone.
2. adapt(model, "moa", experts={"law": folder, ...}); train with fastpeft.train.MoARouting and model(..., domain=[batch] of names or numbers):
   every layer uses the expert of the label (teacher forcing), and the routers learn it by cross-entropy. train_experts=False freezes the LoRAs.
3. Without domain= the routers choose: per block (choice="argmax"), or by majority over the blocks (choice="vote", one more pass at the
   prefill). fastpeft.domains fixes an expert by hand, disables one, adds one.

pool="mean" or "last" of the prompt's tokens: attended to, and with labels == -100 where token labels are given (prompt="labels"), or all that are attended
to (prompt="all"); prompt_mask=[batch, tokens] in the call overrides both. R starts N(0, 0.02^2), its bias (router_bias=True) at zero. detach=True: the
routers' loss stops at h. The first `frozen` experts and their rows of R do not train.

Blocks: children of the outermost ModuleList on a layer's way, or those of `blocks`. In generation the prefill decides and the cache carries it.
Chunked prefill would decide on the first chunk. An expert that no sequence of a batch uses has zero gradients, which weight decay or
momentum still turn into steps. With an expert fixed, merge and export_lora give that LoRA.

Paper: arXiv 2403.03432.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.grouping import groups
from fastpeft.option_checks import check_int, check_probability
from fastpeft.registry import Holder, Method, Notes, Site, method
from fastpeft.routing import CHOICES, POOLS, PROMPTS, Router, Routing
from fastpeft.stack import experts_of, factors
from fastpeft.terms import Grouped, LowRank, Term


def by_row(of: Tensor, rows: Sequence[int], *, lead: Sequence[int], layer: str, listed: bool) -> Tensor:
    """What belongs to a sequence, of [batch, n], for the rows of a layer, [batch, ...] or [batch * tokens]: it broadcasts to [*rows, n].

    lead: leading dimensions of the block's input, zeros where only their number is known.   listed: the layer is in a list inside of its block, as the experts of a mixture are,
    whose rows of tokens may be any. ValueError where it cannot be told which row is whose.
    """
    batch = of.shape[0]
    if len(rows) == len(lead) and rows[0] == batch:
        return of.view(batch, *[1] * (len(lead) - 1), -1)
    if len(rows) == 1 and len(lead) == 2 and not listed:  # all tokens in order, as in OPT's FFN
        tokens = lead[1] or rows[0] // batch
        if rows[0] == batch * tokens:
            return of.repeat_interleave(tokens, 0)
    raise ValueError(
        f"moa: {layer!r} reads rows {tuple(rows)}, and its block {tuple(lead)}; which of them belong to which sequence cannot be told "
        "(the experts of a mixture read re-ordered tokens). Leave it out with exclude_modules."
    )


def pick(u: Tensor, p: Tensor | None, x: Tensor, *, mine: Tensor, **where: Any) -> Tensor:
    """u [..., R] with zeros at the ranks of experts that a sequence does not use; mine [batch, R]. where: as for by_row."""
    return u.masked_fill(~by_row(mine, u.shape[:-1], **where), 0)


def choose(p: Tensor | None, x: Tensor, *, choice: Tensor, **where: Any) -> tuple[Tensor, None]:
    """The one expert of each row of x, [..., 1], and no weight; choice [batch]."""
    rows = x.shape[:-1]
    return by_row(choice[:, None], rows, **where).expand(*rows, 1), None


@method("moa", paper="arXiv 2403.03432")
class MoA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "old_A": "down", "old_B": "up"}
    SHARES: ClassVar = True
    EXPERTS: ClassVar = True
    ROUTED: ClassVar = True
    PROCEDURE: ClassVar = "MoARouting"
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s (drop(x) A_k^T) B_k^T, k = argmax(R h) of the block, h its pooled input (one k per sequence)",
        defaults="LoRA's; two fresh experts, N(0, 0.02^2) routers and mean pooling are ours, as the paper's text was not at hand",
        oracle="the chosen LoRA by itself, here and in stock PEFT, and PEFT's per-sample adapter_names; R h and its cross-entropy in fp64",
        deviations=(
            "built from the paper's abstract (experts trained per domain, explicit routing, domain labels as supervision, experts that can be "
            "added); all else is a choice of ours with an option for it.",
            "The router's parameters (experts x width per block) are not counted in the table's trained numbers per layer.",
            "Encoder-decoders and packed rows are refused.",
        ),
    )

    def __init__(
        self,
        site: Site,
        holder: Holder | None,
        *,
        experts: Any = 2,
        rank: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        train_experts: bool = True,
        train_router: bool = True,
        frozen: int = 0,
        router_bias: bool = False,
        pool: str = "mean",
        prompt: str = "labels",
        choice: str = "argmax",
        detach: bool = True,
        blocks: Any = None,
    ):
        super().__init__()
        for name, value, known in (("pool", pool, POOLS), ("prompt", prompt, PROMPTS), ("choice", choice, CHOICES)):
            if value not in known:
                raise ValueError(f"moa: {name}={value!r}; it must be one of {', '.join(map(repr, known))}.")
        self.experts = own = experts_of("moa", site, experts, rank, alpha)
        self.layer, self.dropout = site.name, check_probability("moa", "dropout", dropout)
        self.frozen = check_int("moa", "frozen", frozen, 0, len(own.names) - 1, site.name, "fewer than there are experts")
        A, B = factors(site, own)
        self.split = sum(own.ranks[:frozen])
        trains = train_experts and any(own.ranks[frozen:])
        self.A, self.B = (nn.Parameter(t.detach().clone(), trains) for t in (A[self.split :], B[:, self.split :]))
        old = (A[: self.split], B[:, : self.split]) if frozen else (None, None)
        self.old_A, self.old_B = (None if t is None else nn.Parameter(t.detach().clone(), False) for t in old)
        self.register_buffer("owner", torch.empty(sum(own.ranks), dtype=torch.int64, device=site.device), persistent=False)
        self.refill()

    def refill(self) -> None:
        if not self.owner.is_meta:
            counts = torch.tensor(self.experts.ranks)
            self.owner.copy_(torch.repeat_interleave(torch.arange(len(counts)), counts))

    @classmethod
    def share(cls, sites: Sequence[tuple[Site, Mapping[str, Any]]], blank: bool) -> dict[str, tuple[Holder, list[str]]]:
        """One router per block; `routing` joins them."""
        routing: Routing | None = None
        found: dict[str, tuple[Holder, list[str]]] = {}
        for site, o in sites:
            if site.block is None:
                continue
            if routing is None:
                names = experts_of("moa", site, o["experts"], o["rank"], o["alpha"]).names
                frozen = check_int("moa", "frozen", o["frozen"], 0, len(names) - 1, site.name, "fewer than there are experts")
                routing = Routing(names, o["pool"], o["prompt"], o["choice"], o["detach"])
            key = site.block.name.replace(".", "_")
            if key not in found:
                found[key] = Router(site, routing, bias=o["router_bias"], frozen=frozen, trains=o["train_router"]), []
            found[key][1].append(site.name)
        return found

    def stack(self) -> tuple[Tensor, Tensor]:
        if self.old_A is None or self.old_B is None:
            return self.A, self.B
        return torch.cat([self.old_A, self.A]), torch.cat([self.old_B, self.B], 1)

    @torch.no_grad()
    def take(self, A: Tensor, B: Tensor, gates: Sequence[Tensor | None]) -> None:
        self.A.copy_(A[self.split :])
        self.B.copy_(B[:, self.split :])
        if self.old_A is not None and self.old_B is not None:
            self.old_A.copy_(A[: self.split])
            self.old_B.copy_(B[:, : self.split])

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        only = self._only()
        if only is not None:
            return [self._one(only, p)] if self.experts.ranks[only] else []
        self.need_procedure("moa")
        if self.holder is None:
            raise RuntimeError(f"moa: {self.layer!r} stands alone, in no block whose router could choose; use fastpeft.adapt on a model.")
        choice, lead = self.holder.routing.read(self.holder.block, self.layer)
        choice = choice.to(self.owner.device)
        if p == 0.0 and groups(self.experts.ranks, 1, base.device, base.dtype):
            return self._grouped(choice, lead)
        return self._stacked(p, choice[:, None] == self.owner, lead)

    def static_terms(self, base: Any) -> list[Term]:
        only = self._only()
        return self.every_term(base) if only is None else [self._one(only, 0.0)]

    def every_term(self, base: Any) -> list[Term]:
        if len(self.experts.names) == 1:
            return [self._one(0, 0.0)]
        return self._stacked(0.0, self.owner[None] >= 0, (1, 1))

    def _only(self) -> int | None:
        """The number of the expert that every sequence uses, or None where it depends on the sequence."""
        if len(self.experts.names) == 1:
            return 0
        holder: Any = self.holder
        return None if holder is None else holder.routing.fixed

    def _one(self, z: int, p: float) -> LowRank:
        at = self.experts.span(z)
        A, B = (self.old_A, self.old_B) if z < self.frozen else (self.A, self.B)
        at = at if z < self.frozen else slice(at.start - self.split, at.stop - self.split)
        return LowRank(A[at], B[:, at], self.experts.scale, dropout=p)

    def _stacked(self, p: float, mine: Tensor, lead: Sequence[int]) -> list[Term]:
        where = self._where(lead)
        return [
            LowRank(A, B, self.experts.scale, mid=functools.partial(pick, mine=mine[:, at], **where), dropout=p)
            for A, B, at, _ in self._stacks()
        ]

    def _grouped(self, choice: Tensor, lead: Sequence[int]) -> list[Term]:
        chosen = functools.partial(choose, choice=choice, **self._where(lead))
        return [Grouped(A, B, ranks, chosen, self.experts.scale) for A, B, _, ranks in self._stacks()]

    def _where(self, lead: Sequence[int]) -> dict[str, Any]:
        """How rows of this layer belong to sequences: by_row's arguments."""
        inside = self.layer[len(self.holder.block) :] if self.holder is not None and self.holder.block else ""
        return {"lead": lead, "layer": self.layer, "listed": any([part.isdigit() for part in inside.split(".")])}

    def _stacks(self) -> list[tuple[Tensor, Tensor, slice, tuple[int, ...]]]:
        """The frozen experts and the others, where there are some: A, B, their ranks in the whole stack, and the ranks of every expert."""
        own, old = self.experts.ranks, self.frozen
        both = (
            (self.old_A, self.old_B, slice(None, self.split), (*own[:old], *(0,) * len(own[old:]))),
            (self.A, self.B, slice(self.split, None), (*(0,) * old, *own[old:])),
        )
        return [stack for stack in both if stack[0] is not None and stack[0].shape[0]]
