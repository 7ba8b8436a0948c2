"""PEFT's loha.Linear and lokr.Linear; their updates are never formed. (PEFT rounds LoHa's scale to fp32, which shows in fp64 alone.)"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpeft.accelerated.reading import NONE_ACTIVE, Found, Why, active
from fastpeft.terms import KhatriRao, Kron, LowRank, Term


def read_loha(layer: Any) -> Found | Why:
    """The active adapters of a LoHa layer."""
    names = active(layer, layer.hada_w1_a)
    if not names:
        return NONE_ACTIVE
    if (why := _drops(layer, names)) is not None:
        return why
    if any([n in layer.hada_t1 for n in names]):
        return Why("a factor of a convolution (hada_t1)")
    factors = [(layer.hada_w1_a[n], layer.hada_w1_b[n], layer.hada_w2_a[n], layer.hada_w2_b[n]) for n in names]
    scales = [layer.scaling[n] for n in names]

    def terms() -> list[Term]:
        return [LowRank(KhatriRao(b1, b2), KhatriRao(a1, a2), s) for (a1, b1, a2, b2), s in zip(factors, scales, strict=True)]

    return Found("loha", tuple([t for own in factors for t in own]), terms, like_x=True)


def read_lokr(layer: Any) -> Found | Why:
    """The active adapters of a LoKr layer."""
    names = active(layer, _Either(layer))
    if not names:
        return NONE_ACTIVE
    if (why := _drops(layer, names)) is not None:
        return why
    if any([n in layer.lokr_t2 for n in names]):
        return Why("a factor of a convolution (lokr_t2)")
    halves = [(_half(layer, "lokr_w1", n), _half(layer, "lokr_w2", n), layer.scaling[n]) for n in names]

    def terms() -> list[Term]:
        return [Kron(_whole(left), _whole(right), s) for left, right, s in halves]

    return Found("lokr", tuple([t for left, right, _ in halves for t in (*left, *right)]), terms, like_x=True)


class _Either:
    """The adapters that have a left factor, whole or in two."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __contains__(self, name: str) -> bool:
        return name in self.layer.lokr_w1 or name in self.layer.lokr_w1_a


def _half(layer: Any, stem: str, name: str) -> tuple[Tensor, ...]:
    """(w,) or (w_a, w_b) of one half of the Kronecker product."""
    whole = getattr(layer, stem)
    if name in whole:
        return (whole[name],)
    return getattr(layer, f"{stem}_a")[name], getattr(layer, f"{stem}_b")[name]


def _whole(half: tuple[Tensor, ...]) -> Tensor:
    return half[0] if len(half) == 1 else half[0] @ half[1]


def _drops(layer: Any, names: list[str]) -> Why | None:
    """rank_dropout and module_dropout act on the whole update, in training."""
    if layer.training:
        for name in names:
            if layer.rank_dropout[name]:
                return Why("rank_dropout in training forms the whole update")
            if layer.module_dropout[name]:
                return Why("module_dropout in training draws for the whole update")
    return None
