"""The training loop that every arm shares: AdamW, linear warm-up and decay, clipped gradients.

The arms of a seed are trained together: each batch goes to every arm, in an order drawn anew, so that a noisy
machine slows all of them alike and step times can be compared within a step. All that is random is a function
of (seed, epoch, step), and the learning rate of the step; with the trainees' own state (fastpeft.job.snapshot) a
stopped run is taken up at any step.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpeft.job.arms import FASTPEFT, Arm
from fastpeft.job.data import Examples
from fastpeft.job.early_stopping import EarlyStopping
from fastpeft.job.errors import JobError
from fastpeft.job.evaluate import Score, evaluate
from fastpeft.job.history import History
from fastpeft.job.procedures import hold_out, without_source
from fastpeft.job.settings import Settings
from fastpeft.job.weights import copy_weights, set_weights
from fastpeft.train import attach


@dataclass
class Trainee:
    """One arm in training. losses, seconds: per step.   scores: before training, then after each epoch.

    starts: the steps that were the first of a process; the run's own, then one per resume.
    stopping: None without early stopping, and then so is `best`, a copy of the best epoch's weights.
    runner: of the arm's procedures, if it has some; `train` enters it.
    histories: what they count over the steps, by PROGRESS.   aside: examples that a procedure had for itself, by its name.
    """

    arm: Arm
    optimizer: torch.optim.Optimizer | None
    runner: Any = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    stopping: EarlyStopping | None = None
    best: dict[str, Tensor] | None = None
    histories: dict[str, History] = field(default_factory=dict)
    aside: dict[str, int] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        return max(0, len(self.scores) - 1)

    @property
    def stopped(self) -> bool:
        done = self.runner is not None and self.runner.done  # its procedures have reached what the run was for
        return done or (self.stopping is not None and self.stopping.stopped)

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights are the result so far: the best one with early stopping, else the last."""
        return self.epochs if self.stopping is None else self.stopping.best_epoch

    def note_progress(self) -> None:
        """Take down what the procedures count now; while the runner is entered, between two steps."""
        counts: dict[str, dict[str, int]] = {}
        for p in self.arm.procedures if self.runner is not None else ():
            if p.PROGRESS is not None:
                counts.setdefault(p.PROGRESS, {}).update(p.progress())
        for kind, found in counts.items():
            self.histories.setdefault(kind, History()).record(len(self.losses), found)

    def __str__(self) -> str:
        note = f" (stopped, best epoch {self.kept_epoch})" if self.stopped else ""
        return f"{self.arm.title} {self.scores[-1]}{note}"


def trainee(arm: Arm, settings: Settings, *, total_steps: int | None = None) -> Trainee:
    """In fastpeft's arm the adapter's parameters are a group of their own where their learning rate is another one.

    total_steps: of the run, for the arm's procedures; `train` knows them itself.
    """
    live = [(n, p) for n, p in arm.model.named_parameters() if p.requires_grad]
    share = settings.own_lr / settings.lr if arm.name == FASTPEFT else 1.0
    adapter = [p for n, p in live if share != 1.0 and is_own(n)]
    rest = [p for n, p in live if share == 1.0 or not is_own(n)]
    groups = [{"params": p, "lr": settings.lr * s} for p, s in ((rest, 1.0), (adapter, share)) if p]
    stopping = None if settings.patience is None else EarlyStopping(settings.patience, settings.min_delta)
    if not groups:
        return Trainee(arm, None, stopping=stopping)
    for procedure in arm.procedures:
        groups = [g for g in procedure.param_groups(arm.model, groups) if g["params"]]
    for group in groups:
        # a group's own rate, a procedure's too, is that of the peak, and rises and falls as all do
        group["share"] = group.get("lr", settings.lr) / settings.lr
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    runner = attach(arm.model, optimizer, arm.procedures, total_steps=total_steps) if arm.procedures else None
    return Trainee(arm, optimizer, runner, stopping=stopping)


def is_own(name: str) -> bool:
    """Whether the parameter of that name is an adapter's."""
    return ".adapter." in name or "adapter_shared." in name


def lr_at(step: int, total: int, settings: Settings) -> float:
    """Learning rate of a step: linear up to settings.lr over the first share `warmup` of all steps, then
    linear to 0."""
    rising = max(1, round(settings.warmup * total))
    share = (step + 1) / rising if step < rising else (total - step) / max(1, total - rising)
    return settings.lr * share


def train_step(t: Trainee, batch: dict[str, Tensor], lr: float, settings: Settings) -> float:
    """One optimiser step on a batch; returns the loss. An arm without parameters to train only runs forward.

    Within the trainee's runner, if it has one.
    Raises JobError (code 1), before any parameter moves, if the loss is not finite.
    """
    loss = t.arm.model(**t.arm.inputs(batch)).loss
    value = float(loss.detach())
    if not math.isfinite(value):
        raise JobError(
            f"finetune: the loss of {t.arm.title} is {value} at step {len(t.losses) + 1}; training stops. "
            f"Lower --lr (it is {settings.lr:g}), or look for broken rows in the data.",
            code=1,
        )
    if t.optimizer is None:
        return value
    loss.backward()
    for group in t.optimizer.param_groups:
        group["lr"] = lr * group["share"]
    # one norm over all groups: how a procedure groups parameters is no reason to clip them otherwise
    torch.nn.utils.clip_grad_norm_([p for g in t.optimizer.param_groups for p in g["params"]], settings.clip)
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    if t.runner is not None:
        t.runner.step_end()
    return value


