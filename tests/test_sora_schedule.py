"""SoRA's gates in training: the proximal step against a loop with two optimisers, stages, resuming, ranks, and what is left of them."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from types import SimpleNamespace

import papers
import pytest
import torch
from checks import DT, MLP, rand
from procedure_runs import (
    Blocks,
    Run,
    assert_resumes,
    assert_same,
    go,
    loss_of,
    on_ranks,
    plain,
    scaled,
    scaler_of,
    tokens,
)
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.job.arms import FASTPEFT, Arm
from fastpeft.job.loop import trainee
from fastpeft.job.settings import Settings
from fastpeft.method.sora import SoRA
from fastpeft.train.layers import parts_of
from fastpeft.train.sora import thresholds

RANK, ALPHA = 3, 5.0


def made(dtype=DT, **options):
    torch.manual_seed(1)
    model = Blocks(dtype=dtype)
    fastpeft.adapt(model, "sora", **(dict(rank=RANK, alpha=ALPHA) | options))
    return model


def schedule(**options):
    return [train.SoRASchedule(**({"xi": 0.02} | options))]


def run_of(length=14, micros=1, **options):
    return Run(made, functools.partial(schedule, **options), tokens(length, micros))


def parts(model):
    return parts_of(model, SoRA)


def closed(model):
    return sum(int((m.g == 0).sum()) for m in parts(model).values())


# --- the step


def two_optimisers(data, xi, released=False, decay=0.0):
    """The authors' loop: AdamW for A and B with weight decay, AdamW for the gates with `decay`, then the threshold."""
    model = made().train()
    gates = [m.g for m in parts(model).values()]
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is g for g in gates)]
    optimizers = [torch.optim.AdamW(rest, lr=0.05, weight_decay=0.1), torch.optim.AdamW(gates, lr=0.05, weight_decay=decay)]
    for [ids] in data:
        loss_of(model, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for g in gates:
                g.copy_(papers.proximal(g, xi, released))
    return model


@pytest.mark.parametrize(("options", "xi"), [
    ({}, 0.02), ({"times_lr": True, "xi": 0.4}, 0.05 * 0.4), ({"compat_official": True}, 0.02), ({"xi": 0.0}, 0.0)
], ids=str)  # fmt: skip
def test_equals_two_optimisers_and_the_operator(options, xi):
    """To the bit; and not with weight decay on the gates, or the other operator."""
    run, released = run_of(**options), "compat_official" in options
    model, _ = plain(run)
    assert_same(model, two_optimisers(run.data, xi, released))
    assert closed(model) > 0 or xi == 0
    for other in [two_optimisers(run.data, xi, released, decay=0.1)] + [two_optimisers(run.data, xi, not released)] * (xi > 0):
        assert not all(torch.equal(m.g, n.g) for m, n in zip(parts(model).values(), parts(other).values(), strict=True))


def test_the_gates_are_a_group_of_the_settings_that_they_had():
    model = made()
    gates = [m.g for m in parts(model).values()]
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is g for g in gates)]
    first, last = [*rest[:3], *gates[:2]], [*rest[3:], *gates[2:]]
    groups = schedule()[0].param_groups(model, [{"params": first, "lr": 0.1, "weight_decay": 0.3}, {"params": last, "lr": 0.2, "share": 7}])
    assert [(len(g["params"]), g["lr"], g.get("weight_decay"), g.get("share")) for g in groups] == [
        (3, 0.1, 0.3, None), (2, 0.1, 0.0, None), (len(rest) - 3, 0.2, None, 7), (4, 0.2, 0.0, 7)
    ]  # fmt: skip
    assert {id(p) for p in groups[1]["params"] + groups[3]["params"]} == {id(g) for g in gates}


def test_with_a_faster_up_factor():
    """LoRA+ beside it: the gates keep the base rate and no decay."""
    model = made()
    procedures = [train.LoRAPlus(4.0), *schedule()]
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=0.1, weight_decay=0.2)
    found = {n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"] for n, q in model.named_parameters() if p is q}
    assert {n.rpartition(".")[2]: v for n, v in found.items()} == {"A": (0.1, 0.2), "B": (0.4, 0.2), "g": (0.1, 0.0)}


def test_the_l1_penalty_is_the_mean_over_all_gates():
    class WithLoss(MLP):
        def forward(self, x):
            return SimpleNamespace(loss=super().forward(x).square().mean())

    torch.manual_seed(4)
    model = WithLoss()
    fastpeft.adapt(model, "sora", rank=4, rank_pattern={"down": 2})
    procedures = schedule(l1=0.7)
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.1)
    x, gates = rand(5, 16, grad=False), [m.g for m in parts(model).values()]
    task = torch.autograd.grad(model(x).loss, gates)
    with train.attach(model, optimizer, procedures, accumulation=2):
        for _ in range(2):
            (model(x).loss / 2).backward()
    for g, d in zip(gates, task, strict=True):
        assert_fp64(g.grad, d + 0.7 / 6 * g.detach().sign())
    other = MLP()
    fastpeft.adapt(other, "sora", rank=4)
    optimizer = train.build_optimizer(other, schedule(l1=0.7), torch.optim.SGD, lr=0.1)
    with train.attach(other, optimizer, schedule(l1=0.7)), pytest.raises(RuntimeError, match="SoRASchedule adds a term to the loss"):
        other(x)


