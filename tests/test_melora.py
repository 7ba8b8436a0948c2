"""MELoRA against stock PEFT with block-diagonal factors, and its start and limits."""

from __future__ import annotations

import pytest
import torch
from checks import DT
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, moved

IN, OUT, ALPHA = 12, 20, 5.0


def built(**options):
    return moved(fastpeft.AdaptedLinear(IN, OUT, method="melora", dtype=DT, alpha=ALPHA, **options))


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("options", [dict(rank=3, n=2), dict(rank=2, n=4, dropout=0.3), dict(rank=4, n=1, dropout=0.3), dict(rank=1, n=4, bias=False)], ids=str)
def test_equals_peft_lora_of_rank_n_r_and_alpha_n_alpha(options, lead):
    layer = built(**options)
    m, n = layer.adapter.melora, options["n"]
    assert_equals_peft(layer, lambda: (torch.block_diag(*m.A), torch.block_diag(*m.B)), n * ALPHA, lead, options.get("dropout", 0.0))


def test_rank_count_and_empty_off_blocks():
    layer = built(rank=2, n=4)
    m = layer.adapter.melora
    (term,) = m.terms(Plain(layer.weight))
    delta = delta_weight(term, DT)
    assert torch.linalg.matrix_rank(delta) == 2 * 4
    blocks = torch.block_diag(*torch.ones(4, OUT // 4, IN // 4))
    assert not delta[blocks == 0].any() and delta[blocks == 1].all()
    assert sum(p.numel() for p in m.parameters()) == 2 * (IN + OUT)


def test_starts_as_published():
    """Kaiming over the slice: uniform on +-sqrt(n / in), wider than LoRA's by sqrt(n)."""
    m = fastpeft.AdaptedLinear(256, 64, method="melora", rank=8, n=4).adapter.melora
    assert not m.B.any() and 0.95 / 8 < m.A.abs().max() <= 1 / 8


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(n=3), ValueError, r"n=3.*must divide"),
        (dict(n=0), ValueError, r"n=0 at 'linear'.*1 to 12"),
        (dict(n=True), TypeError, r"n=True"),
        (dict(n=4, rank=4), ValueError, r"rank=4 at 'linear'.*1 to 3.*4 blocks"),
        (dict(n=4, rank=0), ValueError, r"rank=0"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "melora", **options)
