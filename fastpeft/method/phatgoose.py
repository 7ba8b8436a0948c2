"""PHATGOOSE: y += s sum_z w_z B_z A_z x over independently trained LoRAs, w the softmax of each token's k highest scores.

Score z of a token is LN(x) . LN(v_z) / sqrt(in), LN without affine (eps 1e-5), v_z [in] the gate of expert z. Every linear routes by itself,
each token anew (nothing is remembered between tokens, so nothing is cached in generation). One stacked product serves all experts; past
a measured total rank, without dropout, tokens are grouped by expert instead (fastpeft.grouping; never in code that torch.compile traces).

1. An expert is any plain LoRA; the paper's is `lora` with rank=16, alpha=1 (s = 1/r) on every linear.
2. adapt(model, "phatgoose", experts=[folder], stage="gate") trains v alone, from zero: y += s (sigmoid(x . v) (drop(x) A^T)) B^T, so a gate
   begins at half of the LoRA. x and v are not normalised there. save_adapter writes the LoRA as PEFT's folder again, with the gates beside it
   in adapter_gates.safetensors, bound to these weights; stock PEFT loads the LoRA.
3. adapt(model, "phatgoose", experts=[gated folders]) routes; nothing trains, and training mode computes the same. The sigmoid plays no part.

A gate that was never trained is zero: its score is 0, and it can be chosen. k counts for as many experts as a layer has; a single one is that LoRA exactly, which
merges and exports. experts=K begins K fresh experts that train with their gates: a mixture that is ours and not the paper's.

Paper: arXiv 2402.05859.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.grouping import groups
from fastpeft.option_checks import check_int, check_probability
from fastpeft.patterns import per_layer
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.stack import GATE, experts_of, factors, gated
from fastpeft.terms import Grouped, LowRank, Term

EPS = 1e-5


def standardised(v: Tensor) -> Tensor:
    """Rows of v [.., in] less their mean, over their standard deviation, over sqrt(in); in fp32 at least."""
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    return F.layer_norm(wide, v.shape[-1:], eps=EPS) / math.sqrt(v.shape[-1])


def scores(p: Tensor, x: Tensor) -> Tensor:
    """p = x . (standardised gates) [..., Z] and x [..., in] -> LN(x) . LN(v) / sqrt(in), [..., Z] in fp32 at least.

    The mean of x meets gates whose sum is zero, so its standard deviation alone is left of LN(x).
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    if x.numel() == 0:  # var() warns
        return p.to(wide)
    return p.to(wide) * torch.rsqrt(x.to(wide).var(-1, correction=0, keepdim=True) + EPS)


def weights(p: Tensor, x: Tensor, k: int) -> Tensor:
    """The same -> w [..., Z], in fp32 at least: k entries that add up to one, zeros."""
    found = scores(p, x)
    if k >= found.shape[-1] or x.numel() == 0:
        return torch.softmax(found, -1)
    best, which = found.topk(k, -1)
    return torch.zeros_like(found).scatter(-1, which, torch.softmax(best, -1))


