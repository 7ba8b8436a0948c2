"""What every family asks of a PEFT layer before it is fused, or the reason why PEFT's own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter

# torch's own tensors; a subclass (distributed, quantised, fake) has arithmetic that the fused products do not know
OWN = (Tensor, Parameter)


class Why(NamedTuple):
    """Why PEFT's own forward runs. idle: there is no adapter to compute at the moment, only the base layer."""

    reason: str
    idle: bool = False


class Found(NamedTuple):
    """The active adapters of a layer as terms in waiting.

    family: what is counted.   tensors: every tensor that the terms are made of.   terms: makes them, with autograd.
    rounds: whether the update is rounded to the base weight's dtype before the product (SHiRA).
    like_x: whether the result has x's dtype, also under autocast (LoHa, LoKr).
    second: whether there is a second base product, which PEFT computes in the adapter's dtype (DoRA with dropout).
    """

    family: str
    tensors: tuple[Tensor, ...]
    terms: Callable[[], Sequence[Any]]
    rounds: bool = False
    like_x: bool = False
    second: bool = False


DISABLED = Why("the adapters are disabled", True)
MERGED = Why("the adapters are merged into the base weight", True)
NONE_ACTIVE = Why("no active adapter has parameters here", True)


def observed(module: nn.Module) -> bool:
    """Whether somebody hooked the call of a module inside the layer (offloading, sharding, a user), so that it must happen."""
    own = module.__dict__
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in own
    )


def active(layer: Any, held: Any) -> list[str]:
    """The active adapters that `held`, a mapping of the layer's, has."""
    names = layer._active_adapter
    if type(names) is str:
        return [names] if names in held else []
    return [n for n in names if n in held]


def dropout(module: nn.Module) -> float | Why:
    """The probability that PEFT's dropout module applies at the moment."""
    kind = type(module)
    if kind is nn.Identity:
        return 0.0
    if kind is not nn.Dropout or observed(module):
        return Why(f"the dropout is a {kind.__name__} that is not torch's own or has hooks")
    if not module.training or module.p == 0.0:
        return 0.0
    if module.p >= 1.0:
        return Why("the dropout probability is 1")
    return float(module.p)  # type: ignore[arg-type]
