"""PeriodicLoRA: the layer against the formula, stages against stock PEFT merged and started again, unloads, resuming."""

from __future__ import annotations

import copy
import functools
import math

import papers
import pytest
import torch
from checks import DT, compare, perturb, rand, seed_after
from procedure_runs import (
    Blocks,
    Run,
    assert_resumes,
    assert_same,
    go,
    loss_of,
    plain,
    scaled,
    scaler_of,
    tokens,
)
from safetensors.torch import load_file
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.terms import delta_weight
from fastpeft.train.layers import parts_of, seeded

RANK, ALPHA, STAGES = 2, 5.0, 3


def made(stages=STAGES, dtype=DT, **options):
    torch.manual_seed(1)
    model = Blocks(dtype=dtype)
    fastpeft.adapt(model, "periodic_lora", rank=RANK, alpha=ALPHA, stages=stages, **options)
    return model


def schedule(**options):
    return [train.PeriodicLoRASchedule(**({"steps": 3} | options))]


def run_of(steps=9, micros=1, *, stages=STAGES, **options):
    return Run(functools.partial(made, stages), functools.partial(schedule, **options), tokens(steps, micros))


def deltas(model):
    """What each layer adds to W, dense."""
    return {n: sum(delta_weight(t, DT) for t in m.static_terms(None)).detach() for n, m in parts_of(model, fastpeft.method.periodic_lora.PeriodicLoRA).items()}


def parts(model):
    return parts_of(model, fastpeft.method.periodic_lora.PeriodicLoRA)


# --- the layer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_formula_with_all_gradients(dropout):
    layer = fastpeft.AdaptedLinear(12, 10, method="periodic_lora", rank=3, alpha=ALPHA, stages=3, dropout=dropout, dtype=DT)
    m = layer.adapter.periodic_lora
    m.attached = True
    perturb(layer)
    for t in (m.A_past, m.B_past):
        t.normal_()
    x, seed = rand(2, 5, 12), seed_after(11)
    got = layer(x)
    mask = fastpeft.dropout_mask(seed, x.shape, dropout) if dropout else None
    stages = [(m.A_past[:3], m.B_past[:, :3]), (m.A_past[3:], m.B_past[:, 3:])]
    want = papers.periodic_lora(x, layer.weight, layer.bias, stages, m.A, m.B, ALPHA / 3, mask)
    own = {"x": x, "A": m.A, "B": m.B}
    compare(got, want, own, own)


def test_starts_as_published_and_counts():
    layer = fastpeft.AdaptedLinear(256, 100, method="periodic_lora", dtype=DT)
    m = layer.adapter.periodic_lora
    assert not m.B.any() and not m.A_past.any() and not m.B_past.any() and int(m.stage) == 0
    assert 0.95 / 16 < m.A.abs().max() <= 1 / 16 and m.A_past.shape == (24, 256) and m.B_past.shape == (100, 24)
    assert sum(p.numel() for p in m.parameters()) == 8 * 356


def test_training_without_the_procedure_raises():
    model, ids = made(), tokens(1)[0][0]
    with pytest.raises(RuntimeError, match=r"periodic_lora: training needs its procedure.*train.PeriodicLoRASchedule"):
        model.train()(ids)
    model.eval()(ids)
    run = run_of(1)
    model, optimizer, runner = run.made()
    with runner:
        go(run, model, optimizer, runner)
        with pytest.raises(RuntimeError, match="needs its procedure"):
            copy.deepcopy(model)(ids)
        with pytest.raises(RuntimeError, match="has this procedure already"):
            train.attach(model, optimizer, schedule()).__enter__()
    with pytest.raises(RuntimeError, match="needs its procedure"):
        model(ids)


