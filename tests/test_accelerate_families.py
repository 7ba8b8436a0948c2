"""accelerate against stock PEFT in fp64: outputs and every gradient, for every family and state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpeft

peft = pytest.importorskip("peft")

from accelerated import (  # noqa: E402
    FAMILIES,
    Net,
    accelerated,
    assert_same,
    conv1d,
    counted,
    inputs,
    outcome,
    stock,
)
from checks import seed_after  # noqa: E402
from peft_layers import Mask  # noqa: E402

families = pytest.mark.parametrize("family", list(FAMILIES))
TRANSPOSED = ["lora", "lora_bias", "dora", "adalora"]


@families
@pytest.mark.parametrize("lead", [(9,), (3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(family, lead, bias):
    theirs = stock(family, Net(bias=bias))
    ours = accelerated(theirs)
    assert_same(outcome(ours, inputs(*lead)), outcome(theirs, inputs(*lead)))
    assert fastpeft.fused_calls() == {counted(family): 2} and not fastpeft.peft_calls()
    assert_same(outcome(ours.eval(), inputs(*lead)), outcome(theirs.eval(), inputs(*lead)))


@pytest.mark.parametrize("family", TRANSPOSED)
def test_conv1d(family):
    theirs = stock(family, Net(conv1d), fan_in_fan_out=True)
    ours = accelerated(theirs)
    assert_same(outcome(ours, inputs()), outcome(theirs, inputs()))
    assert fastpeft.fused_calls() == {counted(family): 2}


@pytest.mark.parametrize("family", ["lora", "rslora", "lora_bias", "dora", "adalora"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_pefts_law(family, p):
    """PEFT with our mask in the place of its own; in eval neither drops."""
    theirs = stock(family, nn.Sequential(nn.Linear(IN, 10)), ["0"], lora_dropout=p)
    ours = accelerated(theirs)
    layer, x = theirs.base_model.model[0], inputs(40)
    layer.lora_dropout["default"] = Mask(fastpeft.dropout_mask(seed_after(5), x.shape, p))
    seed_after(5)
    got = outcome(ours, x)
    assert_same(got, outcome(theirs, x))
    layer.lora_dropout["default"] = nn.Identity()
    still = outcome(ours.eval(), x)
    assert_same(still, outcome(theirs.eval(), x))
    assert not torch.equal(still["y"], got["y"]) and fastpeft.fused_calls() == {counted(family): 2}


IN = 24


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("pissa", "dora", "adalora")])
def test_two_adapters(family):
    """Both active, then the second alone, then the first: the layer is read anew in each forward."""
    theirs = stock(family)
    second = FAMILIES[family](["up"])
    if family == "shira":
        second.random_seed = 7
    theirs.add_adapter("other", second)
    theirs = theirs.double()
    for names in (["default", "other"], ["other"], ["default"]):
        theirs.base_model.set_adapter(names)
        from accelerated import moved

        moved(theirs, seed=len(names))
        ours = accelerated(theirs)
        assert_same(outcome(ours, inputs()), outcome(theirs, inputs()))
        # `other` has nothing in `down`
        assert fastpeft.fused_calls() == {counted(family): 2 - (names == ["other"])}, names


def test_adapters_of_two_families_at_once():
    """LoRA beside DoRA, two DoRA, and two with dropout, are PEFT's to compute, and equal it."""
    for first, second, options, reason in (
        ("lora", "dora", {}, "DoRA beside"), ("dora", "dora", {}, "DoRA beside"), ("lora", "lora", {"lora_dropout": 0.1}, "several"),
    ):  # fmt: skip
        theirs = stock(first, **options)
        theirs.add_adapter("other", FAMILIES[second](["up", "down"]))
        theirs.double().base_model.set_adapter(["default", "other"])
        ours = accelerated(theirs.train())
        torch.manual_seed(8)
        got = outcome(ours, inputs())
        torch.manual_seed(8)
        want = outcome(theirs, inputs())
        assert all(torch.equal(got[n], want[n]) for n in want if want[n] is not None)
        assert not fastpeft.fused_calls() and all(reason in why for _, why in fastpeft.peft_calls()), fastpeft.peft_calls()


@families
def test_merged_disabled_and_back(family):
    theirs = stock(family)
    ours = accelerated(theirs)
    x = inputs()
    want = outcome(theirs, x)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
        assert fastpeft.accelerate(ours).fused == []
    assert fastpeft.accelerate(ours).fused != []
    ours.merge_adapter(), theirs.merge_adapter()
    assert torch.equal(ours(x), theirs(x))
    assert not fastpeft.fused_calls()
    ours.unmerge_adapter()
    assert_same(outcome(ours, x), want)
    ours.merge_adapter()
    with ours.disable_adapter():  # PEFT unmerges in forward here
        assert (ours(x) - want["y"]).abs().max() > 1e-3
    assert_same(outcome(ours, x), want)
    merged = ours.merge_and_unload()
    assert type(merged.up) is nn.Linear and torch.allclose(merged(x), want["y"])


def test_base_weights_that_train():
    """An unfrozen weight and bias get PEFT's gradients."""
    for family in ("lora", "dora", "lokr"):
        theirs = stock(family)
        for p in theirs.parameters():
            p.requires_grad_(True)
        ours = accelerated(theirs)
        assert_same(outcome(ours, inputs()), outcome(theirs, inputs()))
        assert fastpeft.fused_calls() == {counted(family): 2}


def test_a_batch_of_several_adapters():
    theirs = stock("lora")
    theirs.add_adapter("other", FAMILIES["lora"](["up"]))
    ours = accelerated(theirs.double().eval())
    names = ["default", "__base__", "other"]
    assert torch.equal(ours(inputs(), adapter_names=names), theirs(inputs(), adapter_names=names))
    assert not fastpeft.fused_calls() and all("adapter_names" in why for _, why in fastpeft.peft_calls())


def test_dropouts_of_lycoris_are_pefts():
    """rank_dropout and module_dropout act in training only."""
    for family in ("loha", "lokr"):
        for option in ("rank_dropout", "module_dropout"):
            theirs = stock(family, **{option: 0.5})
            ours = accelerated(theirs)
            torch.manual_seed(6)
            got = ours(inputs())
            torch.manual_seed(6)
            assert torch.equal(got, theirs(inputs())) and not fastpeft.fused_calls()
            assert_same(outcome(ours.eval(), inputs()), outcome(theirs.eval(), inputs()))
            assert fastpeft.fused_calls() == {family: 2}


def test_zero_rows_stay_finite_under_dora():
    """The one result that is ours on purpose: PEFT divides by the zero norm of such a row."""
    net = Net().double()
    with torch.no_grad():
        net.up.weight[3] = 0
    config = FAMILIES["dora"](["up"])
    theirs = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
    ours = accelerated(theirs)
    assert theirs(inputs()).isnan().any()
    got = outcome(ours, inputs())
    assert all(g.isfinite().all() for g in got.values())
    assert torch.allclose(got["y"], net.down(torch.tanh(net.up.base_layer(inputs()))))
