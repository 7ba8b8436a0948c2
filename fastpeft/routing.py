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

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.outputs import tensors
from fastpeft.registry import Holder, Site

POOLS, PROMPTS, CHOICES = ("mean", "last"), ("labels", "all"), ("argmax", "vote")
_LINK = "_fastpeft_routing"
_KEPT = "_fastpeft_choices"
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


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
        self.tokens, self.attention, self.choices, self.length = tokens, attention, choices, tokens.shape[1]

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


def attach(model: nn.Module, routers: Mapping[str, Holder]) -> list[Any]:
    """Hooks and links of all routers; what is returned undoes them by `remove`. ValueError for a model that cannot be routed."""
    own = [r for r in routers.values() if isinstance(r, Router)]
    if not own:
        return []
    routing = own[0].routing
    routing.parameters = tuple(inspect.signature(model.forward).parameters)
    undo = [_link(model, routing)]
    undo.append(model.register_forward_pre_hook(_begin, prepend=True, with_kwargs=True))
    undo.append(model.register_forward_hook(_end, with_kwargs=True, always_call=True))
    for router in own:
        block = model.get_submodule(router.block)
        undo.append(_link(block, router))
        undo.append(block.register_forward_pre_hook(_decide, with_kwargs=True))
    return undo


def refuse(model: nn.Module) -> None:
    """ValueError for a model whose sequences cannot be routed by these hooks."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"adapt: moa routes by a prompt that the block reads, and {type(model).__name__} is an encoder-decoder, whose decoder reads "
            "none; adapt its encoder alone, or use another method."
        )
    taken = [n for n in ("domain", "prompt_mask") if n in inspect.signature(model.forward).parameters]
    if taken:
        raise ValueError(f"adapt: moa takes {taken[0]}= away from the forward of {type(model).__name__}, which has an argument of that name.")


class _Link:
    """An attribute of a module outside the module tree, which a deepcopy of the model takes along."""

    def __init__(self, module: nn.Module, key: str):
        self.module, self.key = module, key

    def remove(self) -> None:
        self.module.__dict__.pop(self.key, None)


def _link(module: nn.Module, value: Routing | Router) -> _Link:
    key = _LINK if isinstance(value, Routing) else f"{_LINK}_block"
    module.__dict__[key] = value
    return _Link(module, key)


def routing_of(model: nn.Module, who: str) -> Routing:
    """Of a model adapted with moa; ValueError for another."""
    routing = model.__dict__.get(_LINK)
    if routing is None:
        raise ValueError(f"{who}: this {type(model).__name__} was not adapted with moa; pass the module that was given to adapt.")
    return routing


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    routing: Routing = model.__dict__[_LINK]
    domain, prompt = kwargs.get("domain"), kwargs.get("prompt_mask")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("domain", "prompt_mask")}
    if not routing.enabled or routing.fixed is not None:
        if routing.enabled and domain is not None:
            raise ValueError(f"moa: domain= was given, and expert {routing.names[routing.fixed or 0]!r} is fixed; use_expert(model, None) first.")
        return args, kwargs
    named = dict(zip(routing.parameters, args, strict=False)) | kwargs
    tokens = _tokens(named)
    domain = _domain(routing, domain)
    forward = Forward(None, domain, torch.is_grad_enabled())
    kept = _kept(model, routing, named, tokens, domain)
    if kept is not None:
        forward.choices = dict(kept)
    else:
        forward.mask = _prompt(routing, named, tokens, prompt)
        if routing.choice == "vote" and domain is None:
            forward.choices = _voted(model, routing, named, forward)
        if not torch.compiler.is_compiling() and tokens is not None and tokens.dim() in (2, 3) and not torch.is_grad_enabled():
            routing.decoded = Decoded(tokens, named.get("attention_mask"), forward.choices)
    routing.now = forward
    return args, kwargs


def _end(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    routing: Routing = model.__dict__[_LINK]
    forward, routing.now = routing.now, None
    if forward is None:
        return
    routing.last = forward
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(_flows, routing, forward))
    given = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for cache in (*args, *kwargs.values(), *given):
        if _is_cache(cache):
            setattr(cache, _KEPT, forward.choices)


def _decide(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    router: Router = block.__dict__[f"{_LINK}_block"]
    forward = router.routing.now
    if forward is not None and router.enabled:
        h = next((t for t in (kwargs.get("hidden_states"), *args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if h is None or not h.is_floating_point():
            what = "no tensor" if h is None else str(h.dtype)
            raise TypeError(f"moa: the block {router.block!r} was called with {what}; its router reads hidden states. Name other blocks in blocks=.")
        router.decide(h, forward)


def _flows(routing: Routing, forward: Forward, grad: Tensor) -> None:
    """A backward came through an output of `forward`."""
    task = torch._C._current_graph_task_id()
    if task not in routing.tasks:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: routing.tasks.pop(task, None))
    through = routing.tasks.setdefault(task, [])
    if forward not in through:
        through.append(forward)


def _is_cache(value: Any) -> bool:
    """Whether it is a Cache of Transformers."""
    return hasattr(value, "get_seq_length")


def _begun(cache: Any) -> bool:
    """Whether it holds tokens."""
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # no layer of it counts them
        return bool(cache.has_previous_state())


def _tokens(named: Mapping[str, Any]) -> Tensor | None:
    """What the model reads: input_ids, embeddings, or its first tensor."""
    known = (named.get("input_ids"), named.get("inputs_embeds"), *named.values())
    return next((t for t in known if isinstance(t, Tensor)), None)


def _domain(routing: Routing, domain: Any) -> Tensor | None:
    """Labels [batch] as numbers; ValueError for one that there is not, or that is disabled."""
    if domain is None:
        return None
    if not isinstance(domain, Tensor):
        domain = torch.tensor([routing.number(d, "moa: domain") for d in domain])
    if domain.dim() != 1 or domain.is_floating_point() or domain.dtype is torch.bool:
        raise ValueError(f"moa: domain is {domain.dtype} {tuple(domain.shape)}; needed are names, or integers [batch].")
    if not torch.compiler.is_compiling():
        closed = [z for z in domain.unique().tolist() if not 0 <= z < len(routing.names) or not all(bool(r.allowed[z]) for r in routing.routers.values())]
        if closed:
            raise ValueError(f"moa: domain holds {closed}, of which there is no expert, or a disabled one; there are {', '.join(map(repr, routing.names))}, numbered from 0.")
    return domain.long()


def _kept(model: nn.Module, routing: Routing, named: Mapping[str, Any], tokens: Tensor | None, domain: Tensor | None) -> dict[str, Tensor] | None:
    """The decisions that stand already, of a sequence that goes on; None where it begins."""
    past = next((v for v in named.values() if _is_cache(v)), None)
    other = [k for k in ("cache", "past_key_values", "cache_params") if named.get(k) is not None and not _is_cache(named[k])]
    if other:
        raise ValueError(f"moa: {other[0]} is a {type(named[other[0]]).__name__}, which carries no routing decision; it must be a Cache of Transformers.")
    if past is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError("moa: compiled code cannot tell a prefill from a decode step; generate with the uncompiled model.")
        if _begun(past):
            kept = getattr(past, _KEPT, None)
            if kept is None:
                raise RuntimeError(
                    "moa: this cache comes from no routed forward of this model (adapters off, another model, or a fixed "
                    "expert), so nothing says which experts the sequence uses; begin with the prompt."
                )
            if domain is not None:
                raise ValueError("moa: domain= with a cache whose prefill decided already; give it at the prefill.")
            return kept
    quiet = not torch.is_grad_enabled() and not model.training and not torch.compiler.is_compiling()
    decoded = routing.decoded
    if decoded is None or not quiet or tokens is None or domain is not None or named.get("labels") is not None:
        return None
    if decoded.goes_on(tokens, named.get("attention_mask")):
        decoded.length += 1
        return decoded.choices
    return None


def _prompt(routing: Routing, named: Mapping[str, Any], tokens: Tensor | None, prompt: Any) -> Tensor | None:
    """True at the prompt's tokens [batch, tokens], or None for all. ValueError where there is none, or a row holds several sequences."""
    attention, labels = named.get("attention_mask"), named.get("labels")
    packed = [n for n in _PACKED if named.get(n) is not None]
    if packed:
        raise ValueError(f"moa: {packed[0]} packs several sequences into a row, and an expert is chosen per row; pad them instead.")
    if attention is not None and (not isinstance(attention, Tensor) or attention.dim() != 2):
        what = f"{tuple(attention.shape)}" if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(f"moa: attention_mask is {what}; needed is [batch, tokens], which says where the prompt is.")
    mask = None if attention is None else attention != 0
    _refuse_packed(named.get("position_ids"), mask)
    if prompt is not None:
        if not isinstance(prompt, Tensor) or prompt.dim() != 2:
            what = f"{tuple(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
            raise ValueError(f"moa: prompt_mask is {what}; it must be a tensor [batch, tokens], not zero at the prompt's tokens.")
        own: Tensor | None = prompt != 0
    elif routing.prompt == "labels" and isinstance(labels, Tensor) and not labels.is_floating_point() and _per_token(labels, tokens):
        own = labels == -100
    else:
        own = None
    if own is not None:
        mask = own if mask is None else own & mask.to(own.device)
    if mask is not None and not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(
            f"moa: row {row} has no prompt token to route by: none is attended to with labels == -100. Mask the prompt in labels, give "
            "prompt_mask=[batch, tokens], or adapt with prompt='all'."
        )
    return mask