def test_bad_options():
    for options, error, words in (
        ({"stages": 0}, ValueError, "stages=0 at 'linear'; it must be at least 1"),
        ({"stages": 2.0}, TypeError, "stages=2.0"),
        ({"rank": 11}, ValueError, "rank=11"),
        ({"alpha": math.nan}, ValueError, "alpha=nan"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
    ):
        with pytest.raises(error, match=words):
            fastpeft.AdaptedLinear(12, 10, method="periodic_lora", **options)
    for options, error, words in (
        ({"steps": 0}, ValueError, "steps=0"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0; it must be at least 0 and less than 1"),
        ({"momentum": -0.1}, ValueError, "momentum=-0.1"),
    ):
        with pytest.raises(error, match=words):
            train.PeriodicLoRASchedule(**options)
    plain_model = Blocks()
    with pytest.raises(ValueError, match="without a periodic_lora layer"):
        train.attach(plain_model, torch.optim.SGD(plain_model.parameters(), lr=0.1), schedule()).__enter__()


# --- unloads


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5])
def test_an_unload_changes_no_output_and_starts_the_optimiser_anew(momentum):
    """The specification's check, in fp32 as it has it and in fp64: outputs before and after, moments gone, W's bits."""
    for dtype in (torch.float32, DT):
        model = made(dtype=dtype)
        before = copy.deepcopy(model.state_dict())
        procedure = train.PeriodicLoRASchedule(3, momentum)
        optimizer = train.build_optimizer(model, [procedure], torch.optim.AdamW, lr=0.05)
        data, seen = tokens(6), []

        def outputs(m=model, ids=data[0][0]):
            with torch.no_grad():
                return m.eval()(ids).double()

        real = procedure._unload

        def unload(ctx, real=real, seen=seen, outputs=outputs, model=model):
            first = outputs()
            old = {n: (m.A.clone(), m.B.clone()) for n, m in parts(model).items()}
            real(ctx)
            seen.append((first, outputs(), old))
            assert not any(p in ctx.optimizer.state for m in parts(model).values() for p in (m.A, m.B))
            model.train()

        procedure._unload = unload
        with train.attach(model, optimizer, [procedure]) as runner:
            for k, [ids] in enumerate(data):
                model.train()
                loss_of(model, ids).backward()
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()
                assert {int(s["step"]) for s in optimizer.state.values()} == (set() if k % 3 == 2 else {k % 3 + 1})
        assert len(seen) == 2
        for first, second, _ in seen:
            if dtype is DT:
                assert_fp64(second, first)
            assert (first - second).abs().max() <= 1e-6
        last = seen[-1][2]
        for n, m in parts(model).items():
            A, B = last[n]
            assert torch.equal(m.A, A) == (momentum > 0) and torch.equal(m.B, momentum * B)
        for n, t in before.items():
            assert ".adapter." in n or torch.equal(model.state_dict()[n], t), n


def test_the_past_accumulates_rank():
    """rank(delta W) is at most stages * rank, and more than rank; a shorter run of one stage has rank `rank`."""
    model, _ = plain(run_of(9))
    for n, delta in deltas(model).items():
        assert RANK < torch.linalg.matrix_rank(delta) <= STAGES * RANK, n
        assert int(parts(model)[n].stage) == STAGES - 1
    model, _ = plain(run_of(3, stages=1))
    assert all(torch.linalg.matrix_rank(d) == RANK for d in deltas(model).values())


def test_the_last_stage_goes_on():
    """With two stages of three steps, steps 7 to 9 unload nothing and keep the optimiser's state."""
    _, seen = plain(run_of(9, stages=2), look=lambda m, o: {int(s["step"]) for s in o.state.values()})
    assert seen == [{1}, {2}, set(), {1}, {2}, {3}, {4}, {5}, {6}]


def test_one_stage_is_lora():
    model, _ = plain(run_of(6, stages=1))
    torch.manual_seed(1)
    other = Blocks()
    fastpeft.adapt(other, "lora", rank=RANK, alpha=ALPHA)
    lora, _ = plain(Run(lambda: other, list, tokens(6)))
    for n, m in parts(model).items():
        own = lora.get_submodule(n).adapter.lora
        assert torch.equal(m.A, own.A) and torch.equal(m.B, own.B), n


@pytest.mark.parametrize("micros", [1, 3])
def test_stages_equal_peft_merged_and_started_again(micros):
    """Per stage get_peft_model, train, merge_and_unload, and a new LoRA with the A that was drawn here: outputs after every step."""
    peft = pytest.importorskip("peft")
    run, probe = run_of(9, micros), tokens(1, seed=3)[0][0]
    start = {n: m.A.detach().clone() for n, m in parts(made()).items()}
    _, outputs = plain(run, look=lambda model, _: model(probe).detach())
    torch.manual_seed(1)
    theirs, at = Blocks(), 0
    for stage in range(STAGES):
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"])
        theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
        for n in start:
            own = theirs.base_model.model.get_submodule(n).to(DT)
            A, bound = own.lora_A["default"].weight, 1 / math.sqrt(own.in_features)
            if stage:
                start[n].uniform_(-bound, bound, generator=seeded(0, stage - 1, n))
            A.data.copy_(start[n])
        optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=run.lr, **run.options)
        for ids in run.data[3 * stage : 3 * stage + 3]:
            for batch in ids:
                (loss_of(theirs, batch) / micros).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_fp64(outputs[at], theirs(probe).detach(), f"step {at}")
            at += 1
        theirs = theirs.merge_and_unload()
    assert at == 9 and (outputs[3] - outputs[2]).abs().max() > 1e-3


