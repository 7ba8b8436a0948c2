"""LoRA+ against PEFT's create_loraplus_optimizer, step by step; who is in which group; what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import DT, MLP, perturb, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train

pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft
from peft.optimizers import create_loraplus_optimizer
from peft_layers import peft_logits

LR, RATIO = 0.01, 16.0


class WithNorm(MLP):
    """An MLP with a LayerNorm and a head, so that there are 1-D parameters of every kind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16, dtype=DT)
        self.head = nn.Linear(16, 4, dtype=DT)

    def forward(self, x):
        return self.head(self.norm(super().forward(x)))


def pair(method="lora_plus", **options):
    """Our adapted model and PEFT's with the same values; head and norm train in both."""
    base = WithNorm()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    fastpeft.adapt(ours, method, rank=3, alpha=6, target_modules=["up", "down"], modules_to_save=["norm", "head"], **options)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["up", "down"], modules_to_save=["norm", "head"], use_dora=method == "dora", **options
    )
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    leaves = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "bias": "lora_B.default.bias", "m": "lora_magnitude_vector.default.weight"}
    twins = {}
    for site in ("up", "down"):
        for leaf, p in getattr(ours, site).adapter.get_submodule(method).named_parameters():
            twins[p] = theirs.base_model.model.get_submodule(site).get_parameter(leaves[leaf])
    for site in ("norm", "head"):
        for leaf, p in getattr(ours, site).named_parameters():
            twins[p] = theirs.base_model.model.get_submodule(site).modules_to_save["default"].get_parameter(leaf)
    with torch.no_grad():
        for p, q in twins.items():
            q.copy_(p)
    assert {p for p in ours.parameters() if p.requires_grad} == set(twins)
    assert {id(p) for p in theirs.parameters() if p.requires_grad} == {id(q) for q in twins.values()}
    return ours, theirs, twins


def settings_of(optimizer):
    """Parameter -> (lr, weight_decay)."""
    return {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(("method", "options"), [("lora_plus", {}), ("lora_plus", {"lora_bias": True}), ("dora", {})], ids=str)
def test_equals_peft_over_twenty_steps(method, options, cls):
    """With compat_ndim1, and loraplus_weight_decay beside the optimiser's: every group, then every parameter to the bit of fp64."""
    ours, theirs, twins = pair(method, **options)
    own = {"momentum": 0.9} if cls is torch.optim.SGD else {"betas": (0.9, 0.99)}
    lr = LR / 40 if cls is torch.optim.SGD else LR
    procedures = [train.LoRAPlus(RATIO, compat_ndim1=True)]
    optimizer = train.build_optimizer(ours, procedures, cls, lr=lr, weight_decay=0.1, **own)
    oracle = create_loraplus_optimizer(theirs, cls, lr=lr, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1, **own)
    mine, wanted = settings_of(optimizer), settings_of(oracle)
    assert {twins[p]: s for p, s in mine.items()} == wanted
    assert set(mine.values()) == {(lr, 0.1), (RATIO * lr, 0.1), (RATIO * lr, 0.0)}
    with train.attach(ours, optimizer, procedures) as runner:
        for _ in range(20):
            x, target = rand(5, 16, grad=False), rand(5, 4, grad=False)
            for model, opt in ((ours, optimizer), (theirs, oracle)):
                (model(x) - target).square().mean().backward()
                opt.step()
                opt.zero_grad()
            runner.step_end()
            for p, q in twins.items():
                assert_fp64(p.detach(), q.detach())


def test_by_role_a_parameter_of_one_dimension_has_the_base_lr():
    ours, _, twins = pair(lora_bias=True)
    found = settings_of(train.build_optimizer(ours, [train.LoRAPlus(4.0)], torch.optim.AdamW, lr=LR, weight_decay=0.1))
    assert set(found) == set(twins)
    ups = {ours.up.adapter.lora_plus.B, ours.down.adapter.lora_plus.B}
    assert {p for p, s in found.items() if s == (4 * LR, 0.1)} == ups
    assert {p for p, s in found.items() if s == (LR, 0.1)} == set(twins) - ups


@pytest.mark.parametrize(("method", "up"), [("melora", "B"), ("prolora", "B0 Bu"), ("sora", "B"), ("dylora", "B"), ("hydralora", "B"), ("loha", "w1_a w2_a")])
def test_up_means_every_up_factor_and_no_gate(method, up):
    model = MLP()
    fastpeft.adapt(model, method, rank=2)
    optimizer = train.build_optimizer(model, [train.LoRAPlus(8.0)], torch.optim.AdamW, lr=LR)
    fast = {p for p, s in settings_of(optimizer).items() if s[0] == 8 * LR}
    names = {n.rpartition("adapter.")[2].split(".")[1] for n, p in model.named_parameters() if p in fast}
    assert names == set(up.split())


def trained(ratio, steps=20, procedures=()):
    torch.manual_seed(3)
    model = MLP()
    fastpeft.adapt(model, "lora_plus", rank=3)
    procedures = [train.LoRAPlus(ratio)] if ratio else []
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=LR)
    x, losses = rand(64, 16, grad=False), []
    target = torch.tanh(x @ rand(16, 16, grad=False))
    with train.attach(model, optimizer, procedures) as runner:
        for _ in range(steps):
            loss = (model(x) - target).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    return losses


