"""PRoLoRA: its factors against chunks rolled one by one, the layer against stock PEFT with those factors, counts and limits."""

from __future__ import annotations

import copy
import json
import math

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, moved, peft_logits

IN, OUT, ALPHA = 13, 11, 5.0
# m divides neither 13 nor 5, n neither 11 nor 5; more chunks than shared ranks; one chunk wholly cut off; u = 0 and u = rank
SHAPES = [
    dict(rank=6, unshared=1, m=4, n=3),
    dict(rank=6, unshared=0, m=2, n=5),
    dict(rank=3, unshared=1, m=7, n=8),
    dict(rank=4, unshared=4, m=3, n=2),
    dict(rank=5, unshared=2, m=1, n=1),
    dict(rank=9, unshared=2, m=3, n=1),
]


def built(**options):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="prolora", dtype=DT, alpha=ALPHA, **options))
    m = layer.adapter.prolora
    return layer, m, lambda: papers.prolora_factors(m.A0, m.B0, m.Au, m.Bu, options["m"], options["n"], IN, OUT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_the_rolled_chunks(shape):
    layer, m, compose = built(**shape)
    (term,) = m.terms(Plain(layer.weight))
    for got, want in zip((term.A, term.B), compose(), strict=True):
        assert torch.equal(got, want)
    assert term.scale == ALPHA / shape["rank"]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, SHAPES[0] | dict(dropout=0.3), SHAPES[2] | dict(dropout=0.3, bias=False)], ids=str)
def test_equals_peft_lora_of_the_factors(shape, lead):
    layer, _, compose = built(**shape)
    assert_equals_peft(layer, compose, ALPHA, lead, shape.get("dropout", 0.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameter_count(shape):
    _, m, _ = built(**shape)
    q, u = shape["rank"] - shape["unshared"], shape["unshared"]
    want = q * (math.ceil(IN / shape["m"]) + math.ceil(OUT / shape["n"])) + u * (IN + OUT)
    assert sum(p.numel() for p in m.parameters()) == want


def test_what_is_saved():
    names = {(5, 2): {"A0", "B0", "Au", "Bu"}, (5, 0): {"A0", "B0"}, (5, 5): {"Au", "Bu"}}
    for (rank, unshared), want in names.items():
        assert set(built(rank=rank, unshared=unshared, m=2, n=2)[1].state_dict()) == want


def test_blocks_of_equal_displacement_coincide():
    """m = n = 2 without unshared ranks: both diagonal blocks are one matrix, the others are not."""
    layer = moved(fastpeft.AdaptedLinear(12, 10, method="prolora", dtype=DT, rank=4, unshared=0, m=2, n=2))
    (term,) = layer.adapter.prolora.terms(Plain(layer.weight))
    (a, b), (c, d) = (row.split(6, 1) for row in delta_weight(term, DT).split(5, 0))
    torch.testing.assert_close(a, d, rtol=0, atol=1e-12)
    assert (a - b).abs().max() > 0.1 and (a - c).abs().max() > 0.1


def test_rank_of_the_update_is_the_total_rank():
    layer = moved(fastpeft.AdaptedLinear(40, 40, method="prolora", dtype=DT, rank=8, unshared=1, m=7, n=7))
    (term,) = layer.adapter.prolora.terms(Plain(layer.weight))
    assert torch.linalg.matrix_rank(delta_weight(term, DT)) == 8


def test_starts_as_published():
    """The bound of A0 is that of the full width, not of a chunk."""
    m = fastpeft.AdaptedLinear(256, 64, method="prolora", rank=16, unshared=4, m=4, n=4).adapter.prolora
    assert not m.B0.any() and not m.Bu.any()
    for A in (m.A0, m.Au):
        assert 0.95 / 16 < A.abs().max() <= 1 / 16


def test_indices_survive_a_start_on_the_meta_device():
    options = dict(method="prolora", rank=5, unshared=1, m=3, n=2)
    layer = fastpeft.AdaptedLinear(IN, OUT, device="meta", **options).to_empty(device="cpu")
    fresh = fastpeft.AdaptedLinear(IN, OUT, **options)
    layer.load_state_dict(perturb(fresh).state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), fresh(x))


def test_export_is_the_expanded_lora(tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "prolora", rank=6, unshared=2, m=3, n=5)
    want = perturb(model).eval()(x)
    fastpeft.export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 6
    assert_fp64(peft_logits(plain, tmp_path, x), want)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(rank=0), ValueError, r"prolora: rank=0 at 'linear'.*1 to 11"),
        (dict(rank=2, unshared=3), ValueError, r"prolora: unshared=3 at 'linear'.*0 to 2.*rank"),
        (dict(unshared=-1), ValueError, r"unshared=-1"),
        (dict(unshared=1.0), TypeError, r"unshared=1.0.*int"),
        (dict(m=0), ValueError, r"m=0.*1 to 13.*input width"),
        (dict(m=14), ValueError, r"m=14.*1 to 13"),
        (dict(n=12), ValueError, r"n=12.*1 to 11.*output width"),
        (dict(n="2"), TypeError, r"n='2'"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "prolora", **options)
