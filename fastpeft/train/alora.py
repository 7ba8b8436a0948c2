"""ALoRA's allocation: ranks are scored by taking them out, the worst are closed, and as many new ones opened where none was lost.

IS(r) = S(M) - S(M without r) + S(M with r alone), S = minus the loss on one held-out batch: real forward passes, two per live rank.

Paper: arXiv 2403.16187.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpeft.method.alora_alloc import ALoRAAlloc
from fastpeft.option_checks import check_int
from fastpeft.train.layers import count_each, inner, seeded, take_charge
from fastpeft.train.protocol import Batch, Context, Procedure
from fastpeft.train.source import Loss, Source, batch_of, check_source, loss_of, mean_over_ranks, need_source


def shares(count: int, spare: Sequence[int]) -> list[int]:
    """How `count` new ranks go to layers in order of merit: as evenly as possible, the first ones get the remainder; none more than
    it has to spare, and what all cannot take is left out."""
    given = [0] * len(spare)
    while sum(given) < min(count, sum(spare)):
        for k, free in enumerate(spare):
            given[k] += given[k] < free and sum(given) < count
    return given


class ALoRAAllocation(Procedure):
    """Moves ranks between alora_alloc layers in `rounds` rounds: the first after `warmup` steps, the others `interval` steps apart.

    source: held-out batches, one per round (fastpeft.train.Batches; the paper's has 32 examples); every process of a parallel run
        gets those that its own source gives, and the scores are averaged. It may be set until the first step.
    loss: (output, batch) -> the loss to score by; None: the `loss` of the model's output.
    warmup, interval: steps that the optimiser took. None: the first epoch (K1), and a quarter of what came before the first round (K2).
    rounds: N_A.   ranks_per_round: n_A, closed in a round over all layers together; None: one per type of adapted module (q_proj, ...),
        types being last parts of names.
    seed: of the new ranks, the same on all processes.

    In a round the n_A ranks of lowest IS are closed. The layers that lost none, in order of their mean IS, get n_A new ones as evenly
    as possible, within their capacity; where no layer is left over, or has room, the total shrinks. It never exceeds what it was.
    A round takes 2 * (live ranks) + 1 passes in evaluation mode; no gradient, no event, and generators and modes are put back.
    Raises ValueError on other arguments and scores that are not finite, RuntimeError in the first step without a source.
    """

    PROGRESS: ClassVar = "ranks"
    HOLDS_OUT: ClassVar = 0.1  # of a job's training data, for the source

    def __init__(
        self,
        source: Source | None = None,
        *,
        warmup: int | None = None,
        interval: int | None = None,
        rounds: int = 8,
        ranks_per_round: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ):
        for name, value in (("warmup", warmup), ("interval", interval), ("ranks_per_round", ranks_per_round)):
            if value is not None:
                check_int("ALoRAAllocation", name, value, 1, None, name)
        self.source, self.loss = check_source("ALoRAAllocation", source), loss
        self.warmup, self.interval, self.ranks_per_round = warmup, interval, ranks_per_round
        self.rounds, self.seed = check_int("ALoRAAllocation", "rounds", rounds, 0, None, "rounds"), seed
        self.round = 0  # rounds that took place
        self._first = self._last = 0  # the step count at the first of them, and at the last
        self._layers: dict[str, ALoRAAlloc] = {}

    def on_train_begin(self, ctx: Context) -> None:
        self._layers = take_charge(ctx, ALoRAAlloc, "ALoRAAllocation", "alora_alloc")
        ctx.closing.callback(self._release)

    def _release(self) -> None:
        self._layers = {}

    @property
    def ranks(self) -> dict[str, int]:
        """Live ranks by layer, while attached."""
        return count_each({n: m.gate for n, m in self._layers.items()})

    def progress(self) -> dict[str, int]:
        return self.ranks

    @property
    def count(self) -> int:
        """n_A, while attached."""
        return len({n.rpartition(".")[2] for n in self._layers}) if self.ranks_per_round is None else self.ranks_per_round

    def on_step_begin(self, ctx: Context) -> None:
        if self.round < self.rounds:
            need_source("ALoRAAllocation", self.source, "the scores")

    def on_step_end(self, ctx: Context) -> None:
        if self.round == 0:
            due = self.warmup is not None and ctx.step >= self.warmup
        else:
            due = ctx.step - self._last >= (self.interval or max(1, self._first // 4))
        if due:
            self._reallocate(ctx)

    def on_epoch_end(self, ctx: Context) -> None:
        if self.round == 0 and self.warmup is None and ctx.step:
            self._reallocate(ctx)

    @torch.no_grad()
    def _reallocate(self, ctx: Context) -> None:
        if self.round == self.rounds:
            return
        scores = self.importance(ctx, batch_of(self.source, self.round, inner(ctx.model)))  # type: ignore[arg-type]
        ranking = sorted((float(s[r]), k, r) for k, s in enumerate(scores.values()) for r in s.isfinite().nonzero().flatten().tolist())
        lost: dict[int, list[int]] = {}
        for _, k, r in ranking[: self.count]:
            lost.setdefault(k, []).append(r)
        closed = sum(map(len, lost.values()))
        layers, moments = list(self._layers.values()), ctx.optimizer.state
        means = {k: float(s[s.isfinite()].mean()) if s.isfinite().any() else -float("inf") for k, s in enumerate(scores.values())}
        winners = sorted((k for k in means if k not in lost), key=lambda k: -means[k])
        spare = [int((~layers[k].gate).sum()) for k in winners]
        for k, ranks in lost.items():
            layers[k].close(ranks, moments)
        for k, more in zip(winners, shares(closed, spare), strict=True):
            layers[k].open(more, moments, seeded(self.seed, self.round, list(self._layers)[k]))
        self.round, self._last, self._first = self.round + 1, ctx.step, self._first or ctx.step

    @torch.no_grad()
    def importance(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """IS of every rank by layer [capacity], on the CPU; nan where a rank is closed. ValueError where one is not finite."""
        live = [(m, r) for m in self._layers.values() for r in m.gate.nonzero().flatten().tolist()]
        before = {m: m.gate.clone() for m in self._layers.values()}
        model, found = inner(ctx.model), []
        with ctx.quiet():
            model.eval()
            try:
                found.append(self._score(model, batch))
                for m, r in live:
                    m.gate[r] = False
                    found.append(self._score(model, batch))
                    m.gate[r] = True
                for m in before:
                    m.gate.fill_(False)
                for m, r in live:
                    m.gate[r] = True
                    found.append(self._score(model, batch))
                    m.gate[r] = False
            finally:
                for m, gate in before.items():
                    m.gate.copy_(gate)
        whole, *rest = mean_over_ranks(torch.stack(found)).tolist()
        if not torch.tensor([whole, *rest]).isfinite().all():
            raise ValueError("ALoRAAllocation: a loss on the held-out batch is not finite, so no rank can be scored.")
        scores = {m: torch.full(m.gate.shape, float("nan"), dtype=torch.float64) for m in before}
        for k, (m, r) in enumerate(live):
            scores[m][r] = whole - rest[k] + rest[len(live) + k]
        return {n: scores[m] for n, m in self._layers.items()}

    def _score(self, model: Any, batch: Batch) -> Tensor:
        found = loss_of(model, batch, self.loss, "ALoRAAllocation").detach()
        return -found.to(torch.promote_types(found.dtype, torch.float32))

    def state_dict(self) -> dict[str, Any]:
        return self._settings() | {"round": self.round, "first": self._first, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wrong = {k: (state.get(k), v) for k, v in self._settings().items() if state.get(k) != v}
        if wrong or not {"round", "first", "last"} <= state.keys():
            raise ValueError(f"ALoRAAllocation: the state is of another allocation (state, here): {wrong or 'parts are missing'}.")
        self.round, self._first, self._last = (int(state[k]) for k in ("round", "first", "last"))

    def _settings(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("warmup", "interval", "rounds", "ranks_per_round", "seed")}
