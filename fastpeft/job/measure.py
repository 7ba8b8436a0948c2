"""What a training step keeps for its backward, and summaries of times measured step by step."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.train import attach, build_optimizer

# the first steps pay for memory pools, thread start-up and lazily built kernels
WARM_UP_STEPS = 3
# what a schedule is told where only the first steps of a run are measured
LONG_RUN = 1_000_000_000


def bytes_saved(forward: Callable[[], Any], owned: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, those of `owned`
    (parameters, buffers) not.

    A storage counts whole, also where only a view of it is saved: that is what stays allocated. Tensors that
    a Function keeps outside save_for_backward are not seen.
    """
    known = {t.untyped_storage().data_ptr() for t in owned}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            # holding the storage keeps its address from being given to another tensor of the same forward
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    total = sum(s.nbytes() for s in kept.values())
    del result
    return total


def step_bytes(model: Any, batch: dict[str, Tensor], procedures: Sequence[Any] = ()) -> int:
    """bytes_saved by one training forward of the model; the batch itself is not counted.

    procedures: fastpeft.train's, without which the model would not train; what they set when a run begins is set; the events of a step do not
    happen (GaLore's refresh is not counted).
    """
    if procedures:
        own = copy.deepcopy(procedures)
        optimizer = build_optimizer(model, own, torch.optim.SGD, lr=0.0)
        with attach(model, optimizer, own, total_steps=LONG_RUN) as runner, runner.quiet():
            return step_bytes(model, batch)
    training = model.training
    model.train()
    owned = [*model.parameters(), *model.buffers(), *batch.values()]
    found = bytes_saved(lambda: model(**batch).loss, owned)
    model.train(training)
    return found


def after_warm_up(values: Sequence[float], starts: Sequence[int] = (0,)) -> list[float]:
    """The values without the WARM_UP_STEPS that follow each of `starts`; all of them, if none are left.

    starts: indices of the steps that were the first of a process.
    """
    warm = {k for start in starts for k in range(start, start + WARM_UP_STEPS)}
    return [v for k, v in enumerate(values) if k not in warm] or list(values)


def median_after_warm_up(values: Sequence[float], starts: Sequence[int] = (0,)) -> float:
    """Median of `after_warm_up`."""
    return statistics.median(after_warm_up(values, starts))


def median_ratio(values: Sequence[float], base: Sequence[float], starts: Sequence[int] = (0,)) -> float:
    """Median over the steps that both have of value / base, measured within the same step; warm-up left out."""
    return median_after_warm_up([v / b for v, b in zip(values, base, strict=False)], starts)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None as the latter for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int = 0,
    wait: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; within a round the order is drawn anew, so that noise is shared.

    wait: called before each clock reading (torch.cuda.synchronize). WARM_UP_STEPS come first and are not
    returned.
    """
    draw = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(WARM_UP_STEPS + rounds):
        for name in draw.sample(sorted(steps), len(steps)):
            if wait is not None:
                wait()
            start = time.perf_counter()
            steps[name]()
            if wait is not None:
                wait()
            if k >= WARM_UP_STEPS:
                seconds[name].append(time.perf_counter() - start)
    return seconds
