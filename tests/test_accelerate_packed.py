"""accelerate over bitsandbytes' 4-bit and 8-bit layers, beside stock PEFT on the same packed weights."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from accelerated import accelerated, assert_rule, counted, moved, outcome  # noqa: E402
from test_bitsandbytes_layers import KINDS, Net, build, dense, inputs  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=10, target_modules=["up", "down"]),
    "lora_bias": lambda: peft.LoraConfig(r=4, lora_alpha=10, lora_bias=True, target_modules=["up", "down"]),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, target_modules=["up", "down"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=10, target_modules=["up", "down"]),
}


def over(net, kind, family, size=0.05):
    """The PEFT model of this family over the layers as they are; fp32 adapters, small beside the weight."""
    if kind is not None:
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind != "int8", kind == "int8"
    return moved(peft.get_peft_model(net, CONFIGS[family]()).train(), size)


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
@pytest.mark.parametrize("autocast", [None, BF16])
def test_beside_stock_peft(family, kind, autocast):
    theirs = over(build(kind), kind, family)
    dense_net = Net(*(dense(getattr(theirs.base_model.model, n).base_layer) for n in ("up", "down")))
    exact = over(dense_net, None, family)
    exact.load_state_dict({k: v for k, v in theirs.state_dict().items() if "base_layer" not in k}, strict=False)
    exact = exact.double()
    ours = accelerated(theirs)
    x = inputs()
    got, plain = outcome(ours, x, autocast=autocast), outcome(theirs, x, autocast=autocast)
    assert_rule(got, outcome(exact, x.double()), plain)
    if kind == "int8" and family == "adalora" and autocast is not None:
        assert not fastpeft.fused_calls() and all("8 bits" in why for _, why in fastpeft.peft_calls())
    else:
        assert fastpeft.fused_calls() == {counted(family): 2}, fastpeft.peft_calls()


def test_fp32_adapters_over_a_bf16_computation():
    """The QLoRA of today without autocast: x in bf16, computed in bf16, adapters in fp32."""
    theirs = over(build("nf4", BF16), "nf4", "lora")
    exact = over(Net(*(dense(getattr(theirs.base_model.model, n).base_layer) for n in ("up", "down"))), None, "lora")
    exact.load_state_dict({k: v for k, v in theirs.state_dict().items() if "base_layer" not in k}, strict=False)
    ours = accelerated(theirs)
    x = inputs(BF16)
    assert_rule(outcome(ours, x), outcome(exact.double(), x.double()), outcome(theirs, x))
    assert fastpeft.fused_calls() == {"lora": 2}


def test_the_dtype_it_computes_in_is_chosen_as_bitsandbytes_does():
    """Linear4bit takes its first input's dtype; the fused forward makes that same choice."""
    chosen = []
    for model in (over(build("nf4"), "nf4", "lora"), accelerated(over(build("nf4"), "nf4", "lora"))):
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.base_layer.compute_type_is_set = False
        model.to(BF16)(inputs(BF16))
        chosen.append([m.compute_dtype for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)])
    assert chosen[0] == chosen[1] == [BF16, BF16]


def test_a_repacked_weight_is_pefts():
    """After a forward in eval mode on some CPUs a 4-bit weight has another layout, which we do not read; not quantised: nor that."""
    ours = accelerated(over(build("nf4"), "nf4", "lora"))
    theirs = copy.deepcopy(ours)
    fastpeft.restore(theirs)
    for model in (ours, theirs):
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    found = fastpeft.accelerate(ours)
    assert len(found.unfused) == 2 and all("repacked" in reason for reason in found.unfused.values())
    assert set(KINDS) >= {"nf4", "int8"}
