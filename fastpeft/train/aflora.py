"""AFLoRA's freezing: the factors A and B of all layers are frozen one by one, those first whose gradient is small and steady.

Over each window of deltaT steps I = mean |dL/dp|; at its end I_bar <- beta1 I_bar + (1 - beta1) I and
U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar|. A matrix is scored by mean(I_bar * U_bar). The share that still trains after step t
falls as (1 - (t - ti) / (T - ti - tf))^3.

Paper: arXiv 2403.13269.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.method.aflora import AFLoRA
from fastpeft.option_checks import check_finite, check_int
from fastpeft.train.layers import take_charge
from fastpeft.train.protocol import Context, Procedure

THRESHOLDS = ("matrices", "elementwise")


class AFLoRAFreezing(Procedure):
    """Freezes the A and B of aflora layers that train, for good: their grad is None, their state in the optimiser goes.

    start: ti, up to which all train; None: the end of the first epoch.   tail: tf, the steps at the end in which none does. An int is
        a number of steps, a float a share of all. A first epoch that reaches into the tail goes on to its end.
    total_steps: T; None: what attach was told.
    deltaT: steps in a window, and between two choices; in the tail, t > T - tf, all that is left is frozen at once.
    threshold: "matrices": as in the paper, the lowest floor((1 - share) n) of all n matrices are frozen by now; "elementwise": as in the
        authors' code, those whose score is below the floor((1 - share) m)-th smallest entry of I_bar * U_bar of the matrices that
        still train, m entries, which with heavy-tailed scores freezes later.
    scaler: the gradient scaler of fp16 training, by whose scale gradients are divided; without, a change of scale changes scores.

    Scores see each step's whole gradient before clipping, as the authors' code does; a step that is skipped does not count. The vectors d
    and db, and all else, train to the end. Under DDP it needs find_unused_parameters=True. Raises ValueError on other arguments, a
    model in which no A or B trains, and scores that are not finite.
    """

    PROGRESS: ClassVar = "freezing"

    def __init__(
        self,
        start: int | float | None = None,
        tail: int | float = 0.7,
        *,
        total_steps: int | None = None,
        deltaT: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.95,
        threshold: str = "matrices",
        scaler: Any = None,
    ):
        if total_steps is not None:
            check_int("AFLoRAFreezing", "total_steps", total_steps, 1, None, "total_steps")
        for name, value in (("start", start), ("tail", tail)):
            if value is not None and (check_finite("AFLoRAFreezing", name, value) < 0 or (isinstance(value, float) and value >= 1)):
                raise ValueError(f"AFLoRAFreezing: {name}={value}; it must be an int of at least 0, or a share of all steps below 1.")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 < check_finite("AFLoRAFreezing", name, beta) < 1.0:
                raise ValueError(f"AFLoRAFreezing: {name}={beta}; it must be more than 0 and less than 1.")
        if threshold not in THRESHOLDS:
            raise ValueError(f"AFLoRAFreezing: threshold={threshold!r}; it must be one of {', '.join(THRESHOLDS)}.")
        self.start, self.tail, self.total_steps, self.scaler = start, tail, total_steps, scaler
        self.deltaT = check_int("AFLoRAFreezing", "deltaT", deltaT, 1, None, "deltaT")
        self.beta1, self.beta2, self.threshold = float(beta1), float(beta2), threshold
        self._matrices: dict[str, nn.Parameter] = {}  # all n, by name: up.A
        self._frozen: set[str] = set()
        self._epoch: int | None = None  # steps in the first epoch, once it is over
        self._total, self._resumed = 0, 0
        self._now: dict[str, Tensor] = {}  # |gradient| of this step
        self._window: dict[str, Tensor] = {}  # I of the window
        self._mean: dict[str, Tensor] = {}
        self._deviation: dict[str, Tensor] = {}
        self._folded = 0  # the step at which the last window was folded

    def on_train_begin(self, ctx: Context) -> None:
        total = ctx.total_steps if self.total_steps is None else self.total_steps
        if total is None:
            raise ValueError(
                "AFLoRAFreezing: the steps of the whole run are not known; give total_steps, here or to fastpeft.train.attach."
            )
        self._total = total
        start = None if self.start is None else self._steps(self.start)
        if self._end < 0 or (start is not None and start >= self._end):
            raise ValueError(
                f"AFLoRAFreezing: start={self.start} and tail={self.tail} leave none of {total} steps to freeze matrices in; start must "
                "be less than total_steps - tail."
            )
        layers = take_charge(ctx, AFLoRA, "AFLoRAFreezing", "aflora")
        every = {f"{n}.{leaf}": p for n, m in layers.items() for leaf, p in (("A", m.A), ("B", m.B))}
        # what is frozen in a state that was loaded belongs to the n, whatever its flag is
        self._matrices = {n: p for n, p in every.items() if p.requires_grad or n in self._frozen}
        if not self._matrices:
            raise ValueError(
                "AFLoRAFreezing: no A or B of an aflora layer trains, so there is nothing to freeze (layers whose in == out need "
                "train_square=True)."
            )
        ctx.closing.callback(self._release)
        self._fit_state(ctx)

    def _release(self) -> None:
        self._matrices, self._now = {}, {}

    def _steps(self, value: int | float) -> int:
        return int(value * self._total) if isinstance(value, float) else value

    @property
    def _end(self) -> int:
        """T - tf."""
        return self._total - self._steps(self.tail)

    @property
    def frozen(self) -> list[str]:
        """Names of the matrices that are frozen, in the layers' order while attached."""
        return [n for n in self._matrices if n in self._frozen] or sorted(self._frozen)

    def progress(self) -> dict[str, int]:
        return {n: int(n not in self._frozen) for n in self._matrices}

    def remaining(self, step: int) -> float:
        """The share of the matrices that trains after this step, while attached."""
        start = self._epoch if self.start is None else self._steps(self.start)
        if start is None or step <= start:
            return 1.0
        return 0.0 if step >= self._end else (1 - (step - start) / (self._end - start)) ** 3

    @torch.no_grad()
    def after_backward(self, ctx: Context, micro: int, is_last: bool) -> None:
        # the last micro-batch's are what counts; a step at an epoch's end may have fewer than the loop has said
        grads = {n: p.grad for n, p in self._matrices.items() if n not in self._frozen and p.grad is not None}
        self._now = {n: g.abs().to(torch.promote_types(g.dtype, torch.float32)) for n, g in grads.items()}
        if self.scaler is not None:
            scale = float(self.scaler.get_scale())
            for t in self._now.values():
                t.div_(scale)

    @torch.no_grad()
    def before_step(self, ctx: Context) -> None:
        t = ctx.step
        if t % self.deltaT == 0 and t > self._folded:
            self._fold()
            self._folded = t
        share = self.remaining(t)
        if share == 1.0 or (t % self.deltaT and t <= self._end):
            return
        for name in self._choose(share, t > self._end):
            p = self._matrices[name]
            p.requires_grad_(False).grad = None
            ctx.optimizer.state.pop(p, None)
            self._frozen.add(name)
            for tensors in (self._now, self._window, self._mean, self._deviation):
                tensors.pop(name, None)

    def _fold(self) -> None:
        """The window that is over goes into the averages."""
        for name, I in self._window.items():
            if name not in self._mean:
                self._mean[name], self._deviation[name] = torch.zeros_like(I), torch.zeros_like(I)
            mean = self._mean[name].mul_(self.beta1).add_(I, alpha=1 - self.beta1)
            self._deviation[name].mul_(self.beta2).add_((I - mean).abs_(), alpha=1 - self.beta2)
        self._window = {}

    def _choose(self, share: float, all_of_them: bool) -> list[str]:
        left = [n for n in self._matrices if n not in self._frozen]
        if all_of_them or not left:
            return left
        entries = {n: self._mean[n] * self._deviation[n] if n in self._mean else torch.zeros_like(self._matrices[n]) for n in left}
        scores = {n: float(e.mean()) for n, e in entries.items()}
        if not torch.tensor(list(scores.values())).isfinite().all():
            raise ValueError("AFLoRAFreezing: the scores are not finite, so no matrix can be chosen; look for NaN or overflow in the loss.")
        if self.threshold == "matrices":
            more = int((1 - share) * len(self._matrices)) - len(self._frozen)
            return sorted(left, key=lambda n: scores[n])[: max(0, more)]
        every = torch.cat([e.flatten().to(entries[left[0]].device) for e in entries.values()])
        k = int((1 - share) * len(every))
        limit = float(every.kthvalue(k).values) if k else -1.0
        return [n for n in left if scores[n] < limit]

    def after_step(self, ctx: Context, skipped: bool) -> None:
        done, self._now = self._now, {}
        if skipped:
            return
        local = ctx.step % self.deltaT
        for name, p in self._matrices.items():
            if name not in self._frozen:
                # one without a gradient has one of zeros
                now = done[name] if name in done else torch.zeros_like(p)
                self._window[name] = self._window[name].mul_(local).add_(now).div_(local + 1) if name in self._window else now / (local + 1)

    def on_epoch_end(self, ctx: Context) -> None:
        if self._epoch is None and ctx.step:
            self._epoch = ctx.step

    def state_dict(self) -> dict[str, Any]:
        tensors = {"window": self._window, "mean": self._mean, "deviation": self._deviation}
        copies = {key: {n: t.clone() for n, t in found.items()} for key, found in tensors.items()}
        place = {"total": self._total, "epoch": self._epoch, "folded": self._folded, "frozen": sorted(self._frozen)}
        return {"settings": self._settings(), **place, **copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own, came = self._settings(), state.get("settings", {})
        wrong = {k: (came.get(k), v) for k, v in own.items() if came.get(k) != v}
        if wrong or not {"total", "epoch", "folded", "frozen", "window", "mean", "deviation"} <= state.keys():
            raise ValueError(f"AFLoRAFreezing: the state is of another freezing (state, here): {wrong or 'parts are missing'}.")
        self._window, self._mean, self._deviation = ({n: t.clone() for n, t in state[k].items()} for k in ("window", "mean", "deviation"))
        self._frozen, self._epoch, self._folded = set(state["frozen"]), state["epoch"], int(state["folded"])
        self._resumed = int(state["total"])

    def _fit_state(self, ctx: Context) -> None:
        """The state's tensors where the layers are, its frozen matrices frozen; ValueError if they are another model's or run's."""
        if self._resumed not in (0, self._total):
            raise ValueError(f"AFLoRAFreezing: the state is of a run of {self._resumed} steps, and this one has {self._total}.")
        for tensors in (self._window, self._mean, self._deviation):
            fits = {n for n in tensors if n in self._matrices and tensors[n].shape == self._matrices[n].shape}
            if wrong := sorted((tensors.keys() - fits) | (self._frozen - self._matrices.keys())):
                raise ValueError(f"AFLoRAFreezing: the state is of other layers than the model's: {', '.join(wrong[:4])}.")
            tensors.update({n: t.to(self._matrices[n].device) for n, t in tensors.items()})
        for name in self._frozen:
            self._matrices[name].requires_grad_(False).grad = None

    def _settings(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("start", "tail", "deltaT", "beta1", "beta2", "threshold")}
