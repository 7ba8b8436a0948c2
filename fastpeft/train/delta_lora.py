"""Delta-LoRA's start, and its literal form, which writes W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastpeft.adapter import weight_of
from fastpeft.method.delta_lora import DeltaLoRA
from fastpeft.option_checks import check_int
from fastpeft.train.layers import inner, take_charge
from fastpeft.train.protocol import Context, Procedure


class DeltaLoRASchedule(Procedure):
    """From step start + 1 on, W follows each change of B A (steps are those that the optimiser took, from 0).

    start: the paper's K; K + 1 steps of LoRA come first. Layers whose updates began in an earlier run go on with them.
    A step that a gradient scaler skips changes nothing. Raises ValueError on other arguments.
    """

    def __init__(self, start: int = 500):
        self.start = check_int("DeltaLoRASchedule", "start", start, 0, None, "start")
        self._layers: dict[str, DeltaLoRA] = {}
        self._old: dict[str, tuple[Tensor, Tensor]] = {}
        self._begun = False

    def on_train_begin(self, ctx: Context) -> None:
        self._layers = take_charge(ctx, DeltaLoRA, "DeltaLoRASchedule", "delta_lora")
        self._begun = False
        ctx.closing.callback(self._release)

    def _release(self) -> None:
        self._layers, self._old = {}, {}

    def before_step(self, ctx: Context) -> None:
        if ctx.step <= self.start:
            return
        late = [] if self._begun else [n for n, m in self._layers.items() if not (m.writes_base or m.begun)]
        if late and ctx.step > self.start + 1:
            raise RuntimeError(
                f"DeltaLoRASchedule: W should follow since step {self.start + 1}, and {late[0]!r} has no factors of then at step "
                f"{ctx.step}; read the model's state of that step before going on."
            )
        needed = {n: m for n, m in self._layers.items() if m.writes_base or n in late}
        self._old = {n: (m.A.detach().clone(), m.B.detach().clone()) for n, m in needed.items()}

    def after_step(self, ctx: Context, skipped: bool) -> None:
        if not skipped and ctx.step > self.start:
            root = inner(ctx.model)
            for name, (A, B) in self._old.items():
                m = self._layers[name]
                if m.writes_base:
                    m.follow(weight_of(root.get_submodule(name)).detach(), A, B)
                else:
                    m.begin(A, B)
            self._begun = True
        self._old = {}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("start") != self.start:
            raise ValueError(f"DeltaLoRASchedule: the state is of start={state.get('start')!r}, here it is {self.start}.")
