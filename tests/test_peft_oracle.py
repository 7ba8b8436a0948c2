"""lora and dora against stock PEFT: outputs and every gradient, with PEFT's dropout replaced by our mask."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import seed_after
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft

peft = pytest.importorskip("peft")

IN, OUT, P = 24, 20, 0.3


class Mask(nn.Module):
    """PEFT's dropout, with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask.to(x.dtype)


def build(dtype, bias, rank, alpha, dropout, dora, rslora, lora_bias):
    """(our model, PEFT's model) with equal weights; B, the magnitude and biases moved away from their start."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=torch.float64))
    ours = copy.deepcopy(model).to(dtype)
    own = {} if dora else {"lora_bias": lora_bias}
    fastpeft.adapt(ours, "dora" if dora else "lora", rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, **own)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, use_rslora=rslora,
                             lora_bias=lora_bias, target_modules=["0"])  # fmt: skip
    theirs = peft.get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False).to(dtype).train()
    layer = theirs.base_model.model[0]
    adapter = ours[0].adapter.dora if dora else ours[0].adapter.lora
    pairs = {"A": (adapter.A, layer.lora_A["default"].weight), "B": (adapter.B, layer.lora_B["default"].weight)}
    if dora:
        pairs["m"] = (adapter.m, layer.lora_magnitude_vector["default"].weight)
        torch.testing.assert_close(adapter.m, layer.lora_magnitude_vector["default"].weight)
    if lora_bias:
        pairs["bias"] = (adapter.bias, layer.lora_B["default"].bias)
    torch.manual_seed(12)
    with torch.no_grad():
        for name, (p, q) in pairs.items():
            value = torch.randn(p.shape, dtype=torch.float64)
            value = value.abs() + 0.5 if name == "m" else value / 4
            p.copy_(value), q.copy_(value)
    return ours.train(), theirs, layer, pairs


def gaps(dtype, lead, *, bias=True, rank=4, alpha=10.0, dropout=0.0, dora=False, rslora=False, lora_bias=False):
    """{name: (ours, PEFT's)} of the output and of every gradient."""
    ours, theirs, layer, pairs = build(dtype, bias, rank, alpha, dropout, dora, rslora, lora_bias)
    torch.manual_seed(13)
    x = torch.randn(*lead, IN, dtype=torch.float64).to(dtype).requires_grad_()
    d = torch.randn(*lead, OUT, dtype=torch.float64).to(dtype)
    seed = seed_after(14)
    if dropout:
        mask = fastpeft.dropout_mask(seed, x.shape, dropout)
        assert (mask == 0).any() and (mask != 0).any()
        layer.lora_dropout["default"] = Mask(mask)
    y, z = ours(x), theirs(x)
    left = torch.autograd.grad(y, [x, *(p for p, _ in pairs.values())], d)
    right = torch.autograd.grad(z, [x, *(q for _, q in pairs.values())], d)
    named = dict(zip(("x", *pairs), zip(left, right, strict=True), strict=True))
    return {"y": (y.detach(), z.detach())} | named


CASES = [
    dict(rank=1, alpha=3.0),
    dict(rank=4, alpha=10.0, bias=False),
    dict(rank=16, alpha=5.0, rslora=True),
    dict(rank=4, alpha=10.0, dropout=P),
    dict(rank=7, alpha=2.0, dropout=P, bias=False),
]
LORA = [*CASES, dict(rank=4, alpha=10.0, lora_bias=True), dict(rank=4, alpha=10.0, lora_bias=True, dropout=P)]
ALL = [*LORA, *(case | {"dora": True} for case in CASES)]
LEADS = [(9,), (3, 5)]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_peft_in_fp64(case, lead):
    for name, (got, want) in gaps(torch.float64, lead, **case).items():
        assert_fp64(got, want, name)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_as_good_as_peft_in_fp32(case):
    exact, low = gaps(torch.float64, (32, 8), **case), gaps(torch.float32, (32, 8), **case)
    for name, (got, plain) in low.items():
        assert_as_good(got, exact[name][1], plain, name)
