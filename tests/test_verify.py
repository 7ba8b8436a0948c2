"""fastpeft.verify: every method passes it, in every mode and dtype, and faults of the fused path do not."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from checks import perturb, with_masks
from job_models import tiny_model
from torch import nn

import fastpeft
from fastpeft import linear as linear_module
from fastpeft.base import Plain
from fastpeft.cli import main
from fastpeft.grouping import Limit
from fastpeft.ops import lowrank, lowrank_cpu
from fastpeft.registry import Method, every_recipe
from fastpeft.terms import Grouped, LowRank
from fastpeft.verification import Difference, untrained, verify

LINEAR = [r.name for r in every_recipe() if r.site == "linear" and not r.cls.ROUTED]


def two_layers(method, dtype, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)
    fastpeft.adapt(model, method, **options)
    return perturb(with_masks(model), 0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_every_method_is_right(name, dtype):
    model = two_layers(name, dtype).eval()
    before = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters()}
    found = verify(model, torch.randn(2, 5, 24, dtype=dtype))
    assert found.right, str(found)
    assert set(found.layers) == {"0", "2"} and not found.unreached and not found.untested
    trains = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("0.") and "adapter_shared" not in n}
    own = {f"0.{what}" for what in found.layers["0"] if ".shared." not in what}
    assert trains <= own and {"0.y", "0.dx"} <= own
    assert all(d.size > 0 for what, d in found.layers["2"].items() if what in ("y", "dx"))
    assert all(torch.equal(p, before[n][0]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["lora", "dora", "melora", "hydralora", "sora", "prolora"])
def test_dropout_is_compared_with_its_own_mask(name):
    model = two_layers(name, torch.float64, dropout=0.4)
    found = verify(model.train(), torch.randn(7, 24, dtype=torch.float64))
    assert found.right and model.training, str(found)


@pytest.mark.parametrize("name", ["delta_lora", "periodic_lora", "galore"])
def test_in_training_under_a_procedure(name):
    """These do not run in training without one; the copy that the truth comes from has none of its own."""
    model = two_layers(name, torch.float64).train()
    x = torch.randn(7, 24, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, Method):
            module.attached = True
    found = verify(model, x)
    assert found.right and not found.untested, str(found)


def test_the_truth_is_no_kernels(monkeypatch):
    """fp64 is what no Triton kernel takes: asked for by name, Triton still has nothing to do with what it is held against."""
    from fastpeft.ops import family

    asked = []
    resolve = family.resolve
    monkeypatch.setattr("fastpeft.ops.rownorm.resolve", lambda impl, device, *d: asked.append(os.environ.get("FASTPEFT_IMPL")) or resolve("torch", device, *d))
    monkeypatch.setattr("fastpeft.linear.resolve", lambda impl, device, *d: resolve("torch", device, *d))
    monkeypatch.setenv("FASTPEFT_IMPL", "triton")
    assert verify(two_layers("dora", torch.float32, grad="full").eval(), torch.randn(3, 24)).right
    assert set(asked) == {"triton", "torch"} and os.environ["FASTPEFT_IMPL"] == "triton"


def test_the_generator_is_left_alone():
    model, x = two_layers("lora", torch.float32, dropout=0.5), torch.randn(3, 24)
    state = torch.get_rng_state()
    verify(model.train(), x)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_bases_and_autocast(quantize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    fastpeft.adapt(model, "lora", quantize=quantize)
    perturb(model)
    assert verify(model, torch.randn(4, 64)).right
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = verify(model, torch.randn(4, 64))
    assert found.right and found.layers["0"]["y"].dtype == "bfloat16"


FAULTS = {
    "a scale": lambda m: m.setattr(lowrank, "up_add", lambda z, v, B, s, n, own=lowrank.up_add: own(z, v, B, 1.02 * s, n)),
    "dB": lambda m: m.setattr(lowrank, "db", lambda *a, own=lowrank.db: 0.98 * own(*a)),
    "dA": lambda m: m.setattr(lowrank, "da", lambda *a, own=lowrank.da, **k: -own(*a, **k)),
    "dx": lambda m: m.setattr(lowrank, "dx", lambda *a, own=lowrank.dx, **k: 1.01 * own(*a, **k)),
    "NaN": lambda m: m.setattr(lowrank, "db", lambda *a, own=lowrank.db: own(*a) * math.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, monkeypatch):
    model, x = two_layers("lora", torch.float64), torch.randn(6, 24, dtype=torch.float64)
    monkeypatch.setattr(lowrank_cpu, "runs", lambda *a: False)
    monkeypatch.setattr(lowrank_cpu, "writes", lambda *a: False)
    assert verify(model, x).right
    FAULTS[fault](monkeypatch)
    found = verify(model, x)
    assert not found.right and found.wrong, str(found)
    assert "WRONG" in str(found)


def test_a_fault_in_half_precision_is_told_from_rounding(monkeypatch):
    model, x = two_layers("lora", torch.bfloat16), torch.randn(64, 24).bfloat16()
    own = linear_module.run_terms

    def off(x, base, bias, terms, **more):
        return own(x, base, bias, [LowRank(t.A, t.B, 1.5 * t.scale) for t in terms], **more)

    assert verify(model, x).right
    monkeypatch.setattr("fastpeft.adapter.run_terms", off)
    assert not verify(model, x).right


def test_limits_of_a_difference():
    assert Difference(2.0, 1.0, 0.0, "float32").right and not Difference(2.1, 1.0, 0.0, "float32").right
    assert not Difference(float("nan"), 1.0, 1.0, "float32").right and not Difference(float("inf"), 1.0, 1.0, "float32").right
    assert Difference(2.0**-7, 0.0, 1.0, "bfloat16").right and not Difference(2.0**-6, 0.0, 1.0, "bfloat16").right


class Scored(nn.Module):
    def __init__(self, model, cut=False):
        super().__init__()
        self.model, self.cut = model, cut

    def forward(self, x):
        y = self.model[0](x)
        return self.model[2](y.detach() if self.cut else y).square().sum()


def test_a_step_has_to_reach_every_parameter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    fastpeft.adapt(model, "lora", rank=2)  # B is zero: A has a gradient only after a step
    x, before = torch.randn(5, 24), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert verify(Scored(model), x).untrained == {}
    found = verify(Scored(model, cut=True), x)
    assert set(found.untrained) == {"model.0.adapter.lora.A", "model.0.adapter.lora.B"}
    assert found.untrained["model.0.adapter.lora.B"] == "the loss does not depend on it"
    model[2].adapter.lora.A.data.zero_()  # a saddle: neither factor ever moves
    assert set(untrained(Scored(model), x)) == {"model.2.adapter.lora.A", "model.2.adapter.lora.B"}
    model[2].adapter.lora.A.data.fill_(math.nan)
    assert "is not finite" in untrained(Scored(model), x)["model.2.adapter.lora.B"]
    assert verify(model, x).untrained is None and "as the call gives none" in str(verify(model, x))
    left = {n: p for n, p in model.named_parameters() if "2.adapter.lora.A" not in n}
    assert all(torch.equal(p, before[n]) for n, p in left.items())


def test_what_cannot_be_compared_is_said():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="has no adapted layer"):
        verify(model)
    fastpeft.adapt(model, "lora", rank=2)
    model.forward = lambda x: model["a"](x)
    found = verify(model, torch.randn(3, 8))
    assert found.unreached == ["b"] and "not reached by this call: b" in str(found)
    model.forward = lambda x: x
    with pytest.raises(RuntimeError, match="reached none of the 2"):
        verify(model, torch.randn(3, 8))
    model.forward = lambda x: model["a"](x)
    with fastpeft.adapters_off(model):
        assert verify(model, torch.randn(3, 8)).untested == {"a": "its adapter is switched off"}


def test_routed_and_beside_a_block(tmp_path):
    import transformers

    path, _ = tiny_model(tmp_path, "gpt2")
    ids = torch.randint(3, 20, (3, 6))
    for method, options in (("moa", {"experts": 3, "rank": 2, "prompt": "all"}), ("krona_b", {})):
        model = transformers.GPT2LMHeadModel.from_pretrained(path)
        fastpeft.adapt(model, method, **options)
        perturb(model)
        found = verify(model.eval(), input_ids=ids, labels=ids)
        if method == "moa":
            assert found.right and len(found.layers) == 8, str(found)
            assert model.transformer.h[0].attn.c_attn.adapter.moa.holder.routing.now is None
        else:
            assert not found.layers and len(found.untested) == 2 and found.untrained == {}


def test_grouped_experts(monkeypatch):
    monkeypatch.setattr("fastpeft.grouping.LIMITS", {("cpu", torch.float64): (Limit(64, 1, "here"),)})
    model = two_layers("phatgoose", torch.float64, experts=4, rank=3, k=2)
    assert any(isinstance(t, Grouped) for t in model[0].adapter.terms(Plain(model[0].weight)))
    found = verify(model, torch.randn(9, 24, dtype=torch.float64))
    assert found.right and all(d.size > 0 for d in found.layers["0"].values()), str(found)


def test_command(tmp_path, capsys):
    path, _ = tiny_model(tmp_path, "bert")
    data = tmp_path / "a.csv"
    data.write_text("text,label\n" + "".join(f"w{'abcdefghij'[k]} wb w{'cd'[k % 2]},{k % 2}\n" for k in range(10)))
    base = ["verify", "--model", str(path), "--data", str(data), "--method", "dora", "--rank", "2"]
    assert main([*base, "--train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["layers"]) == 13 and found["wrong"] == [] and found["untrained"] == {}
    assert main(["verify", "--layer", "24", "16", "--dtype", "bfloat16", "--method", "lokr"]) == 0
    assert "1 layers compared with float64, 0 quantities wrong" in capsys.readouterr().out
    for arguments, message in (
        (["--layer", "0", "4"], "must be at least 1"),
        (["--layer", "4", "4", "--data", "x"], "--layer beside"),
        (["--method", "nope"], "method 'nope' does not exist"),
        (["--model", str(path), "--data", str(data), "--adapter", str(tmp_path / "none")], "verify: "),
    ):
        assert main(["verify", *arguments]) == 2
        assert message in capsys.readouterr().err