def test_a_ratio_of_one_is_plain_adamw_and_sixteen_is_faster():
    assert trained(1.0) == trained(None)
    assert trained(16.0)[-1] < 0.8 * trained(1.0)[-1]


def test_a_scheduler_does_not_apply_the_ratio_twice():
    model = MLP()
    fastpeft.adapt(model, "lora_plus", rank=2)
    procedures = [train.LoRAPlus(RATIO)]
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=LR)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with train.attach(model, optimizer, procedures) as runner:
        for step in range(3):
            assert [g["lr"] for g in optimizer.param_groups] == [LR * 0.5**step, RATIO * LR * 0.5**step]
            model(rand(5, 16)).sum().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            runner.step_end()


def test_it_goes_with_a_procedure_that_has_a_group_of_its_own():
    model = MLP()
    fastpeft.adapt(model, "rosa", rank=2, density=0.1)
    for procedures in ([train.RoSASchedule(), train.LoRAPlus(4.0)], [train.LoRAPlus(4.0), train.RoSASchedule()]):
        optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=LR, weight_decay=0.1)
        rosa = model.up.adapter.rosa
        found = settings_of(optimizer)
        assert (found[rosa.A], found[rosa.B], found[rosa.values]) == ((LR, 0.1), (4 * LR, 0.1), (2e-4, 0.0))


def test_the_recipe_is_lora_and_names_the_procedure(tmp_path):
    plain, other, x = MLP(), MLP(), rand(5, 16)
    model, fresh = copy.deepcopy(plain), copy.deepcopy(plain)
    report = fastpeft.adapt(model, "lora_plus", rank=3, alpha=7, rslora=True)
    assert report.procedures == ["LoRAPlus"] and hasattr(train, report.procedures[0])
    perturb(model).eval()
    fastpeft.adapt(other, "lora", rank=3, alpha=7, rslora=True)
    other.load_state_dict({k.replace("lora_plus", "lora"): v for k, v in model.state_dict().items()})
    assert torch.equal(other.eval()(x), model(x))
    fastpeft.save_adapter(model, tmp_path)
    assert_fp64(peft_logits(plain, tmp_path, x), model(x))
    fastpeft.load_adapter(fresh, tmp_path)
    assert fastpeft.record.adaptation(fresh, "test").methods == ["lora_plus"] and torch.equal(fresh.eval()(x), model(x))


def test_what_is_refused():
    for options, words in (({"ratio": 0.5}, "ratio=0.5; it must be at least 1"), ({"ratio": float("nan")}, "ratio=nan")):
        with pytest.raises(ValueError, match=words):
            train.LoRAPlus(**options)
    model = MLP()
    with pytest.raises(ValueError, match="this MLP has no parameter whose role is 'up'"):
        train.build_optimizer(model, [train.LoRAPlus()], torch.optim.SGD, lr=LR)
    with pytest.raises(ValueError, match="a group without 'lr'"):
        fastpeft.adapt(model, "lora_plus")
        train.LoRAPlus().param_groups(model, [{"params": list(model.parameters())}])
    whole = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    with pytest.raises(ValueError, match=r"LoRAPlus: the optimiser has up\.adapter\.lora_plus\.A and .*B in one group"):
        train.attach(model, whole, [train.LoRAPlus()]).__enter__()
    with pytest.raises(ValueError, match="LoRAPlus: the state is of other settings"):
        train.LoRAPlus(4.0).load_state_dict(train.LoRAPlus(8.0).state_dict())
