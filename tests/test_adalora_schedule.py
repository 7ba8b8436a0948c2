"""AdaLoRA's schedule against PEFT's update_and_allocate, step by step; resuming, ranks, skipped steps, and what is saved after it."""

from __future__ import annotations

import copy
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from checks import DT, MLP, perturb, rand
from procedure_runs import (
    Language,
    Run,
    assert_resumes,
    assert_same,
    go,
    loss_in_output,
    on_ranks,
    plain,
    scaled,
    scaler_of,
    tokens,
    values,
)
from safetensors.torch import load_file
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.method.adalora import AdaLoRA
from fastpeft.train.layers import parts_of

RANK, ALPHA = 4, 6.0
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# 6 layers of rank 4: 24 ranks, 12 in the end
FIELDS = dict(total_steps=20, tinit=3, tfinal=5, deltaT=2)


def made(dtype=DT, **options):
    torch.manual_seed(1)
    model = Language(dtype=dtype)
    fastpeft.adapt(model, "adalora", **(dict(rank=RANK, alpha=ALPHA) | options))
    return model


def schedule(**options):
    return [train.AdaLoRASchedule(**(dict(target_rank=2) | FIELDS | options))]


def run_of(steps=20, micros=1, **options):
    return Run(made, functools.partial(schedule, **options), tokens(steps, micros), loss=loss_in_output)


def parts(model):
    return parts_of(model, AdaLoRA)


def in_use(model):
    """Which ranks are in use, by layer."""
    return {n: (m.E[:, 0] != 0).tolist() for n, m in parts(model).items()}


def count(model):
    return sum(map(sum, in_use(model).values()))


class Attached:
    """A schedule attached to an MLP of two layers, whose gradients the test sets itself."""

    def __init__(self, rank=3, **options):
        torch.manual_seed(2)
        self.model = MLP()
        fastpeft.adapt(self.model, "adalora", rank=rank)
        perturb(self.model)
        self.procedure = train.AdaLoRASchedule(**(dict(total_steps=10, orth_reg_weight=0.0) | options))
        self.optimizer = train.build_optimizer(self.model, [self.procedure], torch.optim.SGD, lr=0.0)
        self.runner = train.attach(self.model, self.optimizer, [self.procedure])

    def __enter__(self):
        self.runner.__enter__()
        return self

    def __exit__(self, *error):
        self.runner.__exit__(*error)

    def step(self, grad=None):
        """One step; grad(name, parameter) instead of the loss's."""
        self.model(rand(4, 16)).square().mean().backward()
        for n, p in self.model.named_parameters():
            if grad is not None and p.requires_grad:
                p.grad = grad(n, p)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.runner.step_end()


# --- the budget


def test_the_worked_budgets():
    """The specification's table: N = 2, 12 -> 8, tinit 10, tfinal 20, T = 100, deltaT 10."""
    table = {10: (24, False), 11: (23, False), 20: (21, True), 45: (17, False), 60: (16, True), 79: (16, False), 80: (16, True), 81: (16, True)}
    with Attached(12, target_rank=8, tinit=10, tfinal=20, total_steps=100, deltaT=10) as a:
        assert {t: a.procedure.budget(t) for t in table} == table
        assert a.procedure.budget(0) == (24, False)


@pytest.mark.parametrize("fields", [{}, dict(tinit=7, tfinal=13, deltaT=3), dict(tinit=39), dict(tfinal=39)], ids=str)
def test_budgets_are_pefts(fields):
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=12, target_r=5, total_step=40, target_modules=["up", "down"], **fields)
    allocator = peft.get_peft_model(MLP(), config).base_model.rankallocator
    with Attached(12, target_rank=5, total_steps=40, **fields) as a:
        for t in range(min(40 - config.tfinal, 39)):
            assert a.procedure.budget(t) == allocator.budget_schedule(t), t
        assert [a.procedure.budget(t) for t in range(40 - config.tfinal, 41)] == [(10, True)] * (config.tfinal + 1)


def test_the_target_is_two_thirds_by_default():
    with Attached(12) as a:
        assert a.procedure.budget(9) == (16, True)
    layer = fastpeft.AdaptedLinear(4, 4, method="adalora", rank=1)
    procedures = [train.AdaLoRASchedule(total_steps=3)]
    with train.attach(layer, train.build_optimizer(layer, procedures, torch.optim.SGD, lr=0.1), procedures):
        assert procedures[0].budget(2) == (1, True), "one rank of all stays"


