"""What a training procedure may do around an optimiser step: a handful of events, all optional."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Batch(NamedTuple):
    """What a forward of the attached model was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass
class Context:
    """What every event receives.

    model: the attached module.   optimizer: the one that steps (inside a wrapper that has one).   accumulation: micro-batches in a step.
    step: optimiser steps that took place; it moves between after_step and on_step_end, and not for a skipped step.
    total_steps: how many the run will take, where the loop has said so.
    silent: true inside quiet().   closing: what to undo when the runner ends, however it ends.
    """

    model: nn.Module
    optimizer: Optimizer
    accumulation: int
    step: int = 0
    total_steps: int | None = None
    silent: bool = False
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """For passes that a procedure makes itself: no event sees them; random generators and training flags are put back.

        Take their gradients with torch.autograd.grad: backward() would add to those of the step.
        """
        flags = [(m, m.training) for m in self.model.modules()]
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        was = self.silent
        with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
            self.silent = True
            try:
                yield
            finally:
                self.silent = was
                for module, training in flags:
                    module.training = training


class Procedure:
    """Base class of training procedures; a procedure defines the events that it needs. In the order of one optimiser step:

    param_groups        before the optimiser exists (fastpeft.train.build_optimizer)
    on_train_begin      the runner was entered
    on_step_begin       before the first micro-batch of a step
    before_forward      each micro-batch
    extra_loss          each micro-batch; what it returns is added to the `loss` of the model's output
    after_backward      each micro-batch; its gradients are there, unclipped
    before_step         gradients are complete and clipped, parameters are the old ones
    after_step          parameters are the new ones, gradients still there; skipped: the optimiser did not step
    on_step_end         gradients are gone; the step counts
    on_epoch_end, on_train_end

    A procedure replaces no Parameter, and a tensor that it freezes gets grad=None (a zero gradient still lets AdamW move it).

    PROGRESS: what progress() counts, for reports: "ranks", those in use by layer, or "freezing", 1 for a matrix that trains and 0 for
    one that is frozen; None: nothing.
    """

    PROGRESS: ClassVar[str | None] = None

    @property
    def done(self) -> bool:
        """Whether the run has reached what it was for; the loop may ask for it (Runner.done)."""
        return False

    def progress(self) -> dict[str, int]:
        """Where PROGRESS is set, the counts now, by the name of the layer or matrix; between two steps, while attached."""
        return {}

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimiser's groups made of `groups`; every trainable parameter must still be in exactly one."""
        return groups

    def on_train_begin(self, ctx: Context) -> None: ...

    def on_step_begin(self, ctx: Context) -> None: ...

    def before_forward(self, ctx: Context, batch: Batch) -> None: ...

    def extra_loss(self, ctx: Context) -> Tensor | None:
        """A penalty for this micro-batch, on the scale of the model's loss; None for none."""
        return None

    def after_backward(self, ctx: Context, micro: int, is_last: bool) -> None: ...

    def before_step(self, ctx: Context) -> None: ...

    def after_step(self, ctx: Context, skipped: bool) -> None: ...

    def on_step_end(self, ctx: Context) -> None: ...

    def on_epoch_end(self, ctx: Context) -> None: ...

    def on_train_end(self, ctx: Context) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside parameters and the step: tensors and plain data, detached from the live ones."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state_dict; ValueError if it is not this procedure's."""
