"""AFLoRA's freezing: the schedule's values, choices against a slow retelling of the rules, what freezing means, resuming, counts."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from checks import DT, MLP
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
    values,
)
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.method.aflora import AFLoRA
from fastpeft.train.layers import parts_of

RANK = 2
# three blocks of two linears: twelve matrices
FIELDS = dict(start=4, tail=6, deltaT=2)
CLIP = 0.05


def made(dtype=DT, **options):
    torch.manual_seed(1)
    model = Blocks(dtype=dtype)
    fastpeft.adapt(model, "aflora", **(dict(rank=RANK) | options))
    return model


def freezing(**options):
    return [train.AFLoRAFreezing(**(FIELDS | dict(total_steps=20) | options))]


def run_of(steps=20, micros=1, **options):
    return Run(made, functools.partial(freezing, **options), tokens(steps, micros), epoch=5)


def matrices(model):
    return {f"{n}.{leaf}": getattr(m, leaf) for n, m in parts_of(model, AFLoRA).items() for leaf in "AB"}


def frozen(model):
    return {n for n, p in matrices(model).items() if not p.requires_grad}


def attached(model, **options):
    """(procedure, runner) on an MLP or another model that is not stepped."""
    [procedure] = freezing(**options)
    optimizer = train.build_optimizer(model, [procedure], torch.optim.SGD, lr=0.0)
    return procedure, train.attach(model, optimizer, [procedure])


# --- the schedule


@pytest.mark.parametrize(("start", "tail", "ti", "end"), [(20, 30, 20, 70), (0.2, 0.3, 20, 70), (0, 0.7, 0, 30), (0.05, 0.7, 5, 30)])
def test_the_share_that_trains(start, tail, ti, end):
    procedure, runner = attached(made(), start=start, tail=tail, total_steps=100)
    with runner:
        rho = procedure.remaining
        assert rho(0) == rho(ti) == 1.0 and rho(end) == rho(100) == 0.0
        if (ti + end) % 2 == 0:
            assert rho((ti + end) // 2) == 0.125
        for t in range(ti, end):
            assert rho(t) == pytest.approx((1 - (t - ti) / (end - ti)) ** 3, rel=1e-14)
            assert rho(t + 1) < rho(t)


def test_without_a_start_it_begins_after_the_first_epoch():
    run, seen = run_of(start=None, tail=4), []
    model, optimizer, runner = run.made()
    [procedure] = runner.procedures
    with runner:
        seen = go(run, model, optimizer, runner, look=lambda: (procedure.remaining(5), procedure.remaining(6), len(frozen(model))))
    assert seen[3] == (1.0, 1.0, 0) and seen[4] == (1.0, (1 - 1 / 11) ** 3, 0), "the fifth step ends the epoch"
    assert seen[-1][2] == 12


def test_a_first_epoch_that_reaches_into_the_tail():
    run = run_of(start=None, tail=17)
    model, optimizer, runner = run.made()
    with runner:
        counts = go(run, model, optimizer, runner, look=lambda: len(frozen(model)))
    assert counts == [0] * 6 + [12] * 14, "step 5 is ti, the last in which all train"


# --- the choices, told slowly


def slow(grads, settings, total, averages=None):
    """Names frozen by each step, from each step's gradients (name -> tensor): the specification, one matrix at a time.

    averages: a list that gets (mean, deviation) of the matrices that train, by name, after each step's choice.
    """
    T, ti, te, D = total, settings["start"], total - settings["tail"], settings["deltaT"]
    mean = {n: torch.zeros_like(g) for n, g in grads[0].items()}
    dev, gone, told = {n: torch.zeros_like(g) for n, g in grads[0].items()}, [], []
    for t in range(T):
        rho = 1.0 if t <= ti else 0.0 if t > te else (1 - (t - ti) / (te - ti)) ** 3
        if t % D == 0 and t:
            for n in mean:
                I = sum(grads[k][n].abs() for k in range(t - D, t)) / D if n not in gone else mean[n]
                if n not in gone:
                    mean[n] = 0.85 * mean[n] + 0.15 * I
                    dev[n] = 0.95 * dev[n] + 0.05 * (I - mean[n]).abs()
        left = [n for n in mean if n not in gone]
        if t > te:
            gone += left
        elif t > ti and t % D == 0 and left:
            score = {n: (mean[n] * dev[n]).mean() for n in left}
            if settings.get("threshold") == "elementwise":
                every = torch.cat([(mean[n] * dev[n]).flatten() for n in left]).sort().values
                k = math.floor(len(every) * (1 - rho))
                gone += [n for n in left if k and score[n] < every[k - 1]]
            else:
                wanted = math.floor((1 - rho) * len(mean))
                while len(gone) < wanted:
                    gone.append(min((n for n in left if n not in gone), key=lambda n: score[n]))
        told.append(set(gone))
        if averages is not None:
            averages.append({n: (mean[n].clone(), dev[n].clone()) for n in mean if n not in gone})
    return told


def driven(settings, micros=1):
    """(model, names frozen by each step, gradients of each step before clipping, and after, values at freezing) of a loop that clips hard."""
    run, told, whole, clipped, kept = run_of(20, micros, **settings), [], [], [], {}
    model, optimizer, runner = run.made()
    with runner:
        for k, batches in enumerate(run.data):
            for batch in batches:
                (loss_of(model, batch) * 10.0 ** (k % 3) / micros).backward()  # of unequal size, which clipping hides
            for seen in (whole, clipped):
                seen.append({n: (torch.zeros_like(p) if p.grad is None else p.grad.clone()) for n, p in matrices(model).items()})
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
            told.append(frozen(model))
            for n in told[-1]:
                kept.setdefault(n, matrices(model)[n].detach().clone())
    return model, told, whole, clipped, kept


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("settings", [FIELDS, FIELDS | dict(threshold="elementwise"), dict(start=1, tail=3, deltaT=5)], ids=str)
def test_what_is_frozen_when(settings, micros):
    """By each step's gradients before clipping, of all its micro-batches."""
    model, told, whole, _, kept = driven(settings, micros)
    assert told == slow(whole, settings, 20)
    sizes = sorted({len(t) for t in told})
    assert sizes[0] == 0 and sizes[-1] == 12 and len(sizes) > 3, sizes
    assert all(torch.equal(p, kept[n]) for n, p in matrices(model).items())