# --- against PEFT


class Net(MLP):
    """Returns its loss as PEFT's AdaLoraModel looks for it."""

    def forward(self, x, labels):
        return SimpleNamespace(loss=(super().forward(x) - labels).square().mean())


def pefts(base, rank, **fields):
    """Stock PEFT's model with the same start, and its AdamW; ranknum does not train (on a base that is not fp32 0.21.2 lets it)."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=rank, lora_alpha=ALPHA, target_modules=["up", "down"], **fields)
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.to(DT)
    for n, p in theirs.named_parameters():
        p.requires_grad_("lora_" in n)
    return config, theirs


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("fields", [dict(tinit=4, tfinal=6, deltaT=3), dict(deltaT=1, tfinal=4, beta1=0.7, beta2=0.9, orth_reg_weight=0.1)], ids=str)
def test_24_steps_equal_pefts(fields, micros):
    """Loss with the penalty, A, B, E and the averages after every step, budget, the forced mask at T - tfinal, the pattern that it leaves."""
    torch.manual_seed(3)
    base, steps = Net(), 24
    ours = copy.deepcopy(base)
    fastpeft.adapt(ours, "adalora", rank=RANK, alpha=ALPHA)
    config, theirs = pefts(base, RANK, target_r=1, total_step=steps, **fields)
    pairs = {f"{n}.{x}": (getattr(m, x), getattr(theirs.model.get_submodule(n), f"lora_{x}")["default"]) for n, m in parts(ours).items() for x in "AEB"}
    with torch.no_grad():
        for own, other in pairs.values():
            other.copy_(own)
    procedure = train.AdaLoRASchedule.from_config(config)
    optimizer = train.build_optimizer(ours, [procedure], torch.optim.AdamW, lr=0.02)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    last, masks, pattern = steps - config.tfinal, 0, None
    with train.attach(ours, optimizer, [procedure], accumulation=micros) as runner:
        for t in range(steps):
            batches = [(rand(5, 16, grad=False), rand(5, 16, grad=False)) for _ in range(micros)]
            for batch in batches:
                loss, want = ours(*batch).loss, theirs(*batch).loss
                assert_fp64(loss, want, f"loss {t}")
                (loss / micros).backward()
                (want / micros).backward()
            optimizer.step()
            other.step()
            theirs.update_and_allocate(t)
            for name, (p, q) in pairs.items():
                assert_fp64(p.detach(), q.detach(), f"{name} after step {t}")
                assert torch.equal(p == 0, q == 0), f"{name} after step {t}"
            if t < last:
                state, allocator = procedure.state_dict(), theirs.rankallocator
                for name in pairs:
                    key = f"{name[:-1]}lora_{name[-1]}.default"
                    for mine, want in ((state["sensitivity"], allocator.exp_avg_ipt[key]), (state["uncertainty"], allocator.exp_avg_unc[key])):
                        size = want.max()
                        assert_fp64(mine[name] / size, want / size, f"averages of {name} after step {t}")
            optimizer.zero_grad()
            other.zero_grad()
            runner.step_end()
            budget, masked = procedure.budget(t)
            if t != last:
                assert (budget, masked) == theirs.rankallocator.budget_schedule(t)
            zeros = 2 * RANK - count(ours)
            assert zeros == (2 * RANK - budget if masked else 0), f"step {t}"
            masks += masked
            if t >= last:
                pattern = pattern or in_use(ours)
                assert pattern == in_use(ours) == {n.split(".")[0]: keep for n, keep in config.rank_pattern.items()}
    assert masks > 6 and sum(map(sum, pattern.values())) == 2


def test_with_tfinal_0_the_last_step_is_the_last_choice():
    """PEFT's would come at step T, which no run of T steps has; with deltaT = 7 the ranks of step 7 would have come back by then."""
    model, seen = plain(run_of(13, total_steps=13, tinit=0, tfinal=0, deltaT=7), look=lambda m, o: count(m))
    assert seen[6] == seen[8] == seen[11] == 24 and seen[7] < 24 and seen[12] == 12 == count(model)


# --- what is masked


