"""A stock PEFT LoRA layer with given factors, and one comparison: our layer against it, in the output and every gradient."""

from __future__ import annotations

import copy
import json

import peft
import torch
from checks import DT, seed_after
from tolerance import assert_fp64
from torch import nn

import fastpeft

LEADS = [(9,), (3, 5)]


class Mask(nn.Module):
    """PEFT's dropout, with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def peft_lora(layer, A, B, alpha, mask=None):
    """PEFT's LoRA of rank len(A) over layer's weight and bias, in training mode."""
    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=DT)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    config = peft.LoraConfig(r=A.shape[0], lora_alpha=alpha, target_modules=["0"])
    lora = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0].to(DT)
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(A)
        lora.lora_B["default"].weight.copy_(B)
    if mask is not None:
        lora.lora_dropout["default"] = Mask(mask)
    return lora.train()


def moved(layer):
    """Every parameter of the adapter away from its start, the frozen ones too."""
    with torch.no_grad():
        for p in layer.adapter.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return layer.train()


def assert_equals_peft(layer, compose, alpha, lead, dropout=0.0):
    """compose() -> PEFT's (A, B) from the layer's parameters, differentiable: it carries PEFT's gradients back to them."""
    x = torch.randn(*lead, layer.in_features, dtype=DT, requires_grad=True)
    mask = None
    if dropout:
        mask = fastpeft.dropout_mask(seed_after(31), x.shape, dropout)
        assert (mask == 0).any() and (mask != 0).any()
    A, B = compose()
    theirs = peft_lora(layer, A, B, alpha, mask)
    seed_after(31)
    y, z = layer(x), theirs(x)
    assert (z - theirs.base_layer(x)).abs().max() > 0.1, "the adapter does nothing"
    assert_fp64(y, z, "y")
    d = torch.randn_like(y)
    own = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    factors = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    dx, dA, dB = torch.autograd.grad(z, (x, *factors), d)
    through = [(f, g) for f, g in ((A, dA), (B, dB)) if f.requires_grad]
    want = torch.autograd.grad([f for f, _ in through], list(own.values()), [g for _, g in through])
    got = torch.autograd.grad(y, (x, *own.values()), d)
    for name, g, w in zip(("x", *own), got, (dx, *want), strict=True):
        assert w.abs().max() > 1e-3, f"the gradient of {name} vanishes, so this shows nothing"
        assert_fp64(g, w, name)


def peft_logits(plain, folder, x):
    """What stock PEFT computes from an adapter folder over a copy of the plain model."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(folder), autocast_adapter_dtype=False).eval()(x)


def assert_exports(model, plain, folder, x, *ranks):
    """The exported folder has these ranks and no other; stock PEFT computes from it what the model does, and so do merged weights."""
    want = model.eval()(x)
    fastpeft.export_lora(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == set(ranks)
    assert_fp64(peft_logits(plain, folder, x), want)
    assert_fp64(fastpeft.merge(model)(x), want)