def test_the_two_averages():
    """Of every matrix that still trains, after each window."""
    run, grads, found, want = run_of(20), [], [], []
    model, optimizer, runner = run.made()
    with runner:
        for [batch] in run.data:
            loss_of(model, batch).backward()
            grads.append({n: (torch.zeros_like(p) if p.grad is None else p.grad.clone()) for n, p in matrices(model).items()})
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
            state = runner.procedures[0].state_dict()
            found.append({n: (t, state["deviation"][n]) for n, t in state["mean"].items()})
    slow(grads, FIELDS, 20, want)
    assert [set(f) for f in found[2:]] == [set(w) for w in want[2:]] and len(found[5]) == 12
    for step in range(2, 20):
        for n, pair in found[step].items():
            for name, a, b in zip(("mean", "deviation"), pair, want[step][n], strict=True):
                assert_fp64(a, b, f"{name} of {n} after step {step}")


def test_clipped_gradients_would_choose_otherwise():
    settings = dict(start=1, tail=3, deltaT=5)
    _, told, _, clipped, _ = driven(settings)
    assert told != slow(clipped, settings, 20)


def test_nothing_is_kept_of_frozen_matrices():
    run = run_of(20)
    model, optimizer, runner = run.made()
    with runner:
        go(run, model, optimizer, runner)
        state = runner.procedures[0].state_dict()
    assert state["frozen"] == sorted(matrices(model)) and not (state["mean"] or state["deviation"] or state["window"])


# --- what frozen means


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_frozen_matrix_keeps_its_bits_from_that_step_on(cls, set_to_none):
    """Under momentum and decay, also where zero_grad leaves zeros; the vectors go on."""
    run = run_of()
    run.cls, run.set_to_none = cls, set_to_none
    run.options = {"weight_decay": 0.1} | ({"momentum": 0.9} if cls is torch.optim.SGD else {})
    model, optimizer, runner = run.made()
    old, at, moved = {}, {}, {}
    with runner:
        for k, batches in enumerate(run.data):
            before, vectors = values(model), {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith((".d", ".db"))}
            go(run, model, optimizer, runner, [batches], done=k)
            for n in frozen(model):
                p = matrices(model)[n]
                at.setdefault(n, k)
                old.setdefault(n, before[f"{n.rpartition('.')[0]}.adapter.aflora.{n[-1]}"])
                assert torch.equal(p, old[n]), f"{n}, frozen in step {at[n]}, moved in step {k}"
                assert p.grad is None and p not in optimizer.state
            moved = {n: not torch.equal(p, vectors[n]) for n, p in model.named_parameters() if n in vectors}
    assert len(at) == 12 and min(at.values()) > 4 and max(at.values()) <= 15, "all of them by T - tf + 1"
    assert all(moved.values()) and len(set(at.values())) > 3