def test_equal_scores_are_masked_together():
    """k = 1 of 6, and all six are the lowest: without gradients every score is zero."""
    with Attached(target_rank=1, total_steps=50) as a:
        a.step(lambda n, p: torch.zeros_like(p))
        assert a.procedure.ranks == {"up": 3, "down": 3} and a.procedure.budget(1) == (5, True)
        a.step(lambda n, p: torch.zeros_like(p))
        assert a.procedure.ranks == {"up": 0, "down": 0}


def test_an_equal_rank_at_the_end_masks_nothing():
    with Attached(3, target_rank=3) as a:
        for _ in range(10):
            a.step()
        assert a.procedure.ranks == {"up": 3, "down": 3}
        assert all(bool(keep.all()) for keep in a.procedure.state_dict()["pattern"].values())


def test_a_layer_may_lose_all_ranks_and_others_none():
    """The layer without a gradient has the lowest scores: its I is zero."""
    with Attached(3, target_rank=1, tfinal=2) as a:
        for _ in range(8):
            a.step(lambda n, p: None if n.startswith("up.") else torch.rand_like(p) + 0.1)
        a.step()
        assert a.procedure.ranks["up"] == 0 and a.procedure.ranks["down"] == 2


def test_ranks_of_their_own_count_in_the_budget():
    model = MLP()
    fastpeft.adapt(model, "adalora", rank=5, rank_pattern={"down": 2})
    procedure = train.AdaLoRASchedule(3, total_steps=4)
    optimizer = train.build_optimizer(model, [procedure], torch.optim.SGD, lr=0.1)
    with train.attach(model, optimizer, [procedure]):
        assert procedure.budget(0) == (7, False) and procedure.budget(3) == (6, True)


# --- the penalty


@pytest.mark.parametrize("micros", [1, 3])
def test_the_penalty_counts_once_per_step(micros):
    model, procedures = made(), schedule(orth_reg_weight=0.7)
    data = tokens(1, micros)[0]
    other = copy.deepcopy(model)
    layers = list(parts(other).values())
    penalty = 0.7 / (2 * len(layers)) * sum(m.orthogonality() for m in layers)
    (sum(loss_in_output(other, ids) for ids in data) / micros + penalty).backward()
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.1)
    with train.attach(model, optimizer, procedures, accumulation=micros):
        for ids in data:
            (loss_in_output(model, ids) / micros).backward()
        for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert_fp64(p.grad, q.grad, n)
        eval_loss = loss_in_output(model.eval(), data[0])
        assert torch.equal(eval_loss, loss_in_output(other.eval(), data[0])), "an evaluation has no penalty"


def test_a_model_without_a_loss_needs_weight_0():
    with Attached(orth_reg_weight=0.5) as a, pytest.raises(RuntimeError, match="AdaLoRASchedule adds a term to the loss"):
        a.step()
    with Attached() as a:
        a.step()


# --- loops


def test_accumulated_micro_batches_equal_one_batch():
    run, whole = run_of(20, 3), run_of(20)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (one, few), (three, seen) = (plain(r, look=lambda m, o: in_use(m)) for r in (whole, run))
    assert few == seen
    for (n, a), b in zip(one.state_dict().items(), three.state_dict().values(), strict=True):
        assert_fp64(a, b, n)


@pytest.mark.parametrize("cut", [2, 8, 15, 16, 18])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, tmp_path):
    """Before tinit, among the masks, before and after the last choice."""
    assert_resumes(run_of(20, 2), cut, tmp_path / "state")


def test_the_averages_are_state(tmp_path):
    """Without them the same resume ends elsewhere."""
    state = {}
    run = run_of(20)
    real = train.AdaLoRASchedule.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        empty = dict(sensitivity={}, uncertainty={})
        patch.setattr(train.AdaLoRASchedule, "load_state_dict", lambda self, s: real(self, state | s | empty))
        with pytest.raises(AssertionError):
            assert_resumes(run, 8, tmp_path / "state")