# --- behaviour


@pytest.fixture(scope="module")
def teacher():
    """(xi -> (loss, open gates after each step)) of a layer of rank 6 under a teacher of rank 2."""

    def trained(xi, **options):
        torch.manual_seed(6)
        layer = fastpeft.AdaptedLinear(12, 12, method="sora", rank=6, alpha=6, dtype=DT)
        x, m = torch.randn(64, 12, dtype=DT), layer.adapter.sora
        delta = torch.randn(12, 2, dtype=DT) @ torch.randn(2, 12, dtype=DT)
        want = nn.functional.linear(x, layer.weight + delta / 4, layer.bias)
        procedures = [train.SoRASchedule(xi, **options)]
        optimizer = train.build_optimizer(layer, procedures, torch.optim.AdamW, lr=0.02, weight_decay=0.0)
        seen = []
        with train.attach(layer, optimizer, procedures) as runner:
            for _ in range(400):
                loss = (layer(x) - want).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()
                seen.append(sum(procedures[0].ranks.values()))
        assert seen[-1] == int((m.g != 0).sum())
        return loss.item(), seen

    return trained


def test_gates_fall_with_the_threshold(teacher):
    """None without one; more with a greater one, down to the teacher's two, and the fit stays."""
    dense, still = teacher(0.0)
    assert still == [6] * 400
    small, falls = teacher(2e-3)
    sparse, deep = teacher(5e-3)
    assert falls[0] == deep[0] == 6 and 2 <= deep[-1] < 6 and deep[-1] <= falls[-1] <= 6
    start = teacher(1e3)  # every gate closed at once: the base alone
    assert start[1] == [0] * 400 and max(dense, small, sparse) < 0.01 * start[0]


def test_a_closed_gate_may_open_again():
    """Its own gradient does not vanish with it."""
    model, optimizer, runner = run_of(2, xi=[1e3, 2e3], steps=1).made()
    with runner:
        go(run_of(2), model, optimizer, runner, tokens(1))
        assert closed(model) == 6 * RANK
        runner.procedures[0].xi = [0.0, 0.0]
        with torch.no_grad():
            for m in parts(model).values():
                m.B.normal_()
        go(run_of(2), model, optimizer, runner, tokens(1), done=1)
    assert closed(model) == 0


# --- stages


def test_lists_of_thresholds():
    want = {
        "linear": lambda k: 1e-4 + 6e-4 * k / 6,
        "log_linear": lambda k: math.log(math.exp(1e-4) + (math.exp(7e-4) - math.exp(1e-4)) * k / 6),
        "exp_linear": lambda k: math.exp(math.log(1e-4) + (math.log(7e-4) - math.log(1e-4)) * k / 6),
    }
    for spacing, f in want.items():
        got = thresholds(spacing, 1e-4, 7e-4, 7)
        assert got[0] == 1e-4 and got[-1] == 7e-4 and got == pytest.approx([f(k) for k in range(7)], rel=1e-12), spacing
    assert thresholds("linear", 0.0, 7e-4, 7) == pytest.approx([1e-4 * 7 / 6 * k for k in range(7)], rel=1e-12)  # the script's list
    assert thresholds("exp_linear", 1e-4, 7e-4, 2) == [1e-4, 7e-4] and thresholds("linear", 1e-4, 7e-4, 1) == [1e-4]


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (("exp_linear", 0.0, 1.0, 3), ValueError, "'exp_linear' from 0, whose logarithm does not exist"),
    (("cubic", 0.0, 1.0, 3), ValueError, "'cubic' from 0.0 to 1.0; spacing must be one of linear, log_linear, exp_linear"),
    (("linear", 2.0, 1.0, 3), ValueError, "0 <= first <= last"),
    (("linear", -1.0, 1.0, 3), ValueError, "0 <= first <= last"),
    (("linear", 0.0, math.nan, 3), ValueError, "last=nan"),
    (("linear", 0.0, 1.0, 0), ValueError, "count=0"),
])  # fmt: skip
def test_lists_that_do_not_exist(arguments, error, words):
    with pytest.raises(error, match=words):
        thresholds(*arguments)


