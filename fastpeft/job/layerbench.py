"""`fastpeft bench`: one frozen linear, the same under PEFT, and under fastpeft; timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT, copy_start, peft_config, peft_counterpart
from fastpeft.job.measure import bytes_saved, interleaved

ROUNDS = 30


@dataclass(frozen=True)
class Shape:
    """tokens, in_features, out_features of one layer and its input; both in `dtype` on `device`."""

    tokens: int
    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True)
class Timing:
    """seconds: median of one forward and backward.   ratio: median over rounds of its time to the frozen
    layer's.

    saved_bytes: kept for backward, x and the layer's own parameters not counted.
    """

    name: str
    seconds: float
    ratio: float
    saved_bytes: int


class _Holder(nn.Module):
    """One linear under a name, which is what PEFT and fastpeft target."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def layers(shape: Shape, method: str, options: Mapping[str, Any], *, seed: int = 0) -> dict[str, nn.Module]:
    """The three layers on equal weights, PEFT's and fastpeft's adapter on equal values; PEFT's is missing if
    it has none.

    Raises ValueError for a method or option that does not exist or does not fit.
    """
    import fastpeft

    def holder() -> _Holder:
        torch.manual_seed(seed)
        linear = nn.Linear(shape.in_features, shape.out_features, dtype=shape.dtype, device=shape.device)
        return _Holder(linear.requires_grad_(False))

    ours = holder()
    fastpeft.adapt(ours, method, target_modules=["linear"], **options)
    found: dict[str, nn.Module] = {FROZEN: holder()}
    if peft_counterpart(method, options):
        import peft

        # PeftModel asks any config of the wrapped model for these two; a bare module has none
        found[PEFT] = peft.get_peft_model(holder(), peft_config(method, options, ["linear"], []))  # type: ignore[arg-type]
        copy_start(ours, found[PEFT], method)
    return found | {FASTPEFT: ours}


def layer_bench(
    shape: Shape, method: str, options: Mapping[str, Any], *, rounds: int = ROUNDS
) -> list[Timing]:
    """Forward and backward (dx and the adapter's gradients) of the three layers on one x [tokens, in]."""
    x = torch.randn(
        shape.tokens, shape.in_features, dtype=shape.dtype, device=shape.device, requires_grad=True
    )
    dy = torch.randn(shape.tokens, shape.out_features, dtype=shape.dtype, device=shape.device)
    found = layers(shape, method, options)

    def step(layer: nn.Module) -> Callable[[], object]:
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), wanted, dy)

    wait = torch.cuda.synchronize if shape.device.startswith("cuda") else None
    seconds = interleaved({n: step(m) for n, m in found.items()}, rounds=rounds, wait=wait)
    base = seconds[FROZEN]
    return [
        Timing(
            name,
            statistics.median(seconds[name]),
            statistics.median([s / b for s, b in zip(seconds[name], base, strict=True)]),
            bytes_saved(lambda layer=layer: layer(x), [x, *layer.parameters()]),  # type: ignore[misc]
        )
        for name, layer in found.items()
    ]