def test_states_of_other_schedules_are_refused():
    model, optimizer, runner = run_of(4).made()
    with runner:
        go(run_of(4), model, optimizer, runner)
        state = runner.state_dict()["procedures"]["0.AdaLoRASchedule"]
    [procedure] = schedule(tinit=4)
    with pytest.raises(ValueError, match=r"another schedule.*'tinit': \(3, 4\)"):
        procedure.load_state_dict(state)
    with pytest.raises(ValueError, match="parts are missing"):
        schedule()[0].load_state_dict({"settings": state["settings"]})
    for change, words in (({"total": 30}, "a run of 30 steps, and this one has 20"), ({"sensitivity": {"up.A": rand(3)}}, "of other layers.*up.A")):
        model, _, runner = run_of(4).made()
        runner.procedures[0].load_state_dict(state | change)
        with pytest.raises(ValueError, match=words):
            runner.__enter__()
        assert not any(m.attached for m in parts(model).values())


def test_two_ranks_agree(tmp_path):
    """They see different rows and end with the same masks and parameters, those of one process that sees all of them."""
    run = run_of(18)
    one, two = (ends["it"] for ends in on_ranks({"it": run}, tmp_path))
    assert_same(one, two)
    alone, _ = plain(run)
    assert 0 < count(alone) <= 12
    for n, t in alone.state_dict().items():
        assert_fp64(one[n], t, n)
        assert torch.equal(one[n] == 0, t == 0), n


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips(fused):
    """They are none: the same as a loop without them. What is scored is the gradient before scaling (by powers of two, so exact)."""

    def trained(steps, skips=(), scale=1.0):
        model, procedures = made(torch.float32), schedule(total_steps=8, tinit=0, tfinal=3, deltaT=1)
        seen = scaled(model, procedures, tokens(steps), scaler_of(scale), skips, loss=loss_in_output, look=lambda: in_use(model), fused=fused)
        return model, seen, procedures[0].state_dict()

    skips = (1, 4, 5, 11)
    model, seen, _ = trained(8, skips, 1024.0)
    want, plainly, _ = trained(8)
    assert_same(model, want)
    assert plainly == [s for k, s in enumerate(seen) if k not in skips] and count(model) == 12
    state, plain_state = trained(4, (1,), 1024.0)[2], trained(4)[2]
    for key in ("sensitivity", "uncertainty"):
        assert len(state[key]) == 18 and all(t.any() for t in state[key].values())
        assert_same(state[key], plain_state[key])


def test_zero_grad_before_the_scores_is_told():
    with Attached() as a, pytest.raises(RuntimeError, match="no adalora parameter has a gradient"):
        a.step(lambda n, p: None)


def test_scores_that_are_not_finite_choose_nothing():
    with Attached() as a:
        a.step()
        with pytest.raises(ValueError, match="scores are not finite"):
            a.step(lambda n, p: torch.full_like(p, float("nan")))


@pytest.mark.parametrize("given", [True, False])
def test_under_transformers_trainer(given, tmp_path):
    """The same bits as in a plain loop; the Trainer's max_steps are the schedule's where it has none of its own."""
    pytest.importorskip("transformers")
    import loops

    options = dict(target_rank=1, tinit=2, tfinal=4, deltaT=2)
    case = loops.Case("adalora", lambda: [train.AdaLoRASchedule(total_steps=20, **options)])
    asked = case if given else loops.Case("adalora", lambda: [train.AdaLoRASchedule(**options)])
    begun = asked.begin()
    loops.trainer_of(begun, tmp_path, 3).train()
    loops.assert_same(begun[0], loops.plain(case, 20, 3))
    assert count(begun[0]) == 2


OPTIONS = {"procedure_options": {"target_rank": 1, "tfinal": 2}}


@pytest.mark.parametrize("options", [{}, pytest.param(OPTIONS, marks=pytest.mark.accept)], ids=str)
def test_in_the_job(options, tmp_path, monkeypatch):
    """The schedule runs over the job's own number of steps, to its end; the adapter that is kept has the ranks that are left."""
    pytest.importorskip("transformers")
    from job_models import WORDS, tiny_model, write_rows

    from fastpeft.job import memory
    from fastpeft.job.finetune import finetune
    from fastpeft.job.settings import Settings

    if not options:  # a process per arm
        monkeypatch.setattr(memory, "measure", lambda *a, **k: dict(loaded=1, peak=2, cuda_peak=0))
    data = write_rows(tmp_path / "rows.csv", [(f"{WORDS[k]} {' '.join(WORDS[k % 3 :: 3])}", "ab"[k % 2]) for k in range(24)])
    settings = Settings(
        model=str(tiny_model(tmp_path, "bert")[0]), data=str(data), method="adalora", options={"rank": 3}, epochs=2, batch_size=4,
        max_length=12, threads=1, compare=False, target_modules=("query", "value"), output=str(tmp_path / "out"), **options,
    )  # fmt: skip
    [arm] = finetune(settings).arms
    config = json.loads((tmp_path / "out" / "adapter" / CONFIG).read_text())
    assert config["total_step"] == len(arm.losses[0]) > 8 and config["tfinal"] == (2 if options else 0)
    kept = [sum(keep) for keep in config["rank_pattern"].values()]
    assert len(kept) == 4 and sum(kept) == (4 if options else 8)
    assert config["target_r"] == (1 if options else 2)