def _per_token(labels: Tensor, tokens: Tensor | None) -> bool:
    return labels.dim() == 2 and tokens is not None and labels.shape == tokens.shape[:2]


def _refuse_packed(positions: Any, mask: Tensor | None) -> None:
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.is_floating_point() or torch.compiler.is_compiling():
        return
    back = positions[:, 1:] <= positions[:, :-1]
    if mask is not None and mask.shape[-1] == positions.shape[-1]:
        back = back & mask[:, 1:] & mask[:, :-1]
    if bool(back.any()):
        raise ValueError("moa: position_ids start again within a row, so it holds several sequences; an expert is chosen per row. Pad them instead.")


def _voted(model: Any, routing: Routing, named: Mapping[str, Any], forward: Forward) -> dict[str, Tensor]:
    """The same expert for every block: what most blocks chose in a pass of their own; of equally many the one of higher mean probability."""
    if model.training:
        raise RuntimeError("moa: choice='vote' takes a pass over all blocks first, which training without domain= does not have; give the labels.")
    trial = Forward(forward.mask, None, False)
    own = {k: v for k, v in named.items() if k != "labels" and not _is_cache(v)}
    if "use_cache" in routing.parameters:
        own["use_cache"] = False
    routing.now = trial
    try:
        with torch.no_grad():
            model.forward(**own)
    finally:
        routing.now = None
    votes: Tensor | None = None
    for name, choice in trial.choices.items():
        p = torch.softmax(routing.routers[name].logits(trial.pooled[name]).detach(), -1)
        one = F.one_hot(choice, p.shape[-1]) + p / (2 * len(trial.choices))
        votes = one if votes is None else votes + one.to(votes.device)
    winner = None if votes is None else votes.argmax(-1)
    return {} if winner is None else dict.fromkeys(trial.choices, winner)
