"""PEFT's lora.Linear, Linear4bit and Linear8bitLt: LoRA, rsLoRA, a bias in B, every initialisation; DoRA alone at its layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpeft.accelerated.reading import NONE_ACTIVE, Found, Why, active, dropout, observed
from fastpeft.terms import Bias, Gain, LowRank, Term

INDEPENDENT = Why("several adapters with dropout: PEFT draws a mask for each, the fused products one for the layer")


def read(layer: Any) -> Found | Why:
    """The active adapters of a LoRA layer."""
    modules = layer._modules
    As, Bs, drops = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    names = active(layer, As)
    if not names:
        return NONE_ACTIVE
    variants, scaling = layer.lora_variant, layer.scaling
    parts: list[tuple[Tensor, Tensor, Tensor | None, float, float]] = []
    tensors: list[Tensor] = []
    for name in names:
        A, B = As[name], Bs[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear:
            return Why(f"lora_A or lora_B is a {type(A).__name__} / {type(B).__name__} and no nn.Linear")
        if observed(A) or observed(B):
            return Why("lora_A or lora_B has hooks, or a forward of its own")
        p = dropout(drops[name])
        if type(p) is Why:
            return p
        if name in variants:
            return _dora(layer, name, names, p)
        a, b, bias = A.weight, B.weight, B.bias
        tensors += (a, b) if bias is None else (a, b, bias)
        parts.append((a, b, bias, scaling[name], p))
    if len(parts) > 1 and any([part[4] for part in parts]):
        return INDEPENDENT

    def terms() -> list[Term]:
        made: list[Term] = [LowRank(a, b, s, dropout=p) for a, b, _, s, p in parts]
        made += [Bias(bias * s) for _, _, bias, s, _ in parts if bias is not None]
        return made

    return Found("lora", tuple(tensors), terms)


def _dora(layer: Any, name: str, names: list[str], p: float) -> Found | Why:
    kind = type(layer.lora_variant[name]).__name__
    if kind != "DoraLinearVariant":
        return Why(f"the LoRA variant {kind} has no fused form")
    if len(names) > 1:
        return Why("DoRA beside another active adapter: each scales what the ones before it computed")
    m = layer._modules["lora_magnitude_vector"]._modules[name]
    if type(m).__name__ != "DoraLinearLayer" or observed(m):
        return Why(f"the magnitude is a {type(m).__name__} that is not PEFT's DoraLinearLayer, or has hooks")
    A, B, scale = layer.lora_A[name].weight, layer.lora_B[name], layer.scaling[name]
    if B.bias is not None:
        return Why("DoRA with lora_bias has no fused form")
    b, g = B.weight, m.weight
    # PEFT looks at the layer's own mode here, and drops what the base product reads too
    p = p if layer.training else 0.0

    def terms() -> list[Term]:
        low = LowRank(A, b, scale, dropout=p)
        return [low, Gain(g, p, over=low)]

    return Found("dora", (A, b, g), terms, second=p > 0.0)