def test_a_schedule_that_does_not_fit_the_job(tmp_path):
    from fastpeft.job.arms import FASTPEFT, Arm
    from fastpeft.job.errors import JobError
    from fastpeft.job.loop import train as train_job
    from fastpeft.job.loop import trainee
    from fastpeft.job.settings import Settings

    settings = Settings(epochs=2)
    t = trainee(Arm(FASTPEFT, "", "", made(), schedule(total_steps=None, tinit=9)), settings)
    with pytest.raises(JobError, match="finetune: AdaLoRASchedule: tinit=9 and tfinal=5 leave none of 6 steps"):
        train_job([t], SimpleNamespace(order=lambda *a, **k: [0, 1, 2]), None, settings, seed=0)


# --- folders


def trained_on(steps, **options):
    return plain(run_of(steps, **options))[0].eval()


def fresh():
    torch.manual_seed(1)
    return Language()


# PEFT 0.21.2 says so of its own folders too, and then uses the pattern
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_the_final_pattern_is_saved_as_peft_does_and_exported(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = trained_on(20), tokens(1, seed=3)[0][0]
    want, kept = model(ids)["logits"], in_use(model)
    assert sum(map(sum, kept.values())) == 12 and len(set(map(sum, kept.values()))) > 1
    fastpeft.save_adapter(model, tmp_path / "own")
    config, tensors = json.loads((tmp_path / "own" / CONFIG).read_text()), load_file(tmp_path / "own" / WEIGHTS)
    assert config["rank_pattern"] == {f"{n}.lora_E": keep for n, keep in kept.items()}
    for n, keep in kept.items():
        A, E, B = (tensors[f"base_model.model.{n}.lora_{x}"] for x in "AEB")
        assert A.shape[0] == E.shape[0] == B.shape[1] == sum(keep)
    fields = {k: config[k] for k in ("init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")}
    assert fields == dict(init_r=4, target_r=2, total_step=20, tinit=3, tfinal=5, deltaT=2, beta1=0.85, beta2=0.85, orth_reg_weight=0.5)
    assert train.AdaLoRASchedule.from_config(config)._settings() == schedule()[0]._settings()
    assert type(peft.PeftConfig.from_pretrained(str(tmp_path / "own"))) is peft.AdaLoraConfig
    loaded = fresh()
    fastpeft.load_adapter(loaded, tmp_path / "own")
    assert_fp64(loaded.eval()(ids)["logits"], want)
    assert in_use(loaded) == kept
    theirs = peft.PeftModel.from_pretrained(fresh(), str(tmp_path / "own"), autocast_adapter_dtype=False).to(DT).eval()
    assert_fp64(theirs(ids)["logits"], want)
    fastpeft.export_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    assert {n: tensors[f"base_model.model.{n}.lora_A.weight"].shape[0] for n in kept} == {n: max(1, sum(keep)) for n, keep in kept.items()}
    theirs = peft.PeftModel.from_pretrained(fresh(), str(tmp_path / "lora"), autocast_adapter_dtype=False).eval()
    assert_fp64(theirs(ids)["logits"], want)
    assert_fp64(fastpeft.merge(copy.deepcopy(model))(ids)["logits"], want)


def test_before_the_final_pattern_a_folder_holds_every_rank(tmp_path):
    model = trained_on(9)
    assert count(model) < 24
    fastpeft.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert "rank_pattern" not in config and config["total_step"] == 20
    loaded = fresh()
    fastpeft.load_adapter(loaded, tmp_path)
    assert_same(loaded, model)


def test_ranks_that_came_back_after_the_schedule_are_saved(tmp_path):
    model = trained_on(20)
    some = next(n for n, keep in in_use(model).items() if not all(keep))
    with torch.no_grad():
        parts(model)[some].E.add_(0.5)
    fastpeft.save_adapter(model, tmp_path)
    loaded, ids = fresh(), tokens(1)[0][0]
    fastpeft.load_adapter(loaded, tmp_path)
    assert all(in_use(loaded)[some])
    assert_fp64(loaded(ids)["logits"], model(ids)["logits"])


def test_a_model_inside_of_the_one_that_is_attached(tmp_path):
    """The adapted root's names are those of its folder."""
    inside = made()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = inside

        def forward(self, ids):
            return self.inside(ids)

    run = run_of(20)
    run.model = Outer
    plain(run)
    fastpeft.save_adapter(inside, tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]) == {f"{n}.lora_E" for n in parts(inside)}


