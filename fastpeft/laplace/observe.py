"""What each LoRA factor reads and what gradient reaches it, seen from outside of the layer.

    y = ... + s (x A^T) B^T:   A reads x and gets s dy B,   B reads x A^T and gets s dy

so x and dy of the layer are enough, and the fused computation stays as it is. dy comes from the graph's edge behind the layer's
output, which later changes in place do not move.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastpeft.adapter import Adapter, base_of
from fastpeft.record import adaptation
from fastpeft.targets import Targets, checked_targets, matches
from fastpeft.terms import Bias, LowRank


class Layer(NamedTuple):
    """An adapted layer: its two factors and their scale; `random` names those that the posterior is about ("A", "B")."""

    module: nn.Module
    A: Tensor
    B: Tensor
    scale: float
    random: tuple[str, ...]


class Call(NamedTuple):
    """One use of a layer: its input [samples, tokens, in], the input's own shape, and where its output's gradient passes."""

    site: str
    x: Tensor
    lead: tuple[int, ...]
    edge: GradientEdge


def find_layers(model: nn.Module, sites: Targets, names: Collection[str] | None = None) -> dict[str, Layer]:
    """The LoRA layers of an adapted model by name, in the order of its modules. ValueError for methods that are more than A and B.

    sites: "all", or names or a regex as target_modules are.   names: of the random factors; None: those that train.
    """
    record = adaptation(model, "laplace.fit")
    found = {}
    for site in record.sites:
        if sites == "all" or matches(site, checked_targets("sites", sites)):
            layer = _layer(site, model.get_submodule(site), names)
            if layer.random:
                found[site] = layer
    if not found:
        raise ValueError(f"laplace.fit: sites={sites!r} leaves no layer whose factors train; adapted are {', '.join(record.sites[:12])}.")
    return found


def factor_name(site: str, leaf: str) -> str:
    return f"{site}.{leaf}" if site else leaf


def _layer(site: str, module: nn.Module, names: Collection[str] | None) -> Layer:
    adapter: Any = module.adapter
    methods = adapter.methods() if isinstance(adapter, Adapter) else {}
    if len(methods) == 1:
        (method,) = methods.values()
        with eval_mode(method), torch.no_grad():
            terms = [t for t in method.terms(base_of(module)) if not isinstance(t, Bias)]
        A, B = (method._parameters.get(leaf) for leaf in "AB")
        t = terms[0] if len(terms) == 1 and isinstance(terms[0], LowRank) else None
        if t is not None and t.A is A and t.B is B and t.blocks == 1 and not (t.mid or t.post or t.rows is not None):
            trains = {factor_name(site, leaf) for leaf, p in (("A", A), ("B", B)) if p.requires_grad}
            random = tuple(leaf for leaf in "AB" if factor_name(site, leaf) in (trains if names is None else names))
            return Layer(module, A, B, t.scale, random)
    raise ValueError(
        f"laplace.fit: {site!r} carries {'+'.join(adapter.names)}, which is not one LoRA's A and B; the posterior is about those. "
        "Adapt with 'laplace' or 'lora', or leave the layer out (sites=)."
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode, then each module as it was."""
    were = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, training in were:
            m.training = training


def observe(
    model: nn.Module, layers: dict[str, Layer], forward: Callable[[], Tensor]
) -> tuple[Tensor, list[Call]]:
    """forward() -> [samples, classes] in eval mode with a graph, and every use of `layers` in it, in order."""
    calls: list[Call] = []
    handles = [layer.module.register_forward_hook(_hook(name, calls), with_kwargs=True, prepend=True) for name, layer in layers.items()]
    try:
        with eval_mode(model), torch.enable_grad():
            f = forward()
    finally:
        for handle in handles:
            handle.remove()
    if not calls or not f.requires_grad:
        raise ValueError("laplace: no adapted layer ran on the way to the logits with gradients; was it compiled, or run without them?")
    for call in calls:
        if len(call.x) != len(f):
            raise ValueError(
                f"laplace: {call.site!r} reads {tuple(call.lead)} vectors for {len(f)} samples; its input must begin with the samples, "
                "or gradients cannot be told apart by sample."
            )
    return f, calls


def _hook(name: str, calls: list[Call]) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        x = (args[0] if args else kwargs["input"]).detach()
        if not torch.is_grad_enabled():
            raise RuntimeError(f"laplace: {name!r} runs without gradients; the forward must not be under no_grad or a reentrant checkpoint.")
        y = output if output.requires_grad else output.detach().requires_grad_().clone()
        lead = tuple(x.shape[:-1])
        tokens = x[:, None] if x.dim() == 2 else x.reshape(lead[0] if lead else 1, -1, x.shape[-1])
        calls.append(Call(name, tokens, lead, get_gradient_edge(y)))
        return None if y is output else y

    return hook


def sweep(f: Tensor, calls: Sequence[Call], cotangents: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """For each cotangent [samples, classes] of f the gradient at every call's output [samples, tokens, out], None where none comes."""
    edges = [call.edge for call in calls]
    for k, v in enumerate(cotangents):
        more = k + 1 < len(cotangents)
        grads = torch.autograd.grad(f, edges, v.to(f.dtype), retain_graph=more, allow_unused=True)
        yield [
            None if g is None else g.reshape(len(c.x), -1, g.shape[-1]) for g, c in zip(grads, calls, strict=True)
        ]


def read_by(layer: Layer, leaf: str, x: Tensor) -> Tensor:
    """What the factor reads, fp64: x itself, or x A^T."""
    wide = x.double()
    return wide if leaf == "A" else wide @ layer.A.detach().double().T


def reaches(layer: Layer, leaf: str, dy: Tensor) -> Tensor:
    """The gradient at what the factor makes, fp64: s dy B, or s dy."""
    wide = layer.scale * dy.double()
    return wide @ layer.B.detach().double() if leaf == "A" else wide
