"""How good predicted probabilities are. p [samples, classes], each row summing to 1; y [samples] holds classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of samples whose likeliest class is right."""
    return (_checked(p, y).argmax(1) == y).double().mean().item()


def nll(p: Tensor, y: Tensor) -> float:
    """-mean log p(right class), natural logarithm; infinite where a right class has no probability."""
    return -_checked(p, y).gather(1, y[:, None]).log().mean().item()


def brier(p: Tensor, y: Tensor) -> float:
    """Mean over samples of sum over classes of (p - [class is right])^2: between 0 and 2."""
    right = torch.nn.functional.one_hot(y, p.shape[1])
    return (_checked(p, y) - right).square().sum(1).mean().item()


class Reliability(NamedTuple):
    """Per bin of confidence, each [bins] fp64: share of the samples, and their accuracy and mean confidence (NaN in an empty bin)."""

    share: Tensor
    accuracy: Tensor
    confidence: Tensor


def reliability(p: Tensor, y: Tensor, bins: int = 15) -> Reliability:
    """How often the likeliest class is right where it is given which probability.

    Bins are (low, high], of equal width over [0, 1].
    """
    if bins < 1:
        raise ValueError(f"laplace.reliability: bins={bins}; it must be at least 1.")
    confidence, chosen = _checked(p, y).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=p.device)[1:-1]
    which = torch.bucketize(confidence, edges)
    count, right, sure = (
        confidence.new_zeros(bins).index_add_(0, which, v) for v in (torch.ones_like(confidence), (chosen == y).double(), confidence)
    )
    return Reliability(count / len(y), right / count, sure / count)


def ece(p: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error of the likeliest class: sum over bins of share * |accuracy - mean confidence|."""
    share, right, sure = reliability(p, y, bins)
    return (share * (right - sure).abs())[share > 0].sum().item()


def scores(p: Tensor, y: Tensor, bins: int = 15) -> dict[str, float]:
    """accuracy, nll, brier and ece."""
    return {f.__name__: f(p, y) for f in (accuracy, nll, brier)} | {"ece": ece(p, y, bins)}


def _checked(p: Tensor, y: Tensor) -> Tensor:
    if p.dim() != 2 or tuple(y.shape) != p.shape[:1] or not len(y) or y.is_floating_point():
        raise ValueError(
            f"laplace: probabilities are {tuple(p.shape)} and labels {y.dtype} {tuple(y.shape)}; needed are [samples, classes] and "
            "integers [samples], of one sample or more."
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"laplace: labels lie in [{y.min()}, {y.max()}], and there are {p.shape[1]} classes.")
    return p.detach().double()
