"""One decision per sequence and block: which expert the layers of a block use (Mixture-of-LoRAs).

Plain-function hooks carry it. The root's takes the domain label and the prompt mask of a forward, each block's pools the block's
input and decides, and the layers inside read the decision. What a forward decided is kept with it:

* A checkpoint that is recomputed in backward reads the decisions of the forward that it belongs to, which is the one through
  whose output that backward came. Where one backward comes through several that decided differently, this raises.
* In generation the prefill decides. Its decisions are on the cache object, so a decode step that gets the cache gets them, and
  another cache has its own. Without a cache they stay while the tokens grow by one and the prompt is the same.
* adapters_off reads and writes nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.registry import Holder, Site

POOLS, PROMPTS, CHOICES = ("mean", "last"), ("labels", "all"), ("argmax", "vote")


@dataclass(eq=False)
class Forward:
    """One forward of the adapted model.

    mask: [batch, tokens], true at the prompt's tokens; None for all.   domain: [batch], the labels, or None.
    choices: block -> [batch], the expert of each sequence.   pooled: block -> [batch, width], its pooled input.
    lead: block -> leading dimensions of its input; zeros in compiled code.   grad: whether gradients were enabled.
    """

    mask: Tensor | None
    domain: Tensor | None
    grad: bool
    choices: dict[str, Tensor] = field(default_factory=dict)
    pooled: dict[str, Tensor] = field(default_factory=dict)
    lead: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Decoded:
    """The last forward without cache that decided: its tokens [batch, prompt, ...], mask and choices; length: tokens by now."""

    def __init__(self, tokens: Tensor, attention: Tensor | None, choices: dict[str, Tensor]):
        # copies: a caller may write the next text into the same buffer
        self.tokens, self.attention = tokens.detach().clone(), None if attention is None else attention.clone()
        self.choices, self.length = choices, tokens.shape[1]

    def goes_on(self, tokens: Tensor, attention: Tensor | None) -> bool:
        """Whether these tokens are the same prompts and one more token than last time; beams of a prompt may have changed places."""
        if tokens.shape[:1] != self.tokens.shape[:1] or tokens.shape[1:2] != (self.length + 1,):
            return False
        n = self.tokens.shape[1]
        if (attention is None) != (self.attention is None) or not torch.equal(tokens[:, :n], self.tokens):
            return False
        return attention is None or torch.equal(attention[:, :n], self.attention)


class Routing:
    """What the routers of one adapted model share: settings, and the state of its forwards.

    names: of the experts.   fixed: the number of the one that every sequence uses, or None.   routers: by block name.
    now: the forward that runs.   last: the one that ran last.   tasks: id of a running backward -> the forwards that it came through.
    """

    def __init__(self, names: Sequence[str], pool: str, prompt: str, choice: str, detach: bool):
        self.names, self.pool, self.prompt, self.choice, self.detach = tuple(names), pool, prompt, choice, detach
        self.fixed: int | None = None
        self.routers: dict[str, Router] = {}
        self.parameters: tuple[str, ...] = ()  # of the root's forward
        self._forget()

    def _forget(self) -> None:
        self.now: Forward | None = None
        self.last: Forward | None = None
        self.tasks: dict[int, list[Forward]] = {}
        self.decoded: Decoded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"now": None, "last": None, "tasks": {}, "decoded": None}

    @property
    def enabled(self) -> bool:
        return all([r.enabled for r in self.routers.values()])

    def allowed(self) -> list[bool]:
        """Of each expert, whether every router may choose it."""
        flags = [r.allowed for r in self.routers.values()]
        found: list[bool] = torch.stack([f.to(flags[0].device) for f in flags]).all(0).tolist()
        return found

    def number(self, expert: int | str, who: str) -> int:
        """The number of an expert given by name or number; ValueError if there is none."""
        if isinstance(expert, str) and expert in self.names:
            return self.names.index(expert)
        if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < len(self.names):
            return expert
        raise ValueError(f"{who}: there is no expert {expert!r}; there are {', '.join(map(repr, self.names))}, numbered from 0.")

    def read(self, block: str, layer: str) -> tuple[Tensor, tuple[int, ...]]:
        """(choices [batch] of a block, leading dimensions of its input) in the forward that runs, or is recomputed; RuntimeError without one."""
        found = [] if self.now is None else [self.now]
        if not found and not torch.compiler.is_compiling():
            found = self.tasks.get(torch._C._current_graph_task_id(), [])
        if not found:
            raise RuntimeError(
                f"moa: {layer!r} ran outside of a forward of the adapted model, where nothing says which expert its sequences use; "
                "call the module that was given to adapt, or fix an expert (fastpeft.domains.use_expert)."
            )
        choices = [f.choices[block] for f in found if block in f.choices]
        if len(choices) < len(found):
            raise RuntimeError(f"moa: {layer!r} ran before its block {block!r} did, or beside it; give its real block in blocks=.")
        if any(c.shape != choices[0].shape or not torch.equal(c, choices[0]) for c in choices[1:]):
            raise RuntimeError(
                f"moa: {layer!r} is recomputed (checkpointing) in one backward through {len(found)} forwards that chose other experts "
                "for it; call backward after each forward, or put the sequences into one batch."
            )
        leads = {f.lead[block] for f in found}
        return choices[0], leads.pop() if len(leads) == 1 else (choices[0].shape[0], -1)


class Router(Holder):
    """The router of one block: logits of the experts from the block's pooled input.

    R [experts - frozen, width], b [experts - frozen] or None: train.   old_R, old_b: rows of the first `frozen` experts.
    allowed [experts]: false where an expert is disabled, which is then never chosen.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"R": "gate", "b": "gate", "old_R": "gate", "old_b": "gate"}
    in_layers = False

    def __init__(self, site: Site, routing: Routing, *, bias: bool, frozen: int, trains: bool):
        super().__init__()
        assert site.block is not None
        self.block, width, count = site.block.name, site.block.width, len(routing.names)
        self.routing = routing
        self.R = site.empty(count - frozen, width).requires_grad_(trains)
        self.b = site.zeros(count - frozen).requires_grad_(trains) if bias else None
        self.old_R = site.empty(frozen, width).requires_grad_(False) if frozen else None
        self.old_b = site.zeros(frozen).requires_grad_(False) if frozen and bias else None
        self.register_buffer("allowed", torch.ones(count, dtype=torch.bool, device=site.device))
        for rows in (self.R, self.old_R):
            if rows is not None:
                nn.init.normal_(rows, std=0.02)
        routing.routers[self.block] = self

    def logits(self, pooled: Tensor) -> Tensor:
        """[batch, width] -> [batch, experts]; minus infinity where an expert is disabled."""
        R, b = self.R, self.b
        if self.old_R is not None:
            R = torch.cat([self.old_R, R])
            b = None if b is None or self.old_b is None else torch.cat([self.old_b, b])
        with torch.autocast(pooled.device.type, enabled=False):
            return F.linear(pooled.to(R.dtype), R, b).masked_fill(~self.allowed, -torch.inf)

    def pooled(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, ..., width] -> [batch, width] in fp32 at least, over the tokens of `mask` [batch, tokens]; ValueError on other shapes."""
        if h.shape[-1] != self.R.shape[1] or h.dim() < 2:
            raise ValueError(
                f"moa: the block {self.block!r} reads {tuple(h.shape)}; its router needs [batch, ..., {self.R.shape[1]}], what its first "
                "linear layer reads. Name other blocks in blocks=."
            )
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        if h.dim() == 2:  # each row is a sequence
            return h
        h = h.flatten(1, -2)
        last = self.routing.pool == "last"
        if mask is None:
            return h[:, -1] if last else h.mean(1)
        if mask.shape != h.shape[:2]:
            raise ValueError(
                f"moa: the block {self.block!r} reads {tuple(h.shape)} and the prompt mask is {tuple(mask.shape)}; needed are one row per "
                "sequence and one entry per token (packed or re-ordered tokens cannot be routed by sequence)."
            )
        mask = mask.to(h.device)
        if last:
            places = torch.arange(h.shape[1], device=h.device)
            at = (mask * places).argmax(1)
            return h.gather(1, at[:, None, None].expand(-1, 1, h.shape[-1])).squeeze(1)
        return h.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)

    def decide(self, h: Tensor, forward: Forward) -> None:
        """Write this block's choice of the forward that runs, unless it is there: by the label, a kept decision, or an earlier call."""
        # (in compiled code numbers that one graph leaves for another would make a graph for each size)
        forward.lead[self.block] = (0,) * (h.dim() - 1) if torch.compiler.is_compiling() else tuple(h.shape[:-1])
        choice = forward.choices.get(self.block)
        if choice is None:
            if forward.grad and not torch.is_grad_enabled() and not self.routing.detach:
                raise RuntimeError(
                    f"moa: detach=False at the block {self.block!r} inside a reentrant checkpoint, which cuts the routers' gradient off; "
                    "use use_reentrant=False."
                )
            pooled = self.pooled(h.detach() if self.routing.detach else h, forward.mask)
            forward.pooled[self.block] = pooled
            if forward.domain is not None:
                choice = forward.domain.to(h.device)
            else:
                choice = self.logits(pooled).detach().argmax(-1)
            forward.choices[self.block] = choice
        if choice.shape[0] != h.shape[0]:
            raise RuntimeError(
                f"moa: the block {self.block!r} reads {h.shape[0]} sequences, and there are decisions or labels for {choice.shape[0]}; "
                "give one label per sequence, and decode with as many rows as the prefill had."
            )
