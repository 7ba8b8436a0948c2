"""HydraLoRA beside its formula (tests/test_papers.py): one head is LoRA, start, symmetry, precision, what can be merged."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, moved, peft_logits

IN, OUT, RANK, ALPHA = 12, 10, 3, 5.0


def built(**options):
    layer = fastpeft.AdaptedLinear(IN, OUT, method="hydralora", rank=RANK, alpha=ALPHA, **({"dtype": DT} | options))
    return moved(layer), layer.adapter.hydralora


def formula(layer, m, x, mask=None):
    dt = x.dtype
    b = None if layer.bias is None else layer.bias.to(dt)
    heads = m.B.to(dt).split(RANK, dim=1)
    return papers.hydralora(x, layer.weight.to(dt), b, m.A.to(dt), heads, m.G.to(dt), ALPHA / RANK, mask)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_head_is_lora(dropout, lead):
    layer, m = built(heads=1, dropout=dropout)
    assert set(m.state_dict()) == {"A", "B"}
    assert_equals_peft(layer, lambda: (m.A * 1, m.B * 1), ALPHA, lead, dropout)


def test_equal_heads_are_lora_whatever_the_router_says():
    """The gates of a token sum to one."""
    layer, m = built(heads=3)
    x = rand(2, 5, IN)
    with torch.no_grad():
        m.B.copy_(m.B[:, :RANK].repeat(1, 3))
    assert_fp64(layer(x), papers.lora(x, layer.weight, layer.bias, m.A, m.B[:, :RANK], ALPHA / RANK))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 2, 2)], ids=str)
def test_leading_dimensions(lead):
    layer, m = built(heads=2, bias=False)
    x = rand(*lead, IN)
    assert_fp64(layer(x), formula(layer, m, x))


def test_the_official_layer_in_fp32():
    """Its loop, without dropout: heads one after another, each with A of its own product, weights from an fp32 softmax; to 1e-5."""
    layer, m = built(heads=3, dtype=torch.float32)
    x = torch.randn(4, 7, IN)
    with torch.no_grad():
        weights = torch.nn.functional.softmax(torch.nn.functional.linear(x, m.G), dim=-1, dtype=torch.float32)
        result = torch.nn.functional.linear(x, layer.weight, layer.bias)
        for i, B in enumerate(m.B.split(RANK, 1)):
            low = torch.nn.functional.linear(torch.nn.functional.linear(x, m.A), B)
            result = result + torch.unsqueeze(weights[:, :, i], -1) * low * (ALPHA / RANK)
        assert (layer(x) - result).abs().max() <= 1e-5 * result.abs().max()


def test_starts_as_published_and_the_router_breaks_the_tie():
    layer = fastpeft.AdaptedLinear(256, 64, method="hydralora", rank=16, heads=16)
    m = layer.adapter.hydralora
    assert m.A.shape == (16, 256) and m.B.shape == (64, 256) and m.G.shape == (16, 256) and not m.B.any()
    for factor in (m.A, m.G):
        assert 0.95 / 16 < factor.abs().max() <= 1 / 16
    layer(torch.randn(32, 256)).square().sum().backward()
    assert not m.G.grad.any(), "with B = 0 the router has no gradient yet"
    one, two = m.B.grad.split(16, dim=1)[:2]
    assert (one - two).abs().max() > 0.01 * one.abs().max(), "equal gradients would keep the heads equal for ever"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_as_good_as_plain_pytorch_on_a_bf16_base(dropout):
    """fp32 factors on a bf16 base: output and gradients against the formula in fp64, beside the formula in bf16."""
    from checks import seed_after

    layer, m = built(heads=3, dtype=torch.bfloat16, dropout=dropout)
    own = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert {p.dtype for p in own.values()} == {torch.float32}
    x, d = torch.randn(64, IN, dtype=torch.bfloat16), torch.randn(64, OUT, dtype=torch.bfloat16)
    mask = fastpeft.dropout_mask(seed_after(5), x.shape, dropout) if dropout else None
    seen = []
    for kind in ("ours", "exact", "plain"):
        leaf = (x.double() if kind == "exact" else x).requires_grad_()
        at = None if mask is None else mask.to(leaf.dtype)
        seed_after(5)
        y = layer(leaf) if kind == "ours" else formula(layer, m, leaf, at)
        seen.append({"y": y} | dict(zip(("x", *own), torch.autograd.grad(y, (leaf, *own.values()), d.to(y.dtype)), strict=True)))
    for name, got in seen[0].items():
        assert_as_good(got, seen[1][name].double(), seen[2][name], name)


def test_one_head_merges_and_exports(tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "hydralora", heads=1)
    want = perturb(model).eval()(x)
    fastpeft.export_lora(model, tmp_path)
    assert_fp64(peft_logits(plain, tmp_path, x), want)
    assert_fp64(fastpeft.merge(model)(x), want)


def test_several_heads_do_neither(tmp_path):
    model = MLP()
    fastpeft.adapt(model, "hydralora", heads=2)
    for refuse in (fastpeft.merge, lambda m: fastpeft.export_lora(m, tmp_path / "out")):
        with pytest.raises(ValueError, match="token-dependent"):
            refuse(perturb(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(heads=0), ValueError, r"hydralora: heads=0 at 'linear'; it must be at least 1"),
        (dict(heads=2.0), TypeError, r"heads=2.0.*int"),
        (dict(heads=True), TypeError, r"heads=True"),
        (dict(rank=11), ValueError, r"hydralora: rank=11.*1 to 10"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "hydralora", **options)