def train(
    trainees: list[Trainee],
    data: Examples,
    held: Examples,
    settings: Settings,
    *,
    seed: int,
    validation: Examples | None = None,
    after_step: Callable[[int], None] = lambda steps: None,
    after_epoch: Callable[[int], None] = lambda epochs: None,
) -> None:
    """Train all arms of one seed for settings.epochs, from wherever the trainees are: at the start, or resumed.

    What a procedure wants for itself (fastpeft.job.procedures.hold_out) no arm trains on. An arm that stops early takes no further step; with early stopping every arm ends with its best epoch's weights.
    after_step(steps done) is called within an epoch, after_epoch(epochs done) after its evaluation.
    """
    wanting = [(t, p) for t in trainees for p in without_source(t.arm.procedures)]
    data = hold_out([p for _, p in wanting], data, settings.batch_size, seed)
    for t, p in wanting:
        t.aside[type(p).__name__] = len(p.source.examples)
    per_epoch = len(data.order(settings.batch_size, seed=seed, epoch=0))
    with contextlib.ExitStack() as stack:
        for t in trainees:
            if t.runner is not None:
                t.runner.ctx.total_steps = per_epoch * settings.epochs
                try:
                    stack.enter_context(t.runner)
                except ValueError as e:  # a schedule that does not fit the number of steps, for one
                    raise JobError(f"finetune: {e}") from None
        _train(trainees, data, held, settings, seed, per_epoch, validation, after_step, after_epoch)
    for t in trainees:
        if t.best is not None:
            set_weights(t.arm.model, t.best)


def _train(
    trainees: list[Trainee],
    data: Examples,
    held: Examples,
    settings: Settings,
    seed: int,
    per_epoch: int,
    validation: Examples | None,
    after_step: Callable[[int], None],
    after_epoch: Callable[[int], None],
) -> None:
    from tqdm import tqdm

    for t in trainees:
        t.note_progress()
        if not t.scores:
            t.scores.append(evaluate(t.arm.model, held, settings))
    total, done = per_epoch * settings.epochs, max(len(t.losses) for t in trainees)
    with tqdm(
        total=total, initial=done, desc=f"seed {seed}", unit="step", disable=not sys.stderr.isatty()
    ) as bar:
        for epoch in range(max(t.epochs for t in trainees), settings.epochs):
            # a procedure may be done within an epoch: its arm still has that epoch's end, a resumed one too
            active = [t for t in trainees if not t.stopped or len(t.losses) > epoch * per_epoch]
            if not active:
                break
            order = data.order(settings.batch_size, seed=seed, epoch=epoch)
            for step in range(max(done, epoch * per_epoch), (epoch + 1) * per_epoch):
                _one_batch(active, data.batch(order[step % per_epoch]), step, total, settings, seed)
                bar.update()
                if (step + 1) % per_epoch:
                    after_step(step + 1)
            for t in active:
                _end_epoch(t, held, validation, settings)
            scores = ", ".join(map(str, trainees))
            bar.set_postfix_str(scores)
            if bar.disable:
                print(f"seed {seed}, epoch {epoch + 1} of {settings.epochs}: {scores}", flush=True)
            after_epoch(epoch + 1)


def _end_epoch(t: Trainee, held: Examples, validation: Examples | None, settings: Settings) -> None:
    """Evaluate; with early stopping keep the weights if they are the best so far."""
    if t.runner is not None:
        t.runner.epoch_end()
    t.note_progress()
    t.scores.append(evaluate(t.arm.model, held, settings))
    if t.stopping is not None:
        assert validation is not None
        if t.stopping.update(evaluate(t.arm.model, validation, settings).loss):
            t.best = copy_weights(t.arm.model)


def _reseed(seed: int, step: int) -> None:
    """Every arm draws the model's own dropout from the same state."""
    torch.manual_seed(seed * 1_000_003 + step)


def _one_batch(
    trainees: list[Trainee], batch: dict[str, Tensor], step: int, total: int, settings: Settings, seed: int
) -> None:
    device = settings.torch_device
    batch = {k: v.to(device) for k, v in batch.items()}
    order = [t for t in trainees if not t.stopped]
    random.Random(f"{seed} {step}").shuffle(order)
    for t in order:
        t.arm.model.train()
        _reseed(seed, step)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = train_step(t, batch, lr_at(step, total, settings), settings)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        t.seconds.append(time.perf_counter() - start)
        t.losses.append(loss)
        t.note_progress()
