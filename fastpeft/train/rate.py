"""A learning rate that a procedure changes for one step and puts back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class StageRate:
    """factor(k) times the rate of every group in a stage's k-th step, from 0, whatever the loop or its scheduler has set there.

    factor: None changes nothing.
    """

    def __init__(self, factor: Callable[[int], float] | None):
        self.factor = factor
        self._before: list[Any] = []

    def set(self, optimizer: Optimizer, k: int) -> None:
        if self.factor is not None:
            times = self.factor(k)
            self._before = [g["lr"] for g in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * times

    def put_back(self, optimizer: Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._before, strict=False):
            group["lr"] = lr
        self._before = []