def choose(k: int, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The k experts and their weights [..., k], in fp32 at least; k at most the number of experts."""
    best, which = scores(p, x).topk(k, -1)
    return which, torch.softmax(best, -1)


def route(k: int, ranks: tuple[int, ...], u: Tensor, p: Tensor, x: Tensor) -> Tensor:
    return gated(u, weights(p, x, k).to(u.dtype), ranks)


def gate(u: Tensor, p: Tensor, x: Tensor) -> Tensor:
    return torch.sigmoid(p) * u


def gated_lora(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """PEFT LoraConfig fields of the expert whose gate trains; None in the other stage."""
    plan = options["experts"]
    if options["stage"] != "gate" or not isinstance(plan, Mapping):
        return None
    sites = {s: g for g in plan["groups"] for s in g["sites"]}
    found = per_layer("rank", {s: g["ranks"][0] for s, g in sites.items()})
    found |= per_layer("alpha", {s: g["scale"] * g["ranks"][0] for s, g in sites.items()})
    return {"r": found.pop("rank"), "lora_alpha": found.pop("alpha"), **found, "init_lora_weights": True}


@method("phatgoose", paper="arXiv 2402.05859")
class Phatgoose(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "V": "gate"}
    EXPERTS: ClassVar = True
    PEFT: ClassVar = PeftFormat("LORA", {"A": "lora_A.weight", "B": "lora_B.weight", "V": GATE}, gated_lora, gates=GATE)
    NOTES: ClassVar = Notes(
        formula="y = x W^T + s sum_z w_z (x A_z^T) B_z^T, w = softmax of the k highest LN(x) . LN(v_z) / sqrt(in)",
        defaults="the authors' code: rank 16, alpha 1, k 2; two fresh experts are ours",
        oracle="the paper's formula token by token in fp64, in both stages; the authors' softmax over all experts, cut to k and divided "
        "by its sum + 1e-6; stock PEFT LoRA for one expert and for the folders",
        deviations=(
            "the weights are a softmax over the k chosen scores; the authors divide a softmax over all by the sum of its k + 1e-6.",
            "experts begin as LoRA does here (A Kaiming uniform); the authors draw A from N(0, 0.01^2). Any plain LoRA will do.",
            "experts of different ranks, scales and layers mix: where a layer lacks some, it chooses among the others.",
            "routed trained experts are frozen and no procedure trains them; the forward in training mode is that of evaluation, "
            "and gradients go through it.",
            "a single expert is that LoRA exactly: it merges and exports.",
            "fresh experts (experts=K) that train together with their gates are ours.",
            "equal scores are told apart as torch.topk does.",
        ),
    )

    def __init__(
        self,
        site: Site,
        *,
        experts: Any = 2,
        rank: int = 16,
        alpha: float = 1,
        dropout: float = 0.0,
        k: int = 2,
        stage: str = "route",
    ):
        super().__init__()
        self.experts = own = experts_of("phatgoose", site, experts, rank, alpha)
        self.dropout = check_probability("phatgoose", "dropout", dropout)
        self.k, self.stage = check_int("phatgoose", "k", k, 1, None, site.name), stage
        if stage not in ("route", "gate"):
            raise ValueError(f"phatgoose: stage={stage!r}; it must be 'route' (several gated experts) or 'gate' (train one's gate).")
        if stage == "gate" and (own.fresh or len(own.names) != 1):
            raise ValueError(
                f"phatgoose: stage='gate' with {'fresh' if own.fresh else 'the'} experts {list(own.names)}; it trains the gate of one "
                "trained LoRA: give experts=[folder]."
            )
        self.A, self.B = factors(site, own)
        self.V = site.zeros(len(own.present), site.in_features)
        for p, trains in ((self.A, own.fresh), (self.B, own.fresh), (self.V, own.fresh or stage == "gate")):
            p.requires_grad_(trains)

    @torch.no_grad()
    def take(self, A: Tensor, B: Tensor, gates: Sequence[Tensor | None]) -> None:
        self.A.copy_(A)
        self.B.copy_(B)
        missing = [self.experts.names[z] for z in self.experts.present if gates[z] is None]
        if missing and self.stage == "route" and len(self.experts.names) > 1:
            raise ValueError(
                f"phatgoose: the folders of {', '.join(missing)} hold no gates; train them with experts=[folder], stage='gate', "
                "and save_adapter."
            )
        for row, z in enumerate(self.experts.present):
            if gates[z] is not None:
                self.V[row].copy_(gates[z])

    def gate_of(self, z: int) -> Tensor | None:
        return self.V[self.experts.present.index(z)]

    def terms(self, base: Any) -> list[Term]:
        p = self.dropout if self.training else 0.0
        if self.stage == "gate":
            return [LowRank(self.A, self.B, self.experts.scale, mid=gate, rows=self.V, dropout=p)]
        ranks = tuple([self.experts.ranks[z] for z in self.experts.present])
        if len(ranks) == 1:
            return [LowRank(self.A, self.B, self.experts.scale, dropout=p)]
        rows, k = standardised(self.V), min(self.k, len(ranks))
        if p == 0.0 and groups(ranks, k, base.device, base.dtype):
            return [Grouped(self.A, self.B, ranks, functools.partial(choose, k), self.experts.scale, rows)]
        return [LowRank(self.A, self.B, self.experts.scale, mid=functools.partial(route, k, ranks), rows=rows, dropout=p)]
