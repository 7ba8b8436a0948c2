"""The training loop that every arm shares: AdamW, linear warm-up and decay, clipped gradients.

The arms of a seed are trained together: each batch goes to every arm, in an order drawn anew, so that a noisy
machine slows all of them alike and step times can be compared within a step. All that is random is a function
of (seed, epoch, step), and the learning rate of the step, so a stopped run can be taken up at any step.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpeft.job.arms import Arm
from fastpeft.job.data import Examples
from fastpeft.job.errors import JobError
from fastpeft.job.evaluate import Score, evaluate
from fastpeft.job.settings import Settings


@dataclass
class Trainee:
    """One arm in training. losses, seconds: per step.   scores: before training, then after each epoch."""

    arm: Arm
    optimizer: torch.optim.Optimizer | None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


def trainee(arm: Arm, settings: Settings) -> Trainee:
    parameters = [p for p in arm.model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        if parameters
        else None
    )
    return Trainee(arm, optimizer)


def lr_at(step: int, total: int, settings: Settings) -> float:
    """Learning rate of a step: linear up to settings.lr over the first share `warmup` of all steps, then
    linear to 0."""
    rising = max(1, round(settings.warmup * total))
    share = (step + 1) / rising if step < rising else (total - step) / max(1, total - rising)
    return settings.lr * share


def train_step(t: Trainee, batch: dict[str, Tensor], lr: float, settings: Settings) -> float:
    """One optimiser step on a batch; returns the loss. An arm without parameters to train only runs forward.

    Raises JobError (code 1), before any parameter moves, if the loss is not finite.
    """
    loss = t.arm.model(**batch).loss
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
        group["lr"] = lr
        torch.nn.utils.clip_grad_norm_(group["params"], settings.clip)
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    return value


def train(
    trainees: list[Trainee],
    data: Examples,
    held: Examples,
    settings: Settings,
    *,
    seed: int,
    after_epoch: Callable[[int], None],
) -> None:
    """Train all arms of one seed for settings.epochs; after_epoch(number of epochs done) is called after each
    evaluation."""
    from tqdm import tqdm

    for t in trainees:
        t.scores.append(evaluate(t.arm.model, held, settings))
    per_epoch = len(data.order(settings.batch_size, seed=seed, epoch=0))
    total = per_epoch * settings.epochs
    with tqdm(total=total, desc=f"seed {seed}", unit="step", disable=not sys.stderr.isatty()) as bar:
        for epoch in range(settings.epochs):
            for index in data.order(settings.batch_size, seed=seed, epoch=epoch):
                step = len(trainees[0].losses)
                _one_batch(trainees, data.batch(index), step, total, settings, seed)
                bar.update()
            for t in trainees:
                t.scores.append(evaluate(t.arm.model, held, settings))
            bar.set_postfix_str(", ".join(f"{t.arm.title} {t.scores[-1]}" for t in trainees))
            if bar.disable:
                scores = ", ".join(f"{t.arm.title} {t.scores[-1]}" for t in trainees)
                print(f"seed {seed}, epoch {epoch + 1} of {settings.epochs}: {scores}", flush=True)
            after_epoch(epoch + 1)


def _one_batch(
    trainees: list[Trainee], batch: dict[str, Tensor], step: int, total: int, settings: Settings, seed: int
) -> None:
    device = settings.torch_device
    batch = {k: v.to(device) for k, v in batch.items()}
    order = list(trainees)
    random.Random(f"{seed} {step}").shuffle(order)
    for t in order:
        t.arm.model.train()
        # every arm draws the model's own dropout from the same state
        torch.manual_seed(seed * 1_000_003 + step)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = train_step(t, batch, lr_at(step, total, settings), settings)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        t.seconds.append(time.perf_counter() - start)
        t.losses.append(loss)
