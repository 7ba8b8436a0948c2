"""The layers as users build them against the papers' formulas in fp64: every option that changes the law."""

from __future__ import annotations

import itertools
import math

import papers
import pytest
import torch
from checks import DT, rand, seed_after
from tolerance import assert_fp64

import fastpeft

IN, OUT, RANK, ALPHA = 12, 8, 3, 7.0


def built(method, **options):
    layer = fastpeft.AdaptedLinear(IN, OUT, method=method, dtype=DT, alpha=ALPHA, **options).train()
    m = layer.adapter.get_submodule(method)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.4 * torch.rand_like(p))
    return layer, m, rand(2, 5, IN)


def agree(layer, x, want):
    """want(mask): the oracle under the mask of the seed that the layer draws."""
    p = next(iter(layer.adapter.children())).dropout
    seed = seed_after(21)
    got = layer(x)
    expected = want(fastpeft.dropout_mask(seed, x.shape, p) if p else None)
    assert_fp64(got, expected, "y")
    own = {n: p for n, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    d = torch.randn_like(got)
    pairs = zip(own, *(torch.autograd.grad(y, list(own.values()), d) for y in (got, expected)), strict=True)
    for name, a, b in pairs:
        assert_fp64(a, b, name)


@pytest.mark.parametrize(("dropout", "rslora", "lora_bias"), list(itertools.product([0.0, 0.3], [False, True], [False, True])))
def test_lora(dropout, rslora, lora_bias):
    layer, m, x = built("lora", rank=RANK, dropout=dropout, rslora=rslora, lora_bias=lora_bias)
    s = ALPHA / math.sqrt(RANK) if rslora else ALPHA / RANK
    extra = s * m.bias if lora_bias else 0.0
    agree(layer, x, lambda mask: papers.lora(x, layer.weight, layer.bias, m.A, m.B, s, mask) + extra)


@pytest.mark.parametrize(("dropout", "grad"), list(itertools.product([0.0, 0.3], ["simple", "full"])))
def test_dora(dropout, grad):
    layer, m, x = built("dora", rank=RANK, dropout=dropout, grad=grad)
    formula = lambda mask: papers.dora(x, layer.weight, layer.bias, m.A, m.B, m.m, ALPHA / RANK, mask, grad == "full")  # noqa: E731
    agree(layer, x, formula)


@pytest.mark.parametrize("grad", ["simple", "full"])
def test_dora_that_drops_only_what_a_reads(grad):
    """dropout_base=False: y = x (gW)^T + s g drop(x) (BA)^T, where g W = W' with B = 0 in the numerator only."""
    layer, m, x = built("dora", rank=RANK, dropout=0.3, dropout_base=False, grad=grad)
    s = ALPHA / RANK

    def formula(mask):
        V = layer.weight + s * m.B @ m.A
        norm = V.square().sum(1).sqrt()
        g = m.m / (norm if grad == "full" else norm.detach())
        return g * (papers.linear(x, layer.weight) + papers.low_rank(x, m.A, m.B, s, mask)) + layer.bias

    agree(layer, x, formula)


@pytest.mark.parametrize(("dropout", "n"), list(itertools.product([0.0, 0.3], [1, 2, 4])))
def test_melora(dropout, n):
    layer, m, x = built("melora", rank=2, n=n, dropout=dropout)
    A, B = (m.A[0], m.B[0]) if n == 1 else (m.A, m.B)
    base = lambda: papers.linear(x, layer.weight, layer.bias)  # noqa: E731
    agree(layer, x, lambda mask: base() + papers.low_rank(x, A, B, ALPHA / 2, mask, blocks=n))


@pytest.mark.parametrize(("dropout", "n"), list(itertools.product([0.0, 0.3], [1, 5])))
def test_prolora(dropout, n):
    layer, m, x = built("prolora", rank=5, unshared=2, m=3, n=n, dropout=dropout)

    def formula(mask):
        A, B = papers.prolora_factors(m.A0, m.B0, m.Au, m.Bu, 3, n, IN, OUT)
        return papers.lora(x, layer.weight, layer.bias, A, B, ALPHA / 5, mask)

    agree(layer, x, formula)


@pytest.mark.parametrize(("dropout", "mode", "b"), list(itertools.product([0.0, 0.3], ["full", "frozen"], [1, 2, 4])))
def test_dylora(dropout, mode, b):
    layer, m, x = built("dylora", rank=4, mode=mode, dropout=dropout)
    m.set_rank(b)
    agree(layer, x, lambda mask: papers.dylora(x, layer.weight, layer.bias, m.A, m.B, ALPHA, b, mask, mode == "frozen"))


@pytest.mark.parametrize(("dropout", "heads"), list(itertools.product([0.0, 0.3], [2, 3])))
def test_hydralora(dropout, heads):
    layer, m, x = built("hydralora", rank=RANK, heads=heads, dropout=dropout)
    split = lambda: m.B.split(RANK, dim=1)  # noqa: E731
    agree(layer, x, lambda mask: papers.hydralora(x, layer.weight, layer.bias, m.A, split(), m.G, ALPHA / RANK, mask))


def test_starts_as_published():
    """A of LoRA is uniform on +-1/sqrt(in) (Kaiming uniform, a = sqrt 5), B zero; m of DoRA is the row norm of W."""
    layer = fastpeft.AdaptedLinear(256, 64, method="dora", rank=16)
    m = layer.adapter.dora
    assert not m.B.any() and 0.95 / 16 < m.A.abs().max() <= 1 / 16
    torch.testing.assert_close(m.m, torch.linalg.vector_norm(layer.weight, dim=1))
