"""The hooks by which a routed model decides (fastpeft.routing): plain functions on the root and on each block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.outputs import tensors
from fastpeft.prompts import domain_of, prompt_of, tokens_of
from fastpeft.registry import Holder
from fastpeft.routing import Decoded, Forward, Router, Routing

_LINK = "_fastpeft_routing"
_KEPT = "_fastpeft_choices"


def attach(model: nn.Module, routers: Mapping[str, Holder]) -> list[Any]:
    """Hooks and links of all routers; what is returned undoes them by `remove`."""
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


def is_routed(model: nn.Module) -> bool:
    """Whether the model was adapted with a method that routes by sequence."""
    return _LINK in model.__dict__


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
    tokens = tokens_of(named)
    domain = domain_of(routing, domain)
    if domain is not None and tokens is not None:
        domain = domain.to(tokens.device)  # once, and not in every block
    forward = Forward(None, domain, torch.is_grad_enabled())
    kept = _kept(model, routing, named, tokens, domain)
    if kept is not None:
        forward.choices = dict(kept)
    else:
        forward.mask = prompt_of(routing, named, tokens, prompt)
        if routing.choice == "vote" and domain is None:
            forward.choices = _voted(model, routing, named, forward)
        if not torch.compiler.is_compiling():
            quiet = tokens is not None and tokens.dim() in (2, 3) and not torch.is_grad_enabled()
            routing.decoded = Decoded(tokens, named.get("attention_mask"), forward.choices) if tokens is not None and quiet else None
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
    forward.pooled = trial.pooled
    winner = None if votes is None else votes.argmax(-1)
    return {} if winner is None else dict.fromkeys(trial.choices, winner)