def test_a_stage_is_an_epoch_by_default():
    """The procedure as the job makes it, without arguments."""
    run = run_of(7)
    run.procedures, run.epoch = lambda: [train.PeriodicLoRASchedule()], 2
    _, stages = plain(run, look=lambda m, o: int(parts(m)["layers.0.up"].stage))
    assert stages == [0, 1, 1, 2, 2, 2, 2]


def test_the_rate_restarts_with_each_stage():
    """It multiplies what the loop has set, for the optimiser's step only, and counts from the stage's first step."""
    run, used = run_of(7), []
    run.procedures = lambda: schedule(rate=lambda k: (k + 1) / 4)
    model, optimizer, runner = run.made()
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    with runner:
        # the runner's own hook comes first, having been registered when it was entered
        optimizer._optimizer_step_pre_hooks.move_to_end(min(optimizer._optimizer_step_pre_hooks))
        for k, micros in enumerate(run.data):
            optimizer.param_groups[0]["lr"] = 0.1 * (k + 1)
            go(run, model, optimizer, runner, [micros])
            assert optimizer.param_groups[0]["lr"] == 0.1 * (k + 1)
    assert used == pytest.approx([0.1 * (k + 1) * (k % 3 + 1) / 4 if k < 6 else 0.1 * 7 / 4 for k in range(7)], rel=1e-15)


def test_skipped_steps_do_not_count():
    model = made(dtype=torch.float32)
    stages = scaled(model, schedule(steps=2), tokens(4), scaler_of(), (1, 3), look=lambda: int(parts(model)["layers.0.up"].stage))
    assert stages == [0, 0, 1, 1, 1, 2]


# --- loops, resuming


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_accumulated_micro_batches_equal_one_batch(momentum):
    run = run_of(9, 3, momentum=momentum)
    whole = run_of(9, momentum=momentum)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (one, _), (three, _) = plain(whole), plain(run)
    for (n, a), b in zip(one.state_dict().items(), three.state_dict().values(), strict=True):
        assert torch.equal(a, b) if a.dtype is torch.int64 else assert_fp64(a, b, n) is None


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, tmp_path):
    assert_resumes(run_of(9, 2, momentum=0.0), cut, tmp_path / "state")


def test_states_of_other_schedules_are_refused():
    state = train.PeriodicLoRASchedule(3).state_dict()
    with pytest.raises(ValueError, match=r"another schedule.*'steps': \(3, 4\)"):
        train.PeriodicLoRASchedule(4).load_state_dict(state)


# --- folders, merge, export


def trained():
    return plain(run_of(8))[0].eval()


def test_save_load_merge_export(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = trained(), tokens(1, seed=3)[0][0]
    want = model(ids)
    fastpeft.save_adapter(model, tmp_path / "own")
    fastpeft.export_lora(model, tmp_path / "lora")
    torch.manual_seed(1)
    base = Blocks()
    loaded = copy.deepcopy(base)
    fastpeft.load_adapter(loaded, tmp_path / "own")
    assert torch.equal(loaded.eval()(ids), want) and all(int(m.stage) == 2 for m in parts(loaded).values())
    ranks = {t.shape[0] for n, t in load_file(tmp_path / "lora/adapter_model.safetensors").items() if "lora_A" in n}
    assert ranks == {STAGES * RANK}
    assert_fp64(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"), autocast_adapter_dtype=False).eval()(ids), want)
    assert_fp64(fastpeft.merge(copy.deepcopy(model))(ids), want)
    fastpeft.unload(model)
    assert_same(model, base)


def test_export_has_the_rank_of_the_stages_that_were(tmp_path):
    model, _ = plain(run_of(2))
    fastpeft.export_lora(model, tmp_path)
    ranks = {t.shape[0] for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in n}
    assert ranks == {RANK}


def test_a_damaged_stage_is_refused(tmp_path):
    model = trained()
    with torch.no_grad():
        parts(model)["layers.1.up"].stage.fill_(7)
    fastpeft.save_adapter(model, tmp_path)
    other = Blocks()
    with pytest.raises(fastpeft.CheckpointError, match=r"layers.1.up.adapter.*stage is 7; it must be 0 to 2"):
        fastpeft.load_adapter(other, tmp_path)
    assert type(other.layers[1].up) is nn.Linear
