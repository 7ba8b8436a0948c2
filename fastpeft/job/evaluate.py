"""How good a model is on held-out examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft.domains import choices
from fastpeft.job.data import DOMAIN, Examples
from fastpeft.job.settings import Settings
from fastpeft.routing_hooks import is_routed


@dataclass(frozen=True)
class Score:
    """loss: mean per example, or per predicted token.   accuracy: share of right answers; None for language
    modelling.   routed: share of (block, example) whose router chose the example's domain; None without routers."""

    loss: float
    accuracy: float | None
    routed: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def metric(self) -> float:
        """What the report calls the metric: the accuracy, or the perplexity where there is none."""
        return self.perplexity if self.accuracy is None else self.accuracy

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f}" if self.accuracy is None else f"accuracy {self.accuracy:.3f}"
        )


@torch.no_grad()
def evaluate(model: Any, held: Examples, settings: Settings) -> Score:
    """Score of a model in eval mode; its mode is set back afterwards."""
    training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    chosen: list[Tensor] = []
    for batch in held.in_order(2 * settings.batch_size):
        batch = {k: v.to(settings.torch_device) for k, v in batch.items()}
        domain = batch.pop(DOMAIN, None)  # which the routers are to find out
        out = model(**batch)
        if domain is not None:
            chosen += [choice == domain for choice in choices_of(model)]
        labels = batch["labels"]
        n = len(labels) if held.labels is not None else int((labels[:, 1:] != -100).sum())
        loss += float(out.loss) * n
        count += n
        if held.labels is not None:
            right += int((out.logits.argmax(-1) == labels).sum())
    model.train(training)
    routed = float(torch.cat(chosen).float().mean()) if chosen else None
    return Score(loss / count, right / count if held.labels is not None else None, routed)


def choices_of(model: Any) -> list[Tensor]:
    """Of each block with a router the expert of each example [batch] in the last forward; none of a model without."""
    return list(choices(model).values()) if is_routed(model) else []


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor], settings: Settings) -> Tensor:
    """Logits of one batch in eval mode, fp32, on the CPU."""
    training = model.training
    model.eval()
    found = model(**{k: v.to(settings.torch_device) for k, v in batch.items() if k not in ("labels", DOMAIN)}).logits
    model.train(training)
    return found.float().cpu()
