"""PEFT models of each family that accelerate knows, and the comparison of an accelerated one with a stock copy."""

from __future__ import annotations

import copy

import peft
import torch
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft

IN, MID, OUT = 24, 20, 12


def lora(**options):
    return lambda names: peft.LoraConfig(r=4, lora_alpha=10, target_modules=names, **options)


FAMILIES = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "lora_bias": lora(lora_bias=True),
    "pissa": lora(init_lora_weights="pissa"),
    "dora": lora(use_dora=True),
    "adalora": lambda names: peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=7, total_step=10, target_modules=names),
    # a scale that fp32 holds: PEFT rounds LoHa's to it
    "loha": lambda names: peft.LoHaConfig(r=4, alpha=10, target_modules=names),
    "lokr": lambda names: peft.LoKrConfig(r=2, alpha=10, target_modules=names),
    "lokr_both": lambda names: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=names),
    "shira": lambda names: peft.ShiraConfig(r=2, target_modules=names, random_seed=1),
}
# what fused_calls says of each
COUNTED = {"rslora": "lora", "lora_bias": "lora", "pissa": "lora", "lokr_both": "lokr"}


def counted(family):
    return COUNTED.get(family, family)


class Net(nn.Module):
    """Two linears with a tanh between; `kind` makes them."""

    def __init__(self, kind=nn.Linear, bias=True):
        super().__init__()
        own = {} if kind is not nn.Linear else {"bias": bias}
        self.up, self.down = kind(IN, MID, **own), kind(MID, OUT, **own)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def conv1d(i, o):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(o, i)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias, std=0.3)
    return layer


def moved(model, size=0.3, seed=3):
    """Every trainable number away from its start, the same in every model of one seed; magnitudes stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_(noise.abs() if "magnitude" in name else noise)
    return model


def stock(family, net=None, names=("up", "down"), dtype=torch.float64, **changes):
    """A PEFT model of this family with its adapters moved, base and adapters in `dtype`."""
    torch.manual_seed(1)
    net = Net() if net is None else net
    config = FAMILIES[family](list(names))
    for key, value in changes.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    model = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
    return moved(model.to(dtype)).train()


def accelerated(model):
    """A copy of the model, accelerated."""
    ours = copy.deepcopy(model)
    fastpeft.accelerate(ours)
    fastpeft.reset_calls()
    return ours


def inputs(*lead, dtype=torch.float64, features=IN):
    torch.manual_seed(2)
    return torch.randn(*(lead or (3, 5)), features, dtype=torch.float64).to(dtype)


def outcome(model, x, autocast=None):
    """{name: y, x's gradient, every trainable parameter's}; autocast: a dtype, or None."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    torch.manual_seed(4)
    d = torch.randn(y.shape).to(torch.bfloat16).to(y.dtype)  # the same numbers in every dtype
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *own.values()], d, allow_unused=True)
    return {"y": y.detach(), "x": grads[0]} | dict(zip(own, grads[1:], strict=True))


def assert_same(got, want):
    """Every value in fp64, and that none of the gradients vanishes."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value is not None and value.abs().max() > 1e-6, f"{name} vanishes, so this shows nothing"
        assert_fp64(got[name], value, name)


def assert_rule(got, exact, plain):
    """Every value by the tolerance rule: beside stock PEFT in the same dtypes, against stock PEFT in fp64."""
    assert got.keys() == exact.keys() == plain.keys()
    for name in exact:
        assert_as_good(got[name], exact[name], plain[name], name)
