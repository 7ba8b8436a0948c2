"""The k largest by bit patterns against a stable sort: ties, extremes, and the pieces it counts in."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops import topk
from fastpeft.ops.topk import largest


def sorted_choice(score, k):
    """The same choice by a stable sort of everything."""
    order = torch.sort(score.flatten(), descending=True, stable=True).indices
    return order[:k].sort().values


SCORES = {
    "random": lambda: torch.rand(37, 53),
    "squares of a gradient": lambda: torch.randn(64, 40).mul(1e-4).square(),
    "few values": lambda: torch.randint(0, 4, (41, 29)).float(),
    "one bin of the upper bits": lambda: 1.0 + torch.rand(500) * 2**-8,
    "two neighbours": lambda: torch.tensor([1.0, 1.0 + 2**-23]).repeat(50),
    "all zero": lambda: torch.zeros(30, 3),
    "subnormal": lambda: torch.rand(200) * 1e-40,
    "all magnitudes": lambda: torch.randn(400).mul(40).exp(),
    "with infinity": lambda: torch.cat([torch.rand(20), torch.full((3,), torch.inf), torch.rand(20)]),
    "transposed": lambda: torch.randint(0, 9, (30, 20)).float().t(),
}


@pytest.mark.parametrize("piece", [7, topk.PIECE])
@pytest.mark.parametrize("name", list(SCORES))
def test_equals_a_stable_sort(name, piece, monkeypatch):
    monkeypatch.setattr(topk, "PIECE", piece)
    score = SCORES[name]()
    n = score.numel()
    for k in (0, 1, 2, n // 7, n // 2, n - 1, n):
        got = largest(score, k)
        assert got.dtype == torch.int64 and len(got) == k
        assert torch.equal(got, sorted_choice(score, k)), f"{name}, k={k}"


def test_ties_take_the_lowest_indices():
    score = torch.tensor([[1.0, 5.0, 2.0], [2.0, 2.0, 9.0]])
    assert largest(score, 3).tolist() == [1, 2, 5]
    assert largest(score, 4).tolist() == [1, 2, 3, 5]


def test_what_has_no_order_is_refused():
    for bad in (torch.nan, -1.0, -0.0):
        with pytest.raises(ValueError, match="NaN or negative"):
            largest(torch.tensor([1.0, bad, 2.0]), 1)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"k={k} of 3"):
            largest(torch.ones(3), k)
    with pytest.raises(TypeError, match="float64"):
        largest(torch.ones(3, dtype=torch.float64), 1)


def test_the_score_is_not_changed():
    score = torch.rand(9, 9)
    before = score.clone()
    largest(score, 5)
    assert torch.equal(score, before)
