"""SoRA: stock PEFT's LoRA with the gate in lora_B, the proximal operator on a table, pruning, and what a closed gate still learns."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.method.sora import soft_threshold
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, assert_exports, moved

IN, OUT, RANK, ALPHA = 13, 11, 4, 5.0


def built(**options):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="sora", rank=RANK, alpha=ALPHA, dtype=DT, **options))
    return layer, layer.adapter.sora


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"bias": False}], ids=str)
def test_equals_peft_lora_with_the_gate_in_b(options, lead):
    layer, m = built(**options)
    assert_equals_peft(layer, lambda: (m.A, m.B * m.g), ALPHA, lead, options.get("dropout", 0.0))


def test_equals_the_formula():
    layer, m = built()
    x, own = rand(2, 5, IN), (m.A, m.B, m.g)
    got, want = layer(x), papers.gated(x, layer.weight, layer.bias, *own, ALPHA / RANK)
    named = dict(zip("xABg", (x, *own), strict=True))
    compare(got, want, named, named)


def test_start_and_count():
    m = fastpeft.AdaptedLinear(600, 400, method="sora", rank=256).adapter.sora
    assert not m.B.any() and not any(delta_weight(t).any() for t in m.terms(None))
    assert 0.95 < m.A.abs().max() * 600**0.5 <= 1 and abs(m.g.mean()) < 0.2 and 0.9 < m.g.std() < 1.1
    assert sum(p.numel() for p in m.parameters()) == 256 * (600 + 400) + 256
    assert all(p.requires_grad for p in m.parameters()) and m.scale == 16 / 256


def test_the_gate_is_fp32_on_a_16_bit_base():
    m = fastpeft.AdaptedLinear(IN, OUT, method="sora", dtype=torch.bfloat16).adapter.sora
    assert m.g.dtype is torch.float32
    with torch.no_grad():
        low = m.g.bfloat16()
        assert (soft_threshold(m.g, 3e-4) != m.g).all()
        assert (soft_threshold(low, 3e-4) == low).any(), "in bf16 the step is lost where g is large"


@pytest.mark.parametrize("xi", [0.1, 0.25, 3e-4])
def test_soft_threshold_on_the_table(xi):
    v = xi * torch.tensor([0, 0.5, 1, 1.5, 2, 3, -0.5, -1, -1.5, -2, -3], dtype=DT)
    half = [0, 0, 0, 0.5, 1, 2]
    want = xi * torch.tensor(half + [-h for h in half[1:]], dtype=DT)
    before = v.clone()
    assert_fp64(soft_threshold(v, xi), want)
    assert torch.equal(v, before), "the operator is pure"


def test_the_released_operator():
    """Three masks in place, one after the other, as released: 1.5 xi becomes zero, and xi itself stays."""
    xi = 0.25
    v = xi * torch.tensor([0, 0.5, 1, 1.5, 2, 3, -0.5, -1, -1.5, -2, -3], dtype=DT)
    w = v.clone()
    w[w > xi] -= xi
    w[w < -xi] += xi
    w[w.abs() < xi] = 0.0
    assert torch.equal(soft_threshold(v, xi, compat_official=True), w)
    assert w.tolist() == [0, 0, xi, 0, xi, 2 * xi, 0, -xi, 0, -xi, -2 * xi]
    assert not torch.equal(w, soft_threshold(v, xi))


def test_soft_threshold_is_the_proximal_operator():
    """It minimises (u - v)^2 / 2 + xi |u|: no point of a fine grid is better."""
    def value(u, v):
        return (u - v) ** 2 / 2 + 0.4 * u.abs()

    grid = torch.linspace(-2, 2, 4001, dtype=DT)
    for v in (-1.3, -0.2, 0.0, 0.3, 0.9):
        best = soft_threshold(torch.tensor(v, dtype=DT), 0.4)
        assert (value(grid, v) >= value(best, v) - 1e-15).all()


@pytest.mark.parametrize(("xi", "words"), [(-0.1, r"xi=-0.1.*at least 0"), (float("nan"), r"xi=nan.*finite"), ("1", r"xi='1'")])
def test_soft_threshold_refuses(xi, words):
    with pytest.raises(ValueError, match=words):
        soft_threshold(torch.ones(2), xi)


def test_a_closed_gate_still_has_a_gradient_and_its_rank_has_none():
    layer, m = built()
    with torch.no_grad():
        m.g[1] = 0.0
    layer(rand(9, IN)).square().sum().backward()
    assert not m.A.grad[1].any() and not m.B.grad[:, 1].any() and m.g.grad[1] != 0
    assert all(m.A.grad[i].any() and m.B.grad[:, i].any() for i in (0, 2, 3))


@pytest.mark.parametrize("closed", [[], [0, 2], [0, 1, 2, 3]], ids=str)
def test_pruned_equals_unpruned(closed, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "sora", rank=RANK, alpha=ALPHA)
    m = perturb(model).eval().up.adapter.sora
    with torch.no_grad():
        m.g[closed] = 0.0
    (term,) = m.static_terms(Plain(model.up.weight))
    assert term.A.shape[0] == term.B.shape[1] == RANK - len(closed) and term.scale == ALPHA / RANK
    assert_exports(model, plain, tmp_path, x, max(1, RANK - len(closed)), RANK)


def test_proximal_training_prunes():
    """A teacher of rank 2 under a layer of rank 6: gates close during training, the fit does not suffer."""
    layer = fastpeft.AdaptedLinear(12, 12, method="sora", rank=6, alpha=6, dtype=DT)
    m, x = layer.adapter.sora, torch.randn(64, 12, dtype=DT)
    delta = torch.randn(12, 2, dtype=DT) @ torch.randn(2, 12, dtype=DT)
    want = nn.functional.linear(x, layer.weight + delta / 4, layer.bias)
    main, gate = torch.optim.Adam([m.A, m.B], lr=0.02), torch.optim.Adam([m.g], lr=0.02)
    losses, open_gates = [], []
    for _ in range(400):
        loss = (layer(x) - want).square().mean()
        loss.backward()
        for optimizer in (main, gate):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            m.g.copy_(soft_threshold(m.g, 5e-3))
        losses.append(loss.item())
        open_gates.append(int((m.g != 0).sum()))
    assert losses[-1] < 0.01 * losses[0]
    assert 2 <= open_gates[-1] < open_gates[0] == 6


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(rank=0), ValueError, r"sora: rank=0 at 'linear'.*1 to 11"),
    (dict(rank=12), ValueError, r"sora: rank=12.*1 to 11"),
    (dict(alpha=float("inf")), ValueError, r"sora: alpha=inf.*finite"),
    (dict(dropout=1), ValueError, r"sora: dropout=1"),
])  # fmt: skip
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "sora", **options)
