"""KronA against its formula, torch.kron and PEFT's LoKr with transposed factors."""

from __future__ import annotations

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from peft_layers import LEADS, moved
from test_loha import compare
from test_lokr import stock
from test_memory import saved_bytes
from tolerance import assert_fp64

import fastpeft
from fastpeft.base import Plain
from fastpeft.terms import effective_weight

pytest.importorskip("peft")


def built(size_in=24, size_out=20, **options):
    layer = moved(fastpeft.AdaptedLinear(size_in, size_out, method="krona", dtype=DT, **options))
    return layer, layer.adapter.krona


@pytest.mark.parametrize("lead", [*LEADS, ()], ids=str)
@pytest.mark.parametrize("shape", [None, (1, 1), (24, 20), (6, 10), (4, 1), (1, 5)], ids=str)
def test_equals_the_formula(shape, lead):
    layer, m = built(shape=shape, scale=1.7)
    x = rand(*lead, 24)
    own = {"A": m.A, "B": m.B, "x": x}
    compare(layer(x), papers.krona(x, layer.weight, layer.bias, m.A, m.B, 1.7), own, own)
    delta = 1.7 * torch.kron(m.A, m.B).T
    assert_fp64(effective_weight(layer.weight, m.terms(Plain(layer.weight)), DT), layer.weight + delta)


@pytest.mark.parametrize("case", range(40))
def test_equals_pefts_lokr_with_transposed_factors(case):
    """Where PEFT can split alike: one factor per side, both halves full; alpha = s r, w1 = A^T, w2 = B^T."""
    torch.manual_seed(case)
    a1, b1, a2, b2 = (int(torch.randint(1, 9, ())) for _ in range(4))
    size_in, size_out = a1 * b1, a2 * b2
    reference = fastpeft.AdaptedLinear(size_in, size_out, method="lokr", rank=10_000, alpha=17_000, dtype=DT)
    w1 = reference.adapter.lokr.w1.shape
    layer, m = built(size_in, size_out, shape=(w1[1], w1[0]), scale=1.7)
    reference.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
    theirs, live = stock(reference, r=10_000, alpha=17_000)
    with torch.no_grad():
        live["w1"].copy_(m.A.T)
        live["w2"].copy_(m.B.T)
    x = rand(3, size_in)
    y, z = layer(x), theirs(x)
    assert_fp64(y, z, f"case {case}")
    d = torch.randn_like(y)
    got, want = torch.autograd.grad(y, (m.A, m.B, x), d), torch.autograd.grad(z, (live["w1"], live["w2"], x), d)
    for a, b in zip(got, (want[0].T, want[1].T, want[2]), strict=True):
        assert_fp64(a, b)


def test_size_start_rank_and_memory():
    layer = fastpeft.AdaptedLinear(768, 768, method="krona", shape=(32, 24), dtype=DT)
    m = layer.adapter.krona
    assert m.A.shape == (32, 24) and m.B.shape == (24, 32) and m.A.numel() + m.B.numel() == 1536
    assert not m.B.any() and 0.8 * 24**-0.5 < m.A.abs().max() <= 24**-0.5
    x = torch.randn(64, 768, dtype=DT, requires_grad=True)
    assert_fp64(layer(x), papers.linear(x, layer.weight, layer.bias))
    assert saved_bytes(lambda: layer(x), layer) == 8 * 64 * 768
    with torch.no_grad():
        m.B.normal_()
        m.A[:, :20] = 0
    (term,) = m.terms(Plain(layer.weight))
    rank = torch.linalg.matrix_rank
    assert rank(torch.kron(term.C, term.D)) == rank(m.A) * rank(m.B) == 4 * 24


def test_factors_are_not_interchangeable():
    layer, m = built(36, 36, shape=(6, 6))
    x = rand(5, 36)
    y = layer(x)
    with torch.no_grad():
        a = m.A.clone()
        m.A.copy_(m.B)
        m.B.copy_(a)
    assert (layer(x) - y).abs().max() > 0.1


def test_merges_exactly():
    model, x = MLP(), rand(5, 16)
    fastpeft.adapt(model, "krona", shape=(2, 4))
    perturb(model)
    want = model(x)
    assert_fp64(fastpeft.merge(model)(x), want)


@pytest.mark.parametrize(
    ("shape", "word"), [((5, 4), "5 does not divide 24"), ((4, 3), "3 does not divide 20"), ((4,), "\\(a1, a2\\)"), ((0, 4), "a1=0"), (4, "pair")]
)
def test_bad_shapes_are_named(shape, word):
    with pytest.raises((ValueError, TypeError), match=word):
        built(shape=shape)
