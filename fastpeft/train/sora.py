"""SoRA's gates: a proximal step after each of the optimiser's, g <- sign(g) max(|g| - xi, 0), and the thresholds xi in turn.

Paper: arXiv 2311.11696.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.method.sora import SoRA, soft_threshold
from fastpeft.option_checks import check_finite, check_int
from fastpeft.train.layers import count_each, parts_of, take_charge
from fastpeft.train.optimizer import split_each
from fastpeft.train.protocol import Context, Procedure
from fastpeft.train.rate import StageRate

SPACINGS = ("linear", "log_linear", "exp_linear")


def thresholds(spacing: str, first: float, last: float, count: int) -> list[float]:
    """`count` thresholds from first to last: evenly spaced ("linear"), in exp(xi) ("log_linear"), or in log(xi) ("exp_linear").

    ValueError for other names, and for exp_linear from 0, whose logarithm does not exist.
    """
    low, high = (check_finite("sora.thresholds", name, value) for name, value in (("first", first), ("last", last)))
    check_int("sora.thresholds", "count", count, 1, None, "count")
    if spacing not in SPACINGS or not 0 <= low <= high:
        raise ValueError(
            f"sora.thresholds: {spacing!r} from {first} to {last}; spacing must be one of {', '.join(SPACINGS)}, and 0 <= first <= last."
        )
    if spacing == "exp_linear" and low == 0:
        raise ValueError("sora.thresholds: 'exp_linear' from 0, whose logarithm does not exist; begin above 0.")
    there, back = {"linear": (float, float), "log_linear": (math.exp, math.log), "exp_linear": (math.log, math.exp)}[spacing]
    a, b = there(low), there(high)
    inner = [back(a + (b - a) * k / (count - 1)) for k in range(1, count - 1)]
    return [low, *inner, high][:count] if count > 1 else [low]


class SoRASchedule(Procedure):
    """Thresholds the gates of every sora layer after each step; with a list of thresholds, one stage after the other.

    xi: the threshold; or an increasing list of them, one per stage (the paper's Algorithm 1, fastpeft.train.sora.thresholds):
        training goes on from one stage to the next, and is over after the last (Runner.done).
    epochs, first: epochs in a stage, and in the first one, which is to converge (None: as the others).   steps: optimiser steps in
        a stage instead, `first` counts them too. Of no meaning with one threshold.
    l1: the loss gets l1 times the mean over all gates of |g|; the loss must be the model's own output. The authors' code has it
        beside the threshold (1e-3, or 10 in the script without a schedule), the paper does not.
    times_lr: the threshold is xi times the gates' learning rate: the paper's eta lambda, of the authors' second optimiser file;
        False: xi itself, as in the one that their scripts run.
    compat_official: their operator in place of the proximal one (fastpeft.method.sora.soft_threshold).
    rate: factor of the learning rate of a stage's k-th step, from 0; it multiplies what the loop or its scheduler has set, for the
        step only. A schedule that falls to zero within the first stage would leave the later ones with thresholds alone: let the
        loop's span all stages, or stay constant, and say here how it falls in each.

    The gates are a group of the optimiser (fastpeft.train.build_optimizer) with the settings of the group that they come from, but
    no weight decay: with AdamW that is the AdamW of their own that the authors give them, and its state is saved with the rest.
    A gate at zero has a gradient and may open again; merge and export_lora drop the ranks whose gate is zero when they are called.
    Raises ValueError on other arguments, on gates in 16 bits (a threshold of 1e-4 would be lost), and on gates that are not in the
    optimiser, or in a group with weight decay.
    """

    PROGRESS: ClassVar = "ranks"

    def __init__(
        self,
        xi: float | Sequence[float] = 3e-4,
        *,
        epochs: int = 15,
        steps: int | None = None,
        first: int | None = None,
        l1: float = 0.0,
        times_lr: bool = False,
        compat_official: bool = False,
        rate: Callable[[int], float] | None = None,
    ):
        listed = [xi] if isinstance(xi, (int, float)) else list(xi)
        self.xi = [check_finite("SoRASchedule", "xi", value) for value in listed]
        if not self.xi or self.xi[0] < 0 or any(a >= b for a, b in zip(self.xi, self.xi[1:], strict=False)):
            raise ValueError(f"SoRASchedule: xi={xi}; it must be at least 0, and a list of several must increase.")
        if check_finite("SoRASchedule", "l1", l1) < 0:
            raise ValueError(f"SoRASchedule: l1={l1}; it must be at least 0.")
        for name, value in (("epochs", epochs), ("steps", steps), ("first", first)):
            if value is not None:
                check_int("SoRASchedule", name, value, 1, None, name)
        self.epochs, self.steps, self.first = epochs, steps, first
        self.l1, self.times_lr, self.compat_official, self.rate = float(l1), times_lr, compat_official, StageRate(rate)
        self.stage = self._began = self._count = 0  # the step that the stage began at, its epochs or steps so far
        self._layers: dict[str, SoRA] = {}

    @property
    def done(self) -> bool:
        return self.stage == len(self.xi)

    @property
    def threshold(self) -> float:
        """xi of the stage; after the last, its."""
        return self.xi[min(self.stage, len(self.xi) - 1)]

    @property
    def ranks(self) -> dict[str, int]:
        """Open gates by layer, while attached."""
        return count_each({n: m.g for n, m in self._layers.items()})

    def progress(self) -> dict[str, int]:
        return self.ranks

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return split_each(groups, [m.g for m in parts_of(model, SoRA).values()], weight_decay=0.0)

    def on_train_begin(self, ctx: Context) -> None:
        layers = take_charge(ctx, SoRA, "SoRASchedule", "sora")
        groups = self._groups(ctx)
        for name, m in layers.items():
            if torch.finfo(m.g.dtype).bits < 32:
                raise ValueError(f"SoRASchedule: the gate of {name!r} is {m.g.dtype}, in which a small threshold is lost; keep adapters in fp32.")
            if m.g not in groups or groups[m.g].get("weight_decay", 0):
                what = "is in a group with weight decay" if m.g in groups else "is not in the optimiser"
                raise ValueError(
                    f"SoRASchedule: the gate of {name!r} {what}; make it with fastpeft.train.build_optimizer(model, procedures, ...)."
                )
        self._layers = layers
        ctx.closing.callback(self._release, ctx)

    def _release(self, ctx: Context) -> None:
        self.rate.put_back(ctx.optimizer)
        self._layers = {}

    def _groups(self, ctx: Context) -> dict[Tensor, dict[str, Any]]:
        return {p: g for g in ctx.optimizer.param_groups for p in g["params"]}

    def extra_loss(self, ctx: Context) -> Tensor | None:
        if not self.l1:
            return None
        gates = [m.g for m in self._layers.values()]
        return self.l1 * torch.cat([g.to(gates[0].device) for g in gates]).abs().mean()

    def before_step(self, ctx: Context) -> None:
        self.rate.set(ctx.optimizer, ctx.step - self._began)

    @torch.no_grad()
    def after_step(self, ctx: Context, skipped: bool) -> None:
        if not skipped and self.threshold:
            groups = self._groups(ctx) if self.times_lr else {}
            for m in self._layers.values():
                eta = float(groups[m.g]["lr"]) if self.times_lr else 1.0
                m.g.copy_(soft_threshold(m.g, eta * self.threshold, compat_official=self.compat_official))
        self.rate.put_back(ctx.optimizer)

    def on_step_end(self, ctx: Context) -> None:
        # a step that was skipped is none
        if self.steps is not None and ctx.step - self._began > self._count:
            self._counted(ctx, self.steps)

    def on_epoch_end(self, ctx: Context) -> None:
        if self.steps is None:
            self._counted(ctx, self.epochs)

    def _counted(self, ctx: Context, length: int) -> None:
        """One more epoch or step of the stage; its last begins the next."""
        self._count += 1
        whole = self.first if self.stage == 0 and self.first is not None else length
        if len(self.xi) > 1 and not self.done and self._count == whole:
            self.stage, self._began, self._count = self.stage + 1, ctx.step, 0

    def state_dict(self) -> dict[str, Any]:
        return self._settings() | {"stage": self.stage, "began": self._began, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wrong = {k: (state.get(k), v) for k, v in self._settings().items() if state.get(k) != v}
        if wrong or not {"stage", "began", "count"} <= state.keys():
            raise ValueError(f"SoRASchedule: the state is of another schedule (state, here): {wrong or 'parts are missing'}.")
        self.stage, self._began, self._count = (int(state[k]) for k in ("stage", "began", "count"))

    def _settings(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("xi", "epochs", "steps", "first", "l1", "times_lr", "compat_official")}