# --- arguments


def test_from_a_peft_config():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, target_r=3, total_step=30, tinit=2, tfinal=5, deltaT=4, beta1=0.5, beta2=0.6, orth_reg_weight=0.2, target_modules=["up"])
    model = Language()
    report = fastpeft.adapt(model, config)
    assert report.procedures == ["AdaLoRASchedule"] and set(report.adapted) == {f"layers.{k}.up" for k in range(3)}
    found = train.AdaLoRASchedule.from_config(config)
    want = train.AdaLoRASchedule(3, total_steps=30, tinit=2, tfinal=5, deltaT=4, beta1=0.5, beta2=0.6, orth_reg_weight=0.2)
    assert found._settings() == want._settings() == train.AdaLoRASchedule.from_config(config.to_dict())._settings()
    with pytest.raises(ValueError, match="from_config: peft_type is"):
        train.AdaLoRASchedule.from_config(peft.LoraConfig())


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(target_rank=0), ValueError, "target_rank=0.*at least 1"),
    (dict(target_rank=2.0), TypeError, "target_rank=2.0"),
    (dict(total_steps=0), ValueError, "total_steps=0"),
    (dict(tinit=-1), ValueError, "tinit=-1"),
    (dict(tfinal=True), TypeError, "tfinal=True"),
    (dict(deltaT=0), ValueError, "deltaT=0.*at least 1"),
    (dict(beta1=1.0), ValueError, "beta1=1.0.*less than 1"),
    (dict(beta2=0.0), ValueError, "beta2=0.0.*more than 0"),
    (dict(orth_reg_weight=-0.5), ValueError, "orth_reg_weight=-0.5.*at least 0"),
])  # fmt: skip
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        train.AdaLoRASchedule(**options)


@pytest.mark.parametrize(("options", "words"), [
    (dict(total_steps=None), "the steps of the whole run are not known"),
    (dict(tinit=6, tfinal=4), "tinit=6 and tfinal=4 leave none of 10 steps"),
    (dict(target_rank=4), "target_rank=4 at 2 layers is 8 ranks, and they have 6"),
])  # fmt: skip
def test_what_does_not_fit_the_run(options, words):
    a = Attached(**options)
    with pytest.raises(ValueError, match=words):
        a.runner.__enter__()
    assert not any(m.attached for m in parts(a.model).values())


def test_what_attach_is_told():
    model, procedures = made(), [train.AdaLoRASchedule()]
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.1)
    with train.attach(model, optimizer, procedures, total_steps=7) as runner:
        assert procedures[0].budget(6) == (16, True) and runner.ctx.total_steps == 7
        with pytest.raises(RuntimeError, match="AdaLoRASchedule: the model has this procedure already"):
            train.attach(model, optimizer, schedule()).__enter__()
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match="attach: total_steps="):
            train.attach(model, optimizer, [], total_steps=bad)
    with pytest.raises(ValueError, match="AdaLoRASchedule: attached to a MLP without a adalora layer"):
        train.attach(MLP(), optimizer, schedule()).__enter__()


def test_the_layer_trains_without_it():
    model, ids = made().train(), tokens(1)[0][0]
    before = values(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_in_output(model, ids).backward()
    optimizer.step()
    assert not torch.equal(before["layers.0.up.adapter.adalora.E"], parts(model)["layers.0.up"].E)