LIST = [0.0, 0.01, 0.03]


@pytest.mark.parametrize(("options", "epoch", "want"), [
    (dict(steps=2), 0, [0, 1, 1, 2, 2, 3, 3, 3]),
    (dict(steps=2, first=4), 0, [0, 0, 0, 1, 1, 2, 2, 3]),
    (dict(epochs=1), 2, [0, 1, 1, 2, 2, 3, 3, 3]),
    (dict(epochs=2, first=1), 2, [0, 1, 1, 1, 1, 2, 2, 2]),
    ({}, 2, [0] * 8),
])  # fmt: skip
def test_stages_come_in_turn(options, epoch, want):
    """After each of 8 steps: the stage; the threshold is the stage's, of its first step already; then the run is done."""
    run = run_of(8, xi=LIST, **options)
    run.epoch = epoch
    model, optimizer, runner = run.made()
    [procedure], real, used = runner.procedures, fastpeft.train.sora.soft_threshold, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastpeft.train.sora, "soft_threshold", lambda g, xi, **more: used.append(xi) or real(g, xi, **more))
        with runner:
            assert go(run, model, optimizer, runner, look=lambda: (procedure.stage, runner.done)) == [(k, k == 3) for k in want]
    before = [0, *want[:-1]]
    assert used == [LIST[min(k, 2)] for k in before if k > 0 for _ in range(6)]


def test_one_threshold_has_no_stages():
    run = run_of(6, steps=1)
    model, optimizer, runner = run.made()
    with runner:
        assert go(run, model, optimizer, runner, look=lambda: (runner.procedures[0].stage, runner.done)) == [(0, False)] * 6


def test_the_rate_restarts_with_each_stage():
    """The loop's own rate, times the factor of the stage's k-th step, for the step and its threshold only."""
    run = run_of(6, xi=[0.1, 0.2], steps=3, times_lr=True)
    run.procedures = lambda: schedule(xi=[0.1, 0.2], steps=3, times_lr=True, rate=lambda k: 1 - k / 3)
    model, optimizer, runner = run.made()
    used, real = [], fastpeft.train.sora.soft_threshold
    with pytest.MonkeyPatch.context() as patch, runner:
        patch.setattr(fastpeft.train.sora, "soft_threshold", lambda g, xi, **more: used.append(xi) or real(g, xi, **more))
        for k, micros in enumerate(run.data):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (k + 1)
            go(run, model, optimizer, runner, [micros])
            assert all(g["lr"] == 0.01 * (k + 1) for g in optimizer.param_groups)
    assert used[::6] == pytest.approx([(0.1 if k < 3 else 0.2) * 0.01 * (k + 1) * (1 - k % 3 / 3) for k in range(6)], rel=1e-12)


# --- loops, resuming, ranks


def test_accumulated_micro_batches_equal_one_batch():
    run, whole = run_of(14, 3), run_of(14)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (one, _), (three, _) = plain(whole), plain(run)
    assert closed(one) == closed(three) > 0
    for (n, a), b in zip(one.state_dict().items(), three.state_dict().values(), strict=True):
        assert_fp64(a, b, n)


@pytest.mark.parametrize("options", [dict(steps=3), dict(epochs=1, first=2)], ids=str)
@pytest.mark.parametrize("cut", [1, 4, 6, 8])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(options, cut, tmp_path):
    """With the gates' moments, which are in the optimiser's state, and the stage."""
    run = run_of(10, 2, xi=[0.01, 0.02, 0.03], **options)
    run.epoch = 2
    assert_resumes(run, cut, tmp_path / "state")


def test_states_of_other_schedules_are_refused():
    state = train.SoRASchedule(0.1).state_dict()
    with pytest.raises(ValueError, match=r"another schedule.*'xi': \(\[0.1\], \[0.2\]\)"):
        train.SoRASchedule(0.2).load_state_dict(state)
    with pytest.raises(ValueError, match="parts are missing"):
        train.SoRASchedule(0.1).load_state_dict({k: v for k, v in state.items() if k != "stage"})


def test_two_ranks_agree(tmp_path):
    run = run_of(14)
    one, two = (ends["it"] for ends in on_ranks({"it": run}, tmp_path))
    assert_same(one, two)
    alone, _ = plain(run)
    assert closed(alone) > 0
    for n, t in alone.state_dict().items():
        assert_fp64(one[n], t, n)
        assert torch.equal(one[n] == 0, t == 0), n


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_thresholds_nothing(fused):
    model, procedures = made(torch.float32), schedule(xi=[0.01, 0.02], steps=2)
    seen = scaled(model, procedures, tokens(3), scaler_of(), (1,), fused=fused,
                  look=lambda: (procedures[0].stage, torch.stack([m.g.detach().clone() for m in parts(model).values()])))  # fmt: skip
    assert [stage for stage, _ in seen] == [0, 0, 1, 1]
    assert [torch.equal(a, b) for (_, a), (_, b) in itertools.pairwise(seen)] == [True, False, False]


