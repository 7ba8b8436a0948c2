"""DyLoRA's sampling: each optimiser step trains the first b ranks, b drawn anew, the same in all layers and on all processes."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fastpeft.method.dylora import DyLoRA
from fastpeft.option_checks import check_finite, check_int
from fastpeft.train.layers import take_charge
from fastpeft.train.protocol import Context, Procedure

DISTRIBUTIONS = ("uniform", "geometric")


class DyLoRASampling(Procedure):
    """Every dylora layer uses the first b ranks for the micro-batches of a step; between steps, the rank that it had before.

    distribution: "uniform" over 1 .. R, the largest rank in the model; or "geometric": b with probability p (1 - p)^(b - 1),
        cut off at R and scaled up to sum to 1 (how the paper cuts it is not known to us; its p is 0.15).
    seed: b is a function of (seed, step), so processes agree, a resumed run goes on with the same draws, and a step that a
        gradient scaler skips is tried again with the same b. A layer of smaller rank (rank_pattern) uses min(b, its rank).

    Layers with mode="frozen" train row b of A and column b of B alone: after each step all others are put back, which the
    optimiser's momentum and weight decay would have moved (as they do in the authors' script). Their moments are not put back.
    In mode="full" nothing is: ranks above b have a gradient of zero and move by momentum and decay, as in the authors' script.
    Evaluation between two steps is at the layer's own rank, or the one that set_rank chose before training.
    Raises ValueError on other arguments and on a model without dylora layers.
    """

    def __init__(self, distribution: str = "uniform", p: float = 0.15, seed: int = 0):
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"DyLoRASampling: distribution={distribution!r}; it must be one of {', '.join(DISTRIBUTIONS)}.")
        if not 0 < check_finite("DyLoRASampling", "p", p) < 1:
            raise ValueError(f"DyLoRASampling: p={p}; it must be more than 0 and less than 1.")
        self.distribution, self.p = distribution, float(p)
        self.seed = check_int("DyLoRASampling", "seed", seed, 0, None, "seed")
        self._resting: dict[DyLoRA, int] = {}
        self._before: dict[DyLoRA, tuple[Tensor, Tensor]] = {}

    def draw(self, step: int, highest: int) -> int:
        """b of a step, 1 .. highest."""
        weights = None if self.distribution == "uniform" else [(1 - self.p) ** k for k in range(highest)]
        return random.Random(f"{self.seed} {step}").choices(range(1, highest + 1), weights)[0]

    def on_train_begin(self, ctx: Context) -> None:
        self._resting = {m: m.b for m in take_charge(ctx, DyLoRA, "DyLoRASampling", "dylora").values()}
        ctx.closing.callback(self._release)

    def _release(self) -> None:
        self._rest()
        self._resting, self._before = {}, {}

    def _rest(self) -> None:
        for m, b in self._resting.items():
            m.set_rank(b)

    def on_step_begin(self, ctx: Context) -> None:
        b = self.draw(ctx.step, max(m.A.shape[0] for m in self._resting))
        for m in self._resting:
            m.set_rank(min(b, m.A.shape[0]))

    def before_step(self, ctx: Context) -> None:
        frozen = [m for m in self._resting if m.mode == "frozen"]
        self._before = {m: (m.A.detach().clone(), m.B.detach().clone()) for m in frozen}

    @torch.no_grad()
    def after_step(self, ctx: Context, skipped: bool) -> None:
        for m, (A, B) in self._before.items():
            m.A.copy_(torch.where(m.trains[:, None], m.A, A))
            m.B.copy_(torch.where(m.trains, m.B, B))
        self._before = {}

    def on_step_end(self, ctx: Context) -> None:
        self._rest()

    def state_dict(self) -> dict[str, Any]:
        return {"distribution": self.distribution, "p": self.p, "seed": self.seed}

    def load_state_dict(self, state: Any) -> None:
        if dict(state) != self.state_dict():
            raise ValueError(f"DyLoRASampling: the state is of other draws (state, here): {dict(state)}, {self.state_dict()}.")
