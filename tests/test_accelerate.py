"""What accelerate changes, which is each layer's class, and what stays PEFT's: keys, files, adapters, copies, hooks, refusals."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

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
    counted,
    inputs,
    moved,
    outcome,
    stock,
)

families = pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("pissa", "rslora", "lokr_both")])


def layers(model):
    return model.base_model.model.up, model.base_model.model.down


@families
def test_only_the_class_changes(family, tmp_path):
    model = stock(family)
    classes, shown = [type(m) for m in layers(model)], repr(model)
    keys, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
    hook = layers(model)[0].register_forward_hook(lambda m, a, y: y * 2)
    hooked = model(inputs())
    model.save_pretrained(tmp_path / "before")
    report = fastpeft.accelerate(model)
    assert report.fused == ["base_model.model.up", "base_model.model.down"] and not report.unfused
    assert all(issubclass(type(m), c) and type(m) is not c for m, c in zip(layers(model), classes, strict=True))
    assert all("Linear" in type(m).__name__ for m in layers(model))
    assert repr(model) == shown and list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == objects
    torch.testing.assert_close(model(inputs()), hooked)  # hooks on the layer itself go on
    hook.remove()
    model.save_pretrained(tmp_path / "after")
    files = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert "adapter_model.safetensors" in files and sorted(p.name for p in (tmp_path / "after").iterdir()) == files
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    again = {n: type(m) for n, m in model.named_modules()}
    assert fastpeft.accelerate(model).fused == report.fused and {n: type(m) for n, m in model.named_modules()} == again
    assert fastpeft.restore(model) == 2 and [type(m) for m in layers(model)] == classes and fastpeft.restore(model) == 0


@families
def test_copies_and_pickles_are_accelerated_too(family):
    ours = accelerated(stock(family))
    want = outcome(ours, inputs())
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(stream, weights_only=False)):
        fastpeft.reset_calls()
        assert_same(outcome(twin, inputs()), want)
        assert fastpeft.fused_calls() == {counted(family): 2}
        moved(twin)
        assert torch.equal(ours(inputs()), want["y"])


def test_in_a_new_process(tmp_path):
    """A pickle loads where the classes do not exist yet; nothing is imported or changed before it is asked for."""
    torch.save(layers(accelerated(stock("lora")))[0], tmp_path / "layer.pt")
    code = """if True:
        import sys, fastpeft
        assert "peft" not in sys.modules and "fastpeft.accelerated" not in sys.modules
        fastpeft.accelerate
        assert "peft" not in sys.modules
        import peft, torch
        before = dict(peft.tuners.lora.Linear.__dict__)
        layer = torch.load(sys.argv[1], weights_only=False)
        layer(torch.zeros(2, 24).double())
        assert dict(peft.tuners.lora.Linear.__dict__) == before
        print(type(layer).__name__, fastpeft.fused_calls())
    """
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "layer.pt"], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "FusedLoraLinear {'lora': 1}", done.stderr


def test_adapters_come_and_go():
    """Added, switched, retrained and deleted after accelerate; a further layer waits for the next call."""
    theirs = stock("lora", names=["up"])
    ours = accelerated(theirs)
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
        model.double().set_adapter("other")
        moved(model)
    assert_same(outcome(ours, inputs()), outcome(theirs, inputs()))
    assert fastpeft.fused_calls() == {"lora": 1}
    assert fastpeft.accelerate(ours).fused == ["base_model.model.up", "base_model.model.down"]
    assert_same(outcome(ours, inputs()), outcome(theirs, inputs()))
    assert fastpeft.fused_calls() == {"lora": 3}
    for model in (ours, theirs):
        model.delete_adapter("other")
        model.set_adapter("default")
    assert_same(outcome(ours, inputs()), outcome(theirs, inputs()))
    assert fastpeft.fused_calls() == {"lora": 4}


@pytest.mark.parametrize("family", ["lora", "dora", "loha", "lokr", "shira"])
def test_a_changed_scale_is_seen(family):
    ours = accelerated(stock(family))
    theirs = copy.deepcopy(ours)
    fastpeft.restore(theirs)
    before = outcome(ours, inputs())["y"]
    for model in (ours, theirs):
        for layer in layers(model):
            layer.set_scale("default", 3.0)
    got = outcome(ours, inputs())
    assert_same(got, outcome(theirs, inputs()))
    assert not torch.equal(got["y"], before) and fastpeft.fused_calls() == {family: 4}


@pytest.mark.parametrize("family", ["lora", "dora", "adalora", "loha", "lokr", "shira"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(family, reentrant):
    """Gradients with activation checkpointing equal those without; with dropout the recompute draws the same mask."""
    dropped = family in ("lora", "dora", "adalora")
    ours = accelerated(stock(family, **({"lora_dropout": 0.3} if dropped else {})))
    x = inputs()
    torch.manual_seed(9)
    want = outcome(ours, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ours

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    model = Checkpointed()
    torch.manual_seed(9)
    if reentrant:  # takes no autograd.grad
        x = x.clone().requires_grad_()
        y = model(x)
        torch.manual_seed(4)
        y.backward(torch.randn(y.shape).to(torch.bfloat16).to(y.dtype))
        got = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    else:
        got = {n.removeprefix("inner."): v for n, v in outcome(model, x).items()}
    assert_same(got, want)
    assert fastpeft.fused_calls() == {family: 6}


def test_what_is_not_fused_is_listed_with_its_reason():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv = nn.Embedding(5, 8), nn.Conv1d(8, 8, 1)
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            self.mha = nn.MultiheadAttention(8, 2)

    model = peft.get_peft_model(Whole(), peft.LoraConfig(target_modules=["emb", "conv", "a", "b", "c", "d", "mha"]))
    inner = model.base_model.model
    inner.b.base_layer.register_forward_hook(lambda m, a, y: None)
    inner.c.forward = inner.c.forward
    inner.d.lora_A["default"].__class__ = type("Sharded", (nn.Linear,), {})
    report = fastpeft.accelerate(model)
    short = {n.rpartition("model.")[2]: reason for n, reason in report.unfused.items()}
    assert report.fused == ["base_model.model.a"]
    assert short == {
        "emb": "no fused form for peft.tuners.lora.layer.Embedding",
        "conv": "no fused form for peft.tuners.lora.layer.Conv1d",
        "b": "the base layer has hooks, or a forward of its own",
        "c": "its forward was replaced on the instance",
        "d": "lora_A or lora_B is a Sharded / Linear and no nn.Linear",
        "mha": "no fused form for peft.tuners.lora.layer.MultiheadAttention",
        "mha.base_layer.out_proj": "nn.MultiheadAttention reads the weight of this layer and never calls it",
    }
    assert str(report).splitlines()[0] == "1 of 8 layers fused" and "Embedding" in str(report)
    x = torch.randn(4, 8)
    for name in "abcd":  # and all of them compute
        getattr(inner, name)(x)
    inner.mha(x, x, x)


def test_strict_refuses_before_it_changes_anything():
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"]))
    model.add_adapter("velora", peft.LoraConfig(target_modules=["down"], use_dora=True, lora_bias=False))
    model.base_model.set_adapter(["default", "velora"])
    assert fastpeft.accelerate(model, strict=True).fused == ["base_model.model.up", "base_model.model.down"]
    fastpeft.restore(model)
    layers(model)[1].lora_dropout["velora"] = nn.AlphaDropout(0.1)
    with pytest.raises(ValueError, match=r"base_model.model.down.*AlphaDropout"):
        fastpeft.accelerate(model, strict=True)
    assert [type(m).__name__ for m in layers(model)] == ["Linear", "Linear"]
    with model.disable_adapter():  # nothing for PEFT to compute here
        assert len(fastpeft.accelerate(model, strict=True).idle) == 2


def test_no_peft_layer_no_module():
    with pytest.raises(ValueError, match="no layer of PEFT's"):
        fastpeft.accelerate(Net())
    with pytest.raises(TypeError, match="got a str"):
        fastpeft.accelerate("model")


def test_a_class_derived_from_ours_is_not_restored_blindly():
    ours = accelerated(stock("lora"))
    up, down = layers(ours)
    up.__class__ = type("Sharded", (type(up),), {})
    with pytest.raises(RuntimeError, match="Sharded"):
        fastpeft.restore(ours)
    assert isinstance(down, type(up).__mro__[1])


def test_functional_transforms_and_traces_run_peft():
    ours = accelerated(stock("lora").eval())
    x = inputs(4)
    torch.func.vmap(ours)(x), torch.func.jvp(ours, (x,), (x,)), torch.jit.trace(ours, (x,), check_trace=False)
    assert not fastpeft.fused_calls() and all("functorch" in why for _, why in fastpeft.peft_calls())


def test_shira_with_a_support_out_of_order_is_pefts():
    ours = accelerated(stock("shira"))
    theirs = copy.deepcopy(ours)
    fastpeft.restore(theirs)
    for model in (ours, theirs):
        index = layers(model)[0].shira_indices["default"]
        order = torch.arange(index.shape[1]).flip(0)
        index.copy_(index[:, order])  # in place: looked at once already
    ours(inputs())
    assert_same(outcome(ours, inputs()), outcome(theirs, inputs()))
    assert fastpeft.fused_calls() == {"shira": 2} and any("row-major" in why for _, why in fastpeft.peft_calls())