def test_all_are_frozen_one_step_into_the_tail():
    """deltaT does not divide T - tf: the tail freezes in its first step."""
    run = run_of(start=3, tail=6, deltaT=4)
    model, optimizer, runner = run.made()
    with runner:
        counts = go(run, model, optimizer, runner, look=lambda: len(frozen(model)))
    assert counts[14] < 12 and counts[15] == 12, "step 15 is T - tf + 1"


@pytest.mark.parametrize("threshold", ["matrices", "elementwise"])
def test_scores_of_zero(threshold):
    """A model whose adapter has no gradient: nothing breaks, and the tail still freezes all."""
    model = made()
    procedure, runner = attached(model, threshold=threshold)
    with runner:
        for _ in range(20):
            (model(tokens(1)[0][0]) * 0.0).sum().backward()
            runner.ctx.optimizer.step()
            runner.ctx.optimizer.zero_grad()
            runner.step_end()
    assert len(frozen(model)) == 12 == len(procedure.frozen)


def test_scores_that_are_not_finite_choose_nothing():
    model = made()
    _, runner = attached(model)
    with runner, pytest.raises(ValueError, match="AFLoRAFreezing: the scores are not finite"):
        for _ in range(20):
            (loss_of(model, tokens(1)[0][0]) * float("nan")).backward()
            runner.ctx.optimizer.step()
            runner.ctx.optimizer.zero_grad()
            runner.step_end()
    assert not frozen(model)


class Wide(nn.Module):
    """The feed-forward linears of DeBERTa-v3-base, whose weights have one number of storage."""

    def __init__(self):
        super().__init__()
        for k in range(12):
            for name, (m, n) in (("up", (3072, 768)), ("down", (768, 3072))):
                layer = nn.Linear(1, 1)
                layer.weight, layer.in_features, layer.out_features = nn.Parameter(torch.zeros(()).expand(m, n)), n, m
                layer.bias = None
                setattr(self, f"{name}{k}", layer)


@pytest.mark.parametrize("threshold", ["matrices", "elementwise"])
def test_the_mean_count_of_deberta_v3_base(threshold):
    """0.125 M numbers train on average with ti = 5 % and tf = 70 %: 83,232 of attention's and these layers' vectors, 368,640 for a
    share 0.05 + 0.25 / 4 of the run. Gradients are set, heavy-tailed; scores rise from layer to layer, in which sizes alternate."""
    model, steps = Wide(), 400
    fastpeft.adapt(model, "aflora", rank=4)
    procedure, runner = attached(model, start=0.05, tail=0.7, total_steps=steps, deltaT=2, threshold=threshold)
    generator = torch.Generator().manual_seed(3)
    own = matrices(model)
    assert sum(p.numel() for p in own.values()) == 368_640
    noise = {size: torch.randn(size, generator=generator).pow(3).abs() for size in (3072, 12_288)}
    noise = {size: g / g.square().mean().sqrt() for size, g in noise.items()}
    factor = {n: 1.0 + 0.05 * k for k, n in enumerate(own)}
    total = 0
    with runner:
        for t in range(steps):
            runner.ctx.step = t
            for n, p in own.items():
                p.grad = (noise[p.numel()].view_as(p) * (factor[n] * (1 + 0.5 * (t // 2 % 2)))) if p.requires_grad else None
            procedure.after_backward(runner.ctx, 0, True)
            procedure.before_step(runner.ctx)
            procedure.after_step(runner.ctx, False)
            total += 83_232 + sum(p.numel() for p in own.values() if p.requires_grad)
    mean, limit = total / steps, 83_232 + 368_640 * (0.05 + 0.25 * 0.25)
    assert limit == 124_704
    if threshold == "matrices":
        # the limit is that of steps and matrices without number: a floor loses less than one matrix, deltaT two steps, ti is counted from 0
        assert limit < mean < limit + 12_288 * 0.25 + 368_640 * 3 / steps
    else:
        assert limit < mean < 193_824, "all are frozen at 30 % of the run at the latest"


# --- loops


def test_accumulated_micro_batches_are_one_step():
    run, whole = run_of(20, 3), run_of(20)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (_, few), (_, seen) = (plain(r, look=lambda m, o: sorted(frozen(m))) for r in (whole, run))
    assert few == seen


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("cut", [1, 3, 9, 12, 17])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, micros, tmp_path):
    """Inside a window, before the first and among the choices, when all are frozen."""
    assert_resumes(run_of(20, micros), cut, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)["runner"]["procedures"]["0.AFLoRAFreezing"]
    assert len(saved["frozen"]) == {1: 0, 3: 0, 9: 9, 12: 11, 17: 12}[cut]
    assert set(saved["window"]) == set(matrices(made())) - set(saved["frozen"])


def test_a_resumed_run_knows_the_first_epoch(tmp_path):
    assert_resumes(run_of(start=None, tail=4), 8, tmp_path / "state")


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips(fused):
    """They are none, and gradients are divided by a scale that changes on the way (powers of two, so exact)."""

    def trained(skips=(), scale=1.0):
        model, scaler = made(torch.float32), scaler_of(scale)
        procedures = freezing(scaler=scaler, total_steps=12, start=2, tail=3)
        return model, scaled(model, procedures, tokens(12), scaler, skips, look=lambda: sorted(frozen(model)), fused=fused)

    skips = (1, 4, 5, 12)
    model, seen = trained(skips, 1024.0)
    want, plainly = trained()
    assert_same(model, want)
    assert plainly == [s for k, s in enumerate(seen) if k not in skips] and len({len(s) for s in plainly}) > 3


@pytest.mark.parametrize("accumulation", [1, 3])
def test_under_transformers_trainer(accumulation, tmp_path):
    """Clipped there as here; the first epoch's end is the default start."""
    pytest.importorskip("transformers")
    import loops

    case = loops.Case("aflora", lambda: [train.AFLoRAFreezing(tail=0.2, deltaT=1)], {"train_square": True})
    begun = case.begin()
    loops.trainer_of(begun, tmp_path, accumulation).train()
    loops.assert_same(begun[0], loops.plain(case, 20, accumulation))
    assert len(frozen(begun[0])) == 4


# --- arguments and states


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(start=-1), ValueError, "AFLoRAFreezing: start=-1"),
    (dict(tail=1.0), ValueError, "tail=1.0.*below 1"),
    (dict(tail="x"), ValueError, "tail='x'"),
    (dict(deltaT=0), ValueError, "deltaT=0.*at least 1"),
    (dict(beta1=1.0), ValueError, "beta1=1.0.*less than 1"),
    (dict(beta2=0), ValueError, "beta2=0.*more than 0"),
    (dict(threshold="mean"), ValueError, "threshold='mean'.*matrices, elementwise"),
    (dict(total_steps=0), ValueError, "total_steps=0"),
])  # fmt: skip
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        train.AFLoRAFreezing(**options)


