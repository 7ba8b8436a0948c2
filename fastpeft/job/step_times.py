"""The time of a recipe's training step beside that of the frozen model and of PEFT's LoRA, in one interleaved run."""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
from typing import Any

from fastpeft.job import measure
from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT
from fastpeft.job.bench import Bench
from fastpeft.job.loop import train_step, trainee
from fastpeft.job.procedures import without_source
from fastpeft.job.recipes import Entry

AGAIN = "frozen again"


def step_times(bench: Bench, entry: Entry, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, on the batch of the longest texts: `ratio` of the entry's step to the frozen model's (with a head that
    trains), `to_peft` to PEFT's LoRA's, `peft_lora` of that one to frozen, `again` of a second frozen model: what a ratio's noise is."""
    batch = bench.longest()
    settings, plain = bench.settings(entry.method, entry.options, None), bench.settings("lora", {}, None)
    arms = {name: bench.arm(name, plain, 0) for name in (FROZEN, PEFT)}
    arms[AGAIN] = copy.deepcopy(arms[FROZEN])
    if entry.arm == FASTPEFT:
        arms[FASTPEFT] = bench.arm(FASTPEFT, settings, 0)
    trainees = {name: trainee(arm, settings if name == FASTPEFT else plain, total_steps=measure.LONG_RUN) for name, arm in arms.items()}
    for procedure in without_source([p for arm in arms.values() for p in arm.procedures]):
        procedure.source = [batch]
    steps = {name: functools.partial(train_step, t, batch, settings.lr, settings) for name, t in trainees.items()}
    with contextlib.ExitStack() as stack:
        for t in trainees.values():
            t.arm.model.train()
            stack.enter_context(contextlib.nullcontext() if t.runner is None else t.runner)
        seconds = measure.interleaved(steps, rounds=rounds)

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))

    own = AGAIN if entry.arm == FROZEN else entry.arm
    return {"ratio": ratio(own, FROZEN), "to_peft": 1.0 if own == PEFT else ratio(own, PEFT), "peft_lora": ratio(PEFT, FROZEN), "again": ratio(AGAIN, FROZEN), "rounds": rounds}
