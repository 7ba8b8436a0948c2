"""O-LoRA's penalty in a loop: its weight, one count per optimiser step, nothing in the first task; three tasks in a row, against less."""

from __future__ import annotations

import functools

import pytest
import torch
from checks import DT, MLP, perturb, rand
from procedure_runs import Language, Run, assert_resumes, assert_same, loss_in_output, plain, tokens
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.method.o_lora import OLoRA
from fastpeft.train.layers import parts_of

RANK, ALPHA = 2, 4.0


def made(previous=2):
    """In its third task, with factors of the earlier ones."""
    torch.manual_seed(1)
    model = Language()
    fastpeft.adapt(model, "o_lora", rank=RANK, alpha=ALPHA, previous=previous)
    for m in parts(model).values():
        for t in (m.A_prev, m.B_prev) if previous else ():
            t.copy_(0.3 * torch.randn_like(t))
    return model


def parts(model):
    return parts_of(model, OLoRA)


def penalty(*values, **options):
    return [train.OLoRAPenalty(*values, **options)]


def run_of(steps=6, micros=1, model=made, **options):
    return Run(model, functools.partial(penalty, **options), tokens(steps, micros), loss=loss_in_output)


def gradients(procedures, micros=1, model=None):
    """Of A and B by layer, of one step of `micros` equal micro-batches."""
    model = perturb(made() if model is None else model).train()
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.0)
    ids = tokens(1)[0][0]
    with train.attach(model, optimizer, procedures, accumulation=micros) as runner:
        for _ in range(micros):
            (loss_in_output(model, ids) / micros).backward()
        found = {n: (m.A.grad.clone(), m.B.grad.clone()) for n, m in parts(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
    return model, found


# --- the penalty


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("orth", ["l1", "fro2"])
def test_its_gradient_at_weight_lambda_once_per_step(orth, micros):
    """lambda1 * sum of sign(A_i A^T)^T A_i (l1), or 2 (A_i A^T)^T A_i, however many micro-batches."""
    _, without = gradients(penalty(0.0), micros)
    model, found = gradients(penalty(0.7, orth=orth), micros)
    for n, m in parts(model).items():
        outer = torch.sign if orth == "l1" else (lambda P: 2 * P)
        want = sum(outer(A @ m.A.T).T @ A for A in m.A_prev.split(RANK))
        assert_fp64(found[n][0] - without[n][0], 0.7 * want.detach(), n)
        assert torch.equal(found[n][1], without[n][1]), "B has no part in it"


def test_the_second_weight():
    _, without = gradients(penalty(0.0))
    model, found = gradients(penalty(0.0, 0.3))
    for n, m in parts(model).items():
        for got, plainly, p in zip(found[n], without[n], (m.A, m.B), strict=True):
            assert_fp64(got - plainly, 0.3 * (p / p.norm()).detach(), n)


def test_by_default_it_is_the_authors():
    procedure = train.OLoRAPenalty()
    assert procedure.state_dict() == {"lambda1": 0.5, "lambda2": 0.0, "orth": "l1"}
    assert fastpeft.adapt(MLP(), "o_lora", rank=2).procedures == ["OLoRAPenalty"]


def test_in_the_first_task_it_does_nothing():
    """Not even a loss in the output is needed; a model in its first task trains as without it, bit for bit."""
    with_it, _ = plain(run_of(5, model=functools.partial(made, 0), lambda1=9.0))
    alone, _ = plain(Run(functools.partial(made, 0), list, tokens(5), loss=loss_in_output))
    assert_same(with_it, alone)
    model = MLP()
    fastpeft.adapt(model, "o_lora", rank=2)
    optimizer = train.build_optimizer(model.train(), penalty(), torch.optim.SGD, lr=0.1)
    with train.attach(model, optimizer, penalty()) as runner:
        model(rand(3, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
        train.next_task(model)
        with pytest.raises(RuntimeError, match=r"OLoRAPenalty adds a term to the loss.*no `loss` tensor"):
            model(rand(3, 16))


def test_evaluation_and_quiet_passes_have_no_penalty():
    model = perturb(made())
    ids = tokens(1)[0][0]
    with train.attach(model, train.build_optimizer(model, penalty(), torch.optim.SGD, lr=0.1), penalty(9.0)) as runner:
        model.train()
        trained = loss_in_output(model, ids)
        with runner.quiet():
            quiet = loss_in_output(model, ids)
        assert torch.equal(loss_in_output(model.eval(), ids), quiet) and trained > quiet + 1


# --- loops


def test_earlier_factors_keep_their_bits_and_the_overlap_falls():
    run, start = run_of(30, lambda1=2.0), made()
    model, _ = plain(run)
    free, _ = plain(run_of(30, lambda1=0.0))
    overlap = [sum(m.penalty() for m in parts(x).values()) for x in (model, free)]
    assert overlap[0] < 0.5 * overlap[1]
    for n, m in parts(model).items():
        assert torch.equal(m.A_prev, parts(start)[n].A_prev) and torch.equal(m.B_prev, parts(start)[n].B_prev)
        assert not torch.equal(m.B, parts(start)[n].B)


def test_accumulated_micro_batches_equal_one_batch():
    run, whole = run_of(6, 3), run_of(6)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (one, _), (three, _) = plain(whole), plain(run)
    for (n, a), b in zip(one.state_dict().items(), three.state_dict().values(), strict=True):
        assert_fp64(a, b, n)


@pytest.mark.parametrize("micros", [1, 3])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(micros, tmp_path):
    assert_resumes(run_of(6, micros), 3, tmp_path / "state")


@pytest.mark.parametrize("accumulation", [1, 3])
def test_under_transformers_trainer(accumulation, tmp_path):
    pytest.importorskip("transformers")
    import loops

    case = loops.Case("o_lora", lambda: penalty(0.2, 0.1), {"previous": 1})

    class Later(loops.Case):
        def begin(self, base=None):
            model, *rest = super().begin(base)
            for m in parts(model).values():
                m.A_prev.copy_(torch.eye(*m.A_prev.shape))
            return model, *rest

    case = Later(case.method, case.procedures, case.options)
    begun = case.begin()
    loops.trainer_of(begun, tmp_path, accumulation).train()
    loops.assert_same(begun[0], loops.plain(case, 20, accumulation))
    without = Later(case.method, list, case.options)
    with pytest.raises(AssertionError):
        loops.assert_same(begun[0], loops.plain(without, 20, accumulation))


# --- three tasks


class Tasks(nn.Module):
    """A linear that is adapted, and a fixed head that all tasks share."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(24, 32, dtype=DT), nn.Linear(32, 3, dtype=DT)

    def forward(self, x, y):
        logits = self.head(torch.tanh(self.up(x)))
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}


def task(k, count, generator):
    """Inputs mostly in eight dimensions of the task's own; the label says which of three directions in them is the largest."""
    x = 0.05 * torch.randn(count, 24, dtype=DT, generator=generator)
    own = torch.randn(count, 8, dtype=DT, generator=generator)
    x[:, 8 * k : 8 * k + 8] += own
    directions = torch.randn(8, 3, dtype=DT, generator=torch.Generator().manual_seed(50 + k))
    return {"x": x, "y": (own @ directions).argmax(1)}


def after_three_tasks(seed, lambda1, stack):
    """Mean accuracy over the tasks, with all adapters active. stack: a LoRA per task, not one for all."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Tasks()
    fastpeft.adapt(model, "o_lora", rank=1, alpha=2, target_modules=["up"])
    for k in range(3):
        data = task(k, 400, generator)
        if k and stack:
            train.next_task(model)
        procedures = penalty(lambda1)
        optimizer = train.build_optimizer(model.train(), procedures, torch.optim.AdamW, lr=0.02, weight_decay=0.0)
        with train.attach(model, optimizer, procedures) as runner:
            for _ in range(80):
                model(**data)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()
    model.eval()
    with torch.no_grad():
        found = [task(k, 500, torch.Generator().manual_seed(99)) for k in range(3)]
        return sum(float((model(**d)["logits"].argmax(1) == d["y"]).double().mean()) for d in found) / 3


def test_three_tasks_in_a_row():
    """O-LoRA forgets less than a LoRA per task without the penalty, and that less than one LoRA for all."""
    o_lora, incremental, one = (
        sum(after_three_tasks(seed, lambda1, stack) for seed in range(4)) / 4 for lambda1, stack in ((0.05, True), (0.0, True), (0.0, False))
    )
    assert o_lora > incremental + 0.05 and incremental > one + 0.02, (o_lora, incremental, one)


# --- arguments


@pytest.mark.parametrize(("options", "words"), [
    (dict(lambda1=-0.5), "OLoRAPenalty: lambda1=-0.5.*at least 0"),
    (dict(lambda2=float("inf")), "lambda2=inf"),
    (dict(orth="fro"), "orth='fro'.*'l1' or 'fro2'"),
])  # fmt: skip
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        train.OLoRAPenalty(**options)


def test_what_is_refused():
    with pytest.raises(ValueError, match="OLoRAPenalty: attached to a MLP without a o_lora layer"):
        train.attach(MLP(), torch.optim.SGD(MLP().parameters()), penalty()).__enter__()
    model, _, runner = run_of().made()
    with runner, pytest.raises(RuntimeError, match="OLoRAPenalty: the model has this procedure already"):
        train.attach(model, runner.ctx.optimizer, penalty()).__enter__()
    with pytest.raises(ValueError, match="the state is of other settings"):
        train.OLoRAPenalty().load_state_dict(train.OLoRAPenalty(0.1).state_dict())
    loss_in_output(made().train(), tokens(1)[0][0]).backward()  # the layer trains without it
