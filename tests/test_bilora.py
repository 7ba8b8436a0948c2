"""BiLoRA's layer: stock PEFT's AdaLoRA with lora_E = v(E), the three parametrisations, the two regularisers, what learns first."""

from __future__ import annotations

import copy
import math

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand, seed_after
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.method.bilora import VALUES, binary_entropy
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
from peft_layers import LEADS, assert_exports, moved
from test_adalora import assert_equals_adalora, peft_adalora, set_factors

IN, OUT, RANK, ALPHA = 13, 11, 4, 5.0


def built(**options):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="bilora", rank=RANK, alpha=ALPHA, dtype=DT, **options))
    return layer, layer.adapter.bilora


def slow_values(E, kind):
    if kind == "softmax":
        return torch.stack([e.exp() / sum(f.exp() for f in E) for e in E])
    return E if kind == "real" else 1 / (1 + (-E).exp())


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("more", [{}, {"dropout": 0.3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_equals_peft_adalora_with_the_values_as_e(values, more, lead):
    layer, m = built(values=values, **more)
    mask = None
    if "dropout" in more:
        mask = fastpeft.dropout_mask(seed_after(31), (*lead, IN), 0.3)
    v = slow_values(m.E, values)
    # PEFT divides by rank + 1e-5
    theirs = set_factors(peft_adalora(layer, RANK, ALPHA / RANK * (RANK + 1e-5), mask), m.A, m.B, v.detach()[:, None])

    def through(dA, dB, dv):
        return dA, dB, *torch.autograd.grad(v, m.E, dv[:, 0])

    assert_equals_adalora(layer, theirs, (m.A, m.B, m.E), through, lead)


@pytest.mark.parametrize("values", VALUES)
def test_equals_the_formula(values):
    layer, m = built(values=values)
    x, own = rand(2, 5, IN), (m.A, m.B, m.E)
    got, want = layer(x), papers.gated(x, layer.weight, layer.bias, m.A, m.B, slow_values(m.E, values), ALPHA / RANK)
    named = dict(zip("xABE", (x, *own), strict=True))
    compare(got, want, named, named)


@pytest.mark.parametrize(("values", "first"), [("softmax", 1 / 64), ("real", 1 / 64), ("sigmoid", 0.5)])
def test_start_and_count(values, first):
    m = fastpeft.AdaptedLinear(600, 400, method="bilora", rank=64, values=values).adapter.bilora
    assert not m.B.any() and not any(delta_weight(t).any() for t in m.terms(None))
    assert abs(m.A.std() - 0.02) < 5e-4 and torch.equal(m.spectrum(), torch.full((64,), first))
    assert sum(p.numel() for p in m.parameters() if p.requires_grad) == 64 * (600 + 400 + 1)


@pytest.mark.parametrize("values", VALUES)
def test_at_the_start_the_upper_level_has_nothing_to_learn(values):
    """B is zero: it has a gradient, A and E have none, so the lower level has to step first."""
    layer = fastpeft.AdaptedLinear(IN, OUT, method="bilora", rank=RANK, dtype=DT, values=values)
    m = layer.adapter.bilora
    layer(rand(9, IN)).square().sum().backward()
    assert m.B.grad.any() and not m.A.grad.any() and not m.E.grad.any()


def test_the_values():
    E = torch.tensor([-30.0, -1.0, 0.5, 40.0], dtype=DT)
    seen = {}
    for kind in VALUES:
        _, m = built(values=kind)
        with torch.no_grad():
            m.E.copy_(E)
        seen[kind] = m.spectrum()
        assert_fp64(seen[kind], slow_values(E, kind), kind)
    assert_fp64(seen["softmax"].sum(), torch.ones((), dtype=DT))
    assert (seen["real"] < 0).any() and ((seen["sigmoid"] > 0) & (seen["sigmoid"] <= 1)).all()


def test_orthogonality_is_the_squared_one():
    _, m = built()

    def gap(F):
        return F @ F.T - torch.eye(RANK, dtype=DT)

    want = sum((g**2 for F in (m.A, m.B.T) for g in gap(F).flatten()), torch.zeros((), dtype=DT))
    value = m.orthogonality()
    assert_fp64(value, want)
    dA, dB = torch.autograd.grad(value, (m.A, m.B))
    assert_fp64(dA, 4 * gap(m.A) @ m.A)
    assert_fp64(dB, 4 * m.B @ gap(m.B.T))
    with torch.no_grad():
        m.A.copy_(torch.eye(RANK, IN))
        m.B.copy_(torch.eye(OUT, RANK))
    assert m.orthogonality() == 0


def test_binary_entropy():
    """n ln 2 with every value 1/2, next to nothing at 0 and 1, and between them the sum of the entropies."""
    half = torch.full((5,), 0.5, dtype=DT)
    assert_fp64(binary_entropy(half), torch.tensor(5 * math.log(2), dtype=DT))
    v = torch.tensor([0.1, 0.7], dtype=DT)
    assert_fp64(binary_entropy(v), -sum(p * math.log(p) for p in (0.1, 0.9, 0.7, 0.3)) * torch.ones((), dtype=DT))
    corners = torch.tensor([0.0, 1.0, 0.0], dtype=DT, requires_grad=True)
    value = binary_entropy(corners)
    value.backward()
    assert 0 < value < 5e-5 and corners.grad.isfinite().all()


def test_binary_entropy_drives_a_sigmoid_apart():
    _, m = built(values="sigmoid")
    with torch.no_grad():
        m.E.copy_(torch.tensor([-0.5, 0.2, 1.0, -2.0]))
    (g,) = torch.autograd.grad(binary_entropy(m.spectrum()), m.E)
    assert (-g).sign().tolist() == [-1, 1, 1, -1]


def test_values_must_be_the_saved_ones(tmp_path):
    """E means nothing without its parametrisation: the folder knows it."""
    model, plain, x = MLP(), MLP(), rand(5, 16)
    plain.load_state_dict(model.state_dict())
    fastpeft.adapt(model, "bilora", rank=3, values="sigmoid")
    want = perturb(model).eval()(x)
    fastpeft.save_adapter(model, tmp_path)
    other = copy.deepcopy(plain)
    fastpeft.load_adapter(plain.eval(), tmp_path)
    assert torch.equal(plain(x), want)
    fastpeft.adapt(other, "bilora", rank=3)
    with pytest.raises(fastpeft.CheckpointError, match=r"values.*sigmoid.*softmax"):
        fastpeft.load_adapter(other, tmp_path)


@pytest.mark.parametrize("values", VALUES)
def test_export_holds_the_values(values, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "bilora", rank=3, alpha=7, values=values)
    assert_exports(perturb(model), plain, tmp_path, x, 3)


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(rank=0), ValueError, r"bilora: rank=0 at 'linear'.*1 to 11"),
    (dict(values="binary"), ValueError, r"bilora: values='binary'; it must be one of softmax, real, sigmoid"),
    (dict(alpha=float("inf")), ValueError, r"bilora: alpha=inf.*finite"),
    (dict(dropout=1), ValueError, r"bilora: dropout=1"),
])  # fmt: skip
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "bilora", **options)