@pytest.mark.parametrize(("options", "words"), [
    (dict(total_steps=None), "the steps of the whole run are not known"),
    (dict(start=14), "start=14 and tail=6 leave none of 20 steps"),
    (dict(start=None, tail=21), "start=None and tail=21 leave none"),
])  # fmt: skip
def test_what_does_not_fit_the_run(options, words):
    _, runner = attached(made(), **options)
    with pytest.raises(ValueError, match=words):
        runner.__enter__()


def test_what_is_refused():
    square = nn.Sequential(nn.Linear(8, 8, dtype=DT))
    fastpeft.adapt(square, "aflora", rank=2)
    _, runner = attached(square)
    with pytest.raises(ValueError, match=r"no A or B of an aflora layer trains.*train_square=True"):
        runner.__enter__()
    with pytest.raises(ValueError, match="AFLoRAFreezing: attached to a MLP without a aflora layer"):
        attached(MLP())[1].__enter__()
    model, optimizer, runner = run_of().made()
    with runner:
        go(run_of(), model, optimizer, runner, run_of().data[:9])
        state = runner.state_dict()["procedures"]["0.AFLoRAFreezing"]
    [other] = freezing(tail=5)
    with pytest.raises(ValueError, match=r"another freezing.*'tail': \(6, 5\)"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="parts are missing"):
        freezing()[0].load_state_dict({"settings": state["settings"]})
    for change, words in (({"total": 30}, "a run of 30 steps, and this one has 20"), ({"frozen": ["up.A"]}, "of other layers.*up.A")):
        procedure, runner = attached(made())
        procedure.load_state_dict(state | change)
        with pytest.raises(ValueError, match=words):
            runner.__enter__()


def test_a_copy_and_an_error_leave_no_trace():
    model = made()
    with pytest.raises(KeyError), attached(model)[1]:
        raise KeyError
    assert not frozen(model) and not any(m.attached for m in parts_of(model, AFLoRA).values())
    assert fastpeft.adapt(MLP(), "aflora", rank=2).procedures == ["AFLoRAFreezing"]
    loss_of(made().train(), tokens(1)[0][0]).backward()  # the layer trains without it