def test_under_transformers_trainer(tmp_path):
    pytest.importorskip("transformers")
    import loops

    case = loops.Case("sora", lambda: [train.SoRASchedule([0.01, 0.02, 0.03, 0.04], epochs=1, l1=0.1)])
    begun = case.begin()
    loops.trainer_of(begun, tmp_path, 3).train()
    loops.assert_same(begun[0], loops.plain(case, 20, 3))
    assert closed(begun[0]) > 0


def test_in_the_job():
    """Its gates have the adapter's learning rate, and no weight decay."""
    settings = Settings(method="sora", lr=0.1, adapter_lr=0.02, weight_decay=0.3)
    model = made(modules_to_save=["lm_head"])
    t = trainee(Arm(FASTPEFT, "", "", model, schedule()), settings)
    gates = {m.g for m in parts(model).values()}
    found = [(bool(gates & set(g["params"])), g["share"], g["weight_decay"]) for g in t.optimizer.param_groups]
    assert found == [(False, 1.0, 0.3), (False, pytest.approx(0.2, rel=1e-12), 0.3), (True, found[1][1], 0.0)]


# --- what is left


def test_merge_and_export_have_the_ranks_that_are_open(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = plain(run_of(30, xi=0.04))
    ids, left = tokens(1, seed=3)[0][0], {n: int((m.g != 0).sum()) for n, m in parts(model).items()}
    assert 0 < sum(left.values()) < 6 * RANK and len(set(left.values())) > 1
    want = model.eval()(ids)
    fastpeft.export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    pattern = {n.strip("^$").replace("\\", ""): r for n, r in config["rank_pattern"].items()}
    assert {n: pattern.get(n, config["r"]) for n in left} == {n: max(1, r) for n, r in left.items()}
    torch.manual_seed(1)
    base = Blocks()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"), autocast_adapter_dtype=False).eval()
    assert_fp64(theirs(ids), want)
    fastpeft.save_adapter(model, tmp_path / "own")
    loaded = copy.deepcopy(base)
    fastpeft.load_adapter(loaded, tmp_path / "own")
    assert torch.equal(loaded.eval()(ids), want)
    assert_fp64(fastpeft.merge(copy.deepcopy(model))(ids), want)


# --- arguments


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (dict(xi=-0.1), ValueError, "xi=-0.1; it must be at least 0"),
    (dict(xi=[]), ValueError, r"xi=\[\]"),
    (dict(xi=[0.1, 0.1]), ValueError, "must increase"),
    (dict(xi=[0.1, "x"]), ValueError, "xi='x'"),
    (dict(xi=math.inf), ValueError, "xi=inf"),
    (dict(epochs=0), ValueError, "epochs=0"),
    (dict(steps=1.5), TypeError, "steps=1.5"),
    (dict(first=0), ValueError, "first=0"),
    (dict(l1=-1.0), ValueError, "l1=-1.0; it must be at least 0"),
])  # fmt: skip
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        train.SoRASchedule(**arguments)


def test_what_is_refused_of_a_model():
    model = made()
    decayed = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"the gate of 'layers.0.up' is in a group with weight decay"):
        train.attach(model, decayed, schedule()).__enter__()
    without = torch.optim.AdamW([m.A for m in parts(model).values()], weight_decay=0.0)
    with pytest.raises(ValueError, match=r"the gate of 'layers.0.up' is not in the optimiser"):
        train.attach(model, without, schedule()).__enter__()
    half = made(torch.float32).to(torch.bfloat16)
    optimizer = train.build_optimizer(half, schedule(), torch.optim.AdamW, lr=0.1)
    with pytest.raises(ValueError, match=r"is torch.bfloat16, in which a small threshold is lost"):
        train.attach(half, optimizer, schedule()).__enter__()
    assert not any(m.attached for m in [*parts(model).values(), *parts(half).values()])
    plainly = Blocks()
    with pytest.raises(ValueError, match="without a sora layer"):
        train.attach(plainly, torch.optim.SGD(plainly.parameters(), lr=0.1), schedule()).__enter__()
    model, optimizer, runner = run_of(1).made()
    with runner, pytest.raises(RuntimeError, match="has this procedure already"):
        train.attach(model, optimizer, schedule()).__enter__()


def test_the_layer_trains_without_it():
    model, ids = made().train(), tokens(1)[0][0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss_of(model, ids).backward()
        optimizer.step()
    assert closed(model) == 0 and all(m.B.any() for m in parts(model).values())
