"""PeriodicLoRA's stages: unload the adapter into its past, start it and its optimiser state anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastpeft.method.periodic_lora import PeriodicLoRA
from fastpeft.option_checks import check_finite, check_int
from fastpeft.train.layers import seeded, take_charge
from fastpeft.train.protocol import Context, Procedure
from fastpeft.train.rate import StageRate


class PeriodicLoRASchedule(Procedure):
    """At each stage's end: A and B go to the past, begin anew, and with them their state in the optimiser.

    steps: optimiser steps in a stage; None: a stage is an epoch. A step that a gradient scaler skipped does not count. The number
        of stages is the layers' (adapt(..., stages=4)); the last one goes on to the end of training.
    momentum: the share m of B A that stays in the adapter, [0, 1): W gets (1 - m) B A, B becomes m B and A stays. 0: A is drawn anew.
    rate: factor of the learning rate of a stage's k-th step, from 0 (rate=lambda k: min(1, (k + 1) / 20) warms each stage up); it
        multiplies what the loop or its scheduler has set, for the step only. None leaves that alone.
    seed: of the new A's, which are the same on all ranks.

    Raises ValueError on other arguments.
    """

    def __init__(self, steps: int | None = None, momentum: float = 0.0, *, rate: Callable[[int], float] | None = None, seed: int = 0):
        self.steps = None if steps is None else check_int("PeriodicLoRASchedule", "steps", steps, 1, None, "steps")
        if not 0.0 <= check_finite("PeriodicLoRASchedule", "momentum", momentum) < 1.0:
            raise ValueError(f"PeriodicLoRASchedule: momentum={momentum}; it must be at least 0 and less than 1.")
        self.momentum, self.rate, self.seed = float(momentum), StageRate(rate), seed
        self.began = 0
        self._layers: dict[str, PeriodicLoRA] = {}

    def on_train_begin(self, ctx: Context) -> None:
        self._layers = take_charge(ctx, PeriodicLoRA, "PeriodicLoRASchedule", "periodic_lora")
        ctx.closing.callback(self.rate.put_back, ctx.optimizer)

    def before_step(self, ctx: Context) -> None:
        self.rate.set(ctx.optimizer, ctx.step - self.began)

    def after_step(self, ctx: Context, skipped: bool) -> None:
        self.rate.put_back(ctx.optimizer)

    def on_step_end(self, ctx: Context) -> None:
        if self.steps is not None and ctx.step - self.began == self.steps:
            self._unload(ctx)

    def on_epoch_end(self, ctx: Context) -> None:
        if self.steps is None and ctx.step > self.began:
            self._unload(ctx)

    def _unload(self, ctx: Context) -> None:
        for name, m in self._layers.items():
            if m.unload(self.momentum, seeded(self.seed, int(m.stage), name)):
                self.began = ctx.step
                for p in (m.A, m.B):
                    ctx.optimizer.state.pop(p, None)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "momentum": self.momentum, "seed": self.seed, "began": self.began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wrong = {k: (state.get(k), v) for k, v in self.state_dict().items() if k != "began" and state.get(k) != v}
        if wrong or "began" not in state:
            raise ValueError(f"PeriodicLoRASchedule: the state is of another schedule (state, here): {wrong or 'no began'}.")
        self.began = int(state["began"])
