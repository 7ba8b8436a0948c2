"""AFLoRA's layer: stock PEFT's VeRA with this layer's factors, the start of the authors' code, and matrices that freeze later."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand, seed_after
from test_methods import grads
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
import peft
from peft_layers import LEADS, Mask, assert_exports, moved

IN, OUT, RANK = 13, 11, 4
OWN = ("A", "B", "d", "db")


def built(**options):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="aflora", rank=RANK, dtype=DT, **options))
    return layer, layer.adapter.aflora


def peft_vera(layer, A, B, d, db, mask=None):
    """Stock PEFT's VeRA whose shared A and B are given ones, and take gradients."""
    base = nn.Linear(IN, OUT, bias=layer.bias is not None, dtype=DT)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    config = peft.VeraConfig(r=len(d), target_modules=["0"])
    vera = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0].to(DT)
    with torch.no_grad():
        vera.vera_lambda_d["default"].copy_(d)
        vera.vera_lambda_b["default"].copy_(db)
    vera.vera_A["default"], vera.vera_B["default"] = (t.detach().clone().requires_grad_() for t in (A, B))
    if mask is not None:
        vera.vera_dropout["default"] = Mask(mask)
    return vera.train()


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("options", [{}, {"alpha": 6.0}, {"dropout": 0.3}, {"bias": False}], ids=str)
def test_equals_peft_vera(options, lead):
    layer, m = built(**options)
    s = options.get("alpha", RANK) / RANK
    assert m.scale == s
    x, mask = rand(*lead, IN), None
    if "dropout" in options:
        mask = fastpeft.dropout_mask(seed_after(31), x.shape, 0.3)
    vera = peft_vera(layer, m.A, m.B, m.d, m.db * s, mask)
    seed_after(31)
    y, z = layer(x), vera(x)
    assert (z - vera.base_layer(x)).abs().max() > 0.1, "the adapter does nothing"
    assert_fp64(y, z, "y")
    c = torch.randn_like(y)
    theirs = vera.vera_A["default"], vera.vera_B["default"], vera.vera_lambda_d["default"], vera.vera_lambda_b["default"]
    dx, dA, dB, dd, ddb = torch.autograd.grad(z, (x, *theirs), c)
    got = torch.autograd.grad(y, (x, *(getattr(m, n) for n in OWN)), c)
    for name, g, w in zip(("x", *OWN), got, (dx, dA, dB, dd, s * ddb), strict=True):
        assert w.abs().max() > 1e-3, f"the gradient of {name} vanishes, so this shows nothing"
        assert_fp64(g, w, name)


def test_equals_the_formula():
    layer, m = built(alpha=6.0)
    x, own = rand(2, 5, IN), [getattr(m, n) for n in OWN]
    got, want = layer(x), papers.aflora(x, layer.weight, layer.bias, *own, 6.0 / RANK)
    named = dict(zip(("x", *OWN), (x, *own), strict=True))
    compare(got, want, named, named)


def test_start():
    """A and B both random with a = 0, so that the vector db alone makes the update zero."""
    layer = fastpeft.AdaptedLinear(600, 400, method="aflora", rank=64)
    m, x = layer.adapter.aflora, torch.randn(3, 600)
    assert not any(delta_weight(t).any() for t in m.terms(None))
    assert 0.95 < m.A.abs().max() / (6 / 600) ** 0.5 <= 1 and 0.95 < m.B.abs().max() / (6 / 64) ** 0.5 <= 1
    assert torch.equal(m.d, torch.full((64,), 0.1)) and not m.db.any() and m.scale == 1.0
    layer(x).square().sum().backward()
    assert m.db.grad.any() and not any(p.grad.any() for p in (m.A, m.B, m.d)), "only db learns in the first step"


class Block(nn.Module):
    """The six linears of a DeBERTa-v3-base layer."""

    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(768, 768))
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)


@pytest.mark.parametrize("train_square", [False, True])
def test_counts_of_deberta_v3_base(train_square):
    with torch.device("meta"):
        model = nn.ModuleList(Block() for _ in range(12))
    fastpeft.adapt(model, "aflora", rank=4, train_square=train_square)

    def count(names, part):
        own = [p for n, p in model.named_parameters() if n.endswith(names) and part in n]
        return sum(p.numel() for p in own if p.requires_grad)

    assert count((".d", ".db"), "") == 83_232
    assert count((".A", ".B"), ".up.") + count((".A", ".B"), ".down.") == 368_640
    attention = sum(count((".A", ".B"), f".{part}.") for part in ("query", "key", "value", "output"))
    assert attention == (294_912 if train_square else 0)


def test_square_layers_learn_by_their_vectors_alone():
    layer = moved(fastpeft.AdaptedLinear(12, 12, method="aflora", dtype=DT))
    m = layer.adapter.aflora
    layer(rand(5, 12)).square().sum().backward()
    assert m.A.grad is None and m.B.grad is None and m.d.grad.all() and m.db.grad.all()
    layer = moved(fastpeft.AdaptedLinear(12, 12, method="aflora", dtype=DT, train_square=True))
    layer(rand(5, 12)).square().sum().backward()
    assert all(p.grad.any() for p in layer.adapter.aflora.parameters())


@pytest.mark.parametrize("frozen", ["A", "B", "AB"])
def test_freezing_a_matrix_later(frozen):
    """Its values stay to the bit under momentum and decay, and the others' gradients are what they were."""
    model, x = MLP(), rand(5, 16)
    fastpeft.adapt(model, "aflora", rank=3)
    m = perturb(model).up.adapter.aflora
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = grads(model(x), model, x)
    for name in frozen:
        p = getattr(m, name)
        p.requires_grad_(False)
        p.grad = None
    after = grads(model(x), model, x)
    assert set(before) - set(after) == {f"up.adapter.aflora.{n}" for n in frozen}
    for n, g in after.items():
        assert_fp64(g, before[n], n)
    kept = {n: p.detach().clone() for n, p in m.named_parameters()}
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {n for n, p in m.named_parameters() if torch.equal(p, kept[n])} == set(frozen)


def test_frozen_matrices_are_saved(tmp_path):
    plain, x = nn.Sequential(nn.Linear(16, 16, dtype=DT)), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "aflora", rank=3)
    want = perturb(model).eval()(x)
    fastpeft.save_adapter(model, tmp_path)
    torch.manual_seed(9)
    fastpeft.load_adapter(plain.eval(), tmp_path)
    m = plain[0].adapter.aflora
    assert torch.equal(plain(x), want) and not m.A.requires_grad and not m.B.requires_grad and m.d.requires_grad


def test_export_is_a_lora_of_the_same_rank(tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "aflora", rank=3, alpha=7)
    assert_exports(perturb(model), plain, tmp_path, x, 3)


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(rank=0), ValueError, r"aflora: rank=0 at 'linear'.*1 to 11"),
    (dict(alpha="1"), ValueError, r"aflora: alpha='1'.*finite"),
    (dict(dropout=1), ValueError, r"aflora: dropout=1"),
    (dict(train_square=1), ValueError, r"train_square=1; it must be True or False"),
])  # fmt: skip
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "aflora", **options)
