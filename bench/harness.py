"""One interleaved run: error against fp64 first, then every arm's time beside the frozen layer's in the same
round.

The clock is fastpeft.job.measure. *Overhead* of an arm: its time minus the frozen layer's in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import arms as layers
from bench.arms import AGAIN, FASTPEFT, FROZEN, Arm, Variant
from bench.machine import name_of
from bench.oracle import check
from fastpeft.job.layerbench import Shape
from fastpeft.job.measure import bytes_saved, interleaved

__all__ = ["AGAIN", "FASTPEFT", "FROZEN", "compare", "inputs", "quartiles", "rivals", "step"]


def inputs(shape: Shape, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x [tokens, in], which needs its gradient, and dy [tokens, out]; standard normal."""
    torch.manual_seed(seed)
    kw: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
    x = torch.randn(shape.tokens, shape.in_features, **kw).requires_grad_()
    return x, torch.randn(shape.tokens, shape.out_features, **kw)


def step(arm: Arm, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Forward and backward: dx and the adapter's gradients."""
    wanted = [x, *arm.parameters.values()]
    return lambda: torch.autograd.grad(arm.forward(x), wanted, dy)


def saved(arm: Arm, x: Tensor) -> int:
    """Bytes kept for backward beyond x and the layer's own tensors."""
    with arm.using():
        return bytes_saved(lambda: arm.forward(x), [x, *arm.layer.parameters(), *arm.layer.buffers()])


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values


def rivals(arm: Arm, found: dict[str, Arm]) -> list[str]:
    """The arms that `arm` is held against: PEFT's of its method; of melora, which PEFT lacks, every lora."""
    if arm.library != "fastpeft":
        return []
    method = "lora" if arm.method == "melora" else arm.method
    return [a.name for a in found.values() if a is not arm and a.method == method]


def compare(
    name: str, shape: Shape, variants: list[Variant], *, rounds: int, dropout: float = 0.0
) -> Iterator[dict[str, Any]]:
    """One row per arm; an arm that is not right is reported and not timed.

    ratio, overhead_ms: median over the rounds, with quartiles under iqr and overhead_iqr_ms. against: for
    each rival, the quotient of the two overheads, and the quartiles of the quotient of the two times in the
    same round.
    """
    x, dy = inputs(shape)
    found = layers.arms(shape, variants)
    known: dict[Any, Any] = {}
    checked = {arm.name: check(arm, x, dy, known) for arm in found.values()}
    timed = {n: step(arm, x, dy) for n, arm in found.items() if not checked[n][1] or n == FROZEN}
    seconds = interleaved(timed, rounds=rounds)
    for arm in found.values():
        row: dict[str, Any] = {
            "bench": name,
            "arm": arm.name,
            "library": arm.library,
            "method": arm.method,
            "adapter_dtype": arm.adapter_dtype,
            "device": shape.device,
            "shape": [shape.tokens, shape.in_features, shape.out_features],
            "dtype": name_of(shape.dtype),
            "dropout": dropout,
            "error": checked[arm.name][0],
            "wrong": checked[arm.name][1],
            "rounds": rounds,
            "saved_bytes": saved(arm, x),
        }
        if arm.name in seconds:
            row |= _times(arm, found, seconds)
        yield row


def _times(arm: Arm, found: dict[str, Arm], seconds: dict[str, list[float]]) -> dict[str, Any]:
    own, base = seconds[arm.name], seconds[FROZEN]
    ratio = quartiles([s / b for s, b in zip(own, base, strict=True)])
    over = quartiles([1e3 * (s - b) for s, b in zip(own, base, strict=True)])
    row: dict[str, Any] = {
        "ms": 1e3 * statistics.median(own),
        "ratio": ratio[1],
        "iqr": [ratio[0], ratio[2]],
        "overhead_ms": over[1],
        "overhead_iqr_ms": [over[0], over[2]],
    }
    against = {}
    for rival in rivals(arm, found):
        if rival in seconds:
            theirs = statistics.median([1e3 * (s - b) for s, b in zip(seconds[rival], base, strict=True)])
            times = quartiles([s / t for s, t in zip(own, seconds[rival], strict=True)])
            against[rival] = {"overhead": over[1] / theirs if theirs > 0 else None, "time": times}
    return row | ({"against": against} if against else {})
