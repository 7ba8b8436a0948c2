"""BiLoRA's two levels: upper gradients against exact differentiation, what moves E and what does not, two sets of data, resuming."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from checks import DT, MLP, rand
from procedure_runs import (
    Language,
    Run,
    assert_resumes,
    assert_same,
    go,
    held_out,
    loss_in_output,
    plain,
    scaled,
    scaler_of,
    tokens,
    values,
)
from test_bilora import slow_values
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.method.bilora import VALUES, BiLoRA, binary_entropy
from fastpeft.train.bilora import UPPER
from fastpeft.train.layers import parts_of

RANK, ALPHA, LR = 3, 6.0, 0.3


def parts(model):
    return parts_of(model, BiLoRA)


# --- upper gradients against exact ones


class Net(MLP):
    """Returns its loss."""

    def forward(self, x, y):
        return {"loss": (super().forward(x) - y).square().mean()}


def batch(seed, rows=5):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(rows, 16, dtype=DT, generator=generator) for k in "xy"}


def adapted(**options):
    """An MLP with bilora layers whose parameters are all away from zero."""
    torch.manual_seed(3)
    model = Net()
    fastpeft.adapt(model, "bilora", **(dict(rank=RANK, alpha=ALPHA) | options))
    with torch.no_grad():
        for m in parts(model).values():
            for p in m.parameters():
                p.add_(0.4 * torch.randn_like(p))
    return model


def own(model):
    """name -> parameter, E first as the procedure has them."""
    every = {f"{n}.{leaf}": getattr(m, leaf) for n, m in parts(model).items() for leaf in "ABE"}
    return {n: p for n, p in every.items() if n[-1] == "E"}, {n: p for n, p in every.items() if n[-1] != "E"}


def dense(model, p, b):
    """The loss by the paper's formula, differentiable as often as one likes; p: every adapter parameter by name."""

    def layer(x, name, base):
        A, B, E = (p[f"{name}.{leaf}"] for leaf in "ABE")
        v = slow_values(E, parts(model)[name].kind)
        return nn.functional.linear(x, base.weight + ALPHA / RANK * B @ (v[:, None] * A), base.bias)

    out = layer(torch.tanh(layer(b["x"], "up", model.up)), "down", model.down)
    return (out - b["y"]).square().mean()


def r1(p):
    eye = torch.eye(RANK, dtype=DT)
    return sum(((q @ q.T if n[-1] == "A" else q.T @ q) - eye).square().sum() for n, q in p.items())


def leaves(model):
    E, V = own(model)
    return ({n: p.detach().clone().requires_grad_() for n, p in group.items()} for group in (E, V))


def through_one_step(model, lower, upper, rates, gamma1):
    """dC/dE at D2 with V' = V - rate d(L1 + gamma1 R1)/dV, by differentiating through that step; and V'."""
    E, V = leaves(model)
    L1 = torch.stack([dense(model, E | V, b) for b in lower]).mean() + gamma1 * r1(V)
    step = torch.autograd.grad(L1, list(V.values()), create_graph=True)
    after = {n: q - rates[n] * g for (n, q), g in zip(V.items(), step, strict=True)}
    return torch.autograd.grad(dense(model, E | after, upper), list(E.values())), after


def implicit(model, lower, upper):
    """d - (d2 L1 / dE dV) v at the model's own V: the implicit-function gradient with the identity for the inverse Hessian."""
    E, V = leaves(model)
    C = dense(model, E | V, upper)
    d = torch.autograd.grad(C, list(E.values()), retain_graph=True)
    v = torch.autograd.grad(C, list(V.values()))
    L1 = torch.stack([dense(model, E | V, b) for b in lower]).mean()
    slope = torch.autograd.grad(L1, list(V.values()), create_graph=True)
    mixed = torch.autograd.grad(sum((g * w).sum() for g, w in zip(slope, v, strict=True)), list(E.values()))
    return [a - b for a, b in zip(d, mixed, strict=True)], d


def one_step(model, procedures, lower, cls=torch.optim.SGD, lr=LR):
    """A step of the loop; returns the upper gradients that the first procedure took, and V as they were taken at."""
    bilevel, found = procedures[0], []

    def look(ctx, upper, batches):
        found.append(([g.clone() for g in real(ctx, upper, batches)], values(model)))
        return found[-1][0]

    real, bilevel.hypergradient = bilevel.hypergradient, look
    optimizer = train.build_optimizer(model, procedures, cls, lr=lr)
    with train.attach(model, optimizer, procedures, accumulation=len(lower)) as runner:
        for b in lower:
            (model(**b)["loss"] / len(lower)).backward()
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
    return found


def assert_close(got, want, relative):
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= relative * w.norm(), float((g - w).norm() / w.norm())


@pytest.mark.parametrize("ratio", [None, 4.0])
@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("kind", VALUES)
def test_darts_is_exact_through_a_step_of_sgd(kind, micros, ratio):
    """1e-5, the finite difference's own error; with R1 in the step, several micro-batches in it, and learning rates that differ."""
    model, lower, upper = adapted(values=kind), [batch(k) for k in range(micros)], batch(9)
    bilevel = train.BiLoRABilevel([upper], hypergrad="darts", gamma1=0.05, radius=1e-3)
    rates = {n: LR * (ratio if ratio and n[-1] == "B" else 1.0) for n in own(model)[1]}
    want, after = through_one_step(model, lower, upper, rates, 0.05)
    E, _ = own(model)
    plainly = torch.autograd.grad(dense(model, dict(zip(E, E.values(), strict=True)) | {n: q.detach() for n, q in after.items()}, upper), list(E.values()))
    [(got, at)] = one_step(model, [bilevel, *([train.LoRAPlus(ratio)] if ratio else [])], lower)
    for n, q in after.items():
        assert_fp64(at[n.replace(".", ".adapter.bilora.")], q.detach(), n)
    assert_close(got, want, 1e-5)
    assert all((w - p).norm() > 1e-2 * w.norm() for w, p in zip(want, plainly, strict=True)), "the second term shows nothing"


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("kind", VALUES)
def test_betty_is_the_implicit_gradient_at_the_new_factors(kind, micros):
    model, lower, upper = adapted(values=kind), [batch(k) for k in range(micros)], batch(9)
    [(got, _)] = one_step(model, [train.BiLoRABilevel([upper], gamma1=0.05, radius=1e-3, upper=functools.partial(torch.optim.SGD))], lower)
    # E has moved since, V has not
    E, _ = own(model)
    with torch.no_grad():
        for e, g in zip(E.values(), got, strict=True):
            e.add_(LR * g)
    want, d = implicit(model, lower, upper)
    assert_close(got, want, 1e-5)
    assert all((w - g).norm() > 1e-2 * w.norm() for w, g in zip(want, d, strict=True))


def test_betty_is_darts_at_rate_1_where_no_step_lies_between():
    model, lower, upper = adapted(), batch(1), batch(9)
    found = {}
    for name in ("betty", "darts", "first_order"):
        bilevel = train.BiLoRABilevel([upper], hypergrad=name)
        optimizer = train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=1.0)
        with train.attach(model, optimizer, [bilevel]) as runner, runner.quiet():
            bilevel._old = [p.detach().clone() for p in bilevel._V]
            found[name] = bilevel.hypergradient(runner.ctx, train.Batch((), upper), [train.Batch((), lower)])
    assert_close(found["betty"], found["darts"], 1e-12)
    want, d = implicit(model, [lower], upper)
    assert_close(found["first_order"], d, 1e-12)
    assert_close(found["betty"], want, 1e-3)


def test_the_difference_is_taken_over_all_factors_together():
    """e = radius / ||v||, v of all layers; written out."""
    model, lower, upper = adapted(), batch(1), batch(9)
    E, V = leaves(model)
    C = dense(model, E | V, upper)
    d, v = (torch.autograd.grad(C, list(t.values()), retain_graph=True) for t in (E, V))
    e = 0.01 / torch.cat([g.flatten() for g in v]).norm()
    sides = []
    for sign in (1, -1):
        moved = {n: (q + sign * e * g).detach() for (n, q), g in zip(V.items(), v, strict=True)}
        sides.append(torch.autograd.grad(dense(model, E | moved, lower), list(E.values())))
    want = [g - (a - b) / (2 * e) for g, a, b in zip(d, *sides, strict=True)]
    bilevel = train.BiLoRABilevel([upper])
    with train.attach(model, train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=LR), [bilevel]) as runner, runner.quiet():
        got = bilevel.hypergradient(runner.ctx, train.Batch((), upper), [train.Batch((), lower)])
    assert_close(got, want, 1e-10)


def test_the_second_regulariser_is_in_the_upper_gradient_alone():
    model, lower, upper = adapted(values="sigmoid"), batch(1), batch(9)
    found = []
    for gamma2 in (0.0, 0.7):
        bilevel = train.BiLoRABilevel([upper], gamma2=gamma2)
        with train.attach(model, train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=LR), [bilevel]) as runner, runner.quiet():
            found.append(bilevel.hypergradient(runner.ctx, train.Batch((), upper), [train.Batch((), lower)]))
    values_of = sum(binary_entropy(m.spectrum()) for m in parts(model).values())
    extra = torch.autograd.grad(0.7 * values_of, list(own(model)[0].values()))
    assert_close([b - a for a, b in zip(*found, strict=True)], extra, 1e-9)


def test_the_first_regulariser_is_in_the_lower_loss():
    model, b = adapted(), batch(1)
    plainly = model.train()(**b)["loss"]
    bilevel = train.BiLoRABilevel([b], gamma1=0.05)
    with train.attach(model, train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=LR), [bilevel]) as runner:
        loss = model(**b)["loss"]
        with runner.quiet():
            assert torch.equal(model(**b)["loss"], plainly)
    assert_fp64(loss - plainly, 0.05 * r1(own(model)[1]))


# --- what moves what


@pytest.mark.parametrize("hypergrad", ["betty", "darts", "first_order"])
def test_e_moves_by_its_own_optimiser_alone_and_the_factors_by_the_loops(hypergrad):
    """Four steps: E is an AdamW of the upper gradients, at a rate that a scheduler moves; V is what the step left."""
    model = adapted()
    E, V = own(model)
    twins = [e.detach().clone().requires_grad_() for e in E.values()]
    bilevel, found, kept = train.BiLoRABilevel([batch(9), batch(8)], hypergrad=hypergrad, lr=0.7), [], []
    real = bilevel.hypergradient
    bilevel.hypergradient = lambda *a: found.append([g.clone() for g in real(*a)]) or found[-1]
    optimizer = train.build_optimizer(model, [bilevel], torch.optim.AdamW, lr=0.1, weight_decay=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    theirs = UPPER(twins, lr=1.0)
    with train.attach(model, optimizer, [bilevel]) as runner:
        for k in range(4):
            model(**batch(k))["loss"].backward()
            assert all(e.grad is None for e in E.values()), "nothing of E is there to be clipped or stepped with"
            before = [e.detach().clone() for e in E.values()]
            optimizer.step()
            assert all(torch.equal(e, was) for e, was in zip(E.values(), before, strict=True))
            kept = [p.detach().clone() for p in V.values()]
            scheduler.step()
            optimizer.zero_grad()
            runner.step_end()
            assert all(torch.equal(p, was) and p.grad is None for p, was in zip(V.values(), kept, strict=True))
            theirs.param_groups[0]["lr"] = 0.7 / (k + 2)
            for t, g in zip(twins, found[k], strict=True):
                t.grad = g.clone()
            theirs.step()
            assert all(torch.equal(e, t) and e.grad is None for e, t in zip(E.values(), twins, strict=True))
    assert bilevel.batches == 4 and not any(e in optimizer.state for e in E.values())


@pytest.mark.parametrize("lr", [None, 0.7])
def test_the_rate_of_e(lr):
    model = adapted()
    bilevel = train.BiLoRABilevel([batch(9)], lr=lr)
    groups = train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=0.1).param_groups
    assert [(g["lr"], len(g["params"])) for g in groups] == ([(0.1, 6)] if lr is None else [(0.1, 4), (0.7, 2)])


@pytest.mark.parametrize(("T1", "T2"), [(1, 1), (3, 2)])
def test_how_many_steps_each_level_takes(T1, T2):
    model, seen = adapted(), []
    bilevel = train.BiLoRABilevel([batch(k) for k in range(20, 24)], hypergrad="darts", lower_steps=T1, upper_steps=T2)
    real = bilevel.hypergradient

    def look(ctx, upper, lower):
        seen.append((ctx.step, float(upper.kwargs["x"][0, 0]), float(lower[0].kwargs["x"][0, 0])))
        return real(ctx, upper, lower)

    bilevel.hypergradient = look
    optimizer = train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=0.01)
    with train.attach(model, optimizer, [bilevel]) as runner:
        for k in range(6):
            model(**batch(k))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    steps = [k for k in range(1, 7) if k % T1 == 0 for _ in range(T2)]
    assert [s for s, *_ in seen] == steps
    assert [u for _, u, _ in seen] == [float(batch(20 + k % 4)["x"][0, 0]) for k in range(len(steps))]
    assert [low for *_, low in seen] == [float(batch(s - 1)["x"][0, 0]) for s in steps], "b1 is the last lower step's"


def test_an_upper_step_at_the_start_would_do_nothing():
    """B is zero: the gradient of E is zero until the lower level has stepped."""
    torch.manual_seed(3)
    model = Net()
    fastpeft.adapt(model, "bilora", rank=RANK)
    bilevel = train.BiLoRABilevel([batch(9)], hypergrad="first_order")
    with train.attach(model, train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=LR), [bilevel]) as runner, runner.quiet():
        h = bilevel.hypergradient(runner.ctx, train.Batch((), batch(9)), [])
        assert not any(g.any() for g in h)


def test_the_passes_are_without_dropout_and_leave_no_trace():
    """Twice the same; generators and modes are back; V too, when a pass fails."""
    model, lower, upper = adapted(dropout=0.5).train(), [train.Batch((), batch(1))], train.Batch((), batch(9))
    bilevel = train.BiLoRABilevel([batch(9)], gamma1=0.0)
    optimizer = train.build_optimizer(model, [bilevel], torch.optim.SGD, lr=LR)
    with train.attach(model, optimizer, [bilevel]) as runner:
        state, before = torch.get_rng_state(), values(model)
        model(**batch(1))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        now = torch.get_rng_state()
        runner.step_end()
        assert torch.equal(torch.get_rng_state(), now) and not torch.equal(now, state) and model.training
        with runner.quiet():
            model.eval()
            first, second = (bilevel.hypergradient(runner.ctx, upper, lower) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and model.training
        before, calls = values(model), itertools.count()

        def fails(output, b):
            if next(calls) == 2:
                raise KeyError("a loss")
            return output["loss"]

        bilevel.loss = fails
        with runner.quiet(), pytest.raises(KeyError, match="a loss"):
            bilevel.hypergradient(runner.ctx, upper, lower)
        assert_same(values(model), before)


# --- two sets of data


@pytest.mark.parametrize(("count", "share"), [(10, 0.8), (11, 0.8), (997, 0.8), (7, 0.5), (2, 0.5)])
def test_the_two_parts_have_nothing_in_common(count, share):
    first, second = train.divide(count, share, seed=4)
    assert sorted(first + second) == list(range(count)) and not set(first) & set(second)
    assert abs(len(first) / count - share) <= 1 / count
    assert (first, second) == train.divide(count, share, seed=4)
    if count > 10:
        assert train.divide(count, share, seed=5) != (first, second)


@pytest.mark.parametrize("arguments", [(1,), (10, 0.0), (10, 1.0), (3, 0.1)])
def test_divisions_that_leave_nothing(arguments):
    with pytest.raises(ValueError, match="divide: "):
        train.divide(*arguments)


def test_no_level_reads_the_others_data():
    """Which examples a pass reads, and whether E or V then moves by it; D1 in an upper step only with V set aside."""
    data = [{"x": torch.full((16,), float(k), dtype=DT), "y": torch.ones(16, dtype=DT)} for k in range(20)]
    first, second = train.divide(20)
    d1, d2 = (train.Batches([data[k] for k in part], 4, seed=2) for part in (first, second))
    passes = []

    class Look(Net):
        def forward(self, x, y):
            passes.append((self.training, {int(k) for k in x[:, 0]}))
            return super().forward(x, y)

    torch.manual_seed(1)
    model = Look()
    fastpeft.adapt(model, "bilora", rank=2)
    bilevel = train.BiLoRABilevel(d2, hypergrad="darts")
    optimizer = train.build_optimizer(model, [bilevel], torch.optim.AdamW, lr=0.01)
    with train.attach(model, optimizer, [bilevel]) as runner:
        for k in range(8):
            model(**d1(k))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    for k in range(8):
        trained, upper, *sides = passes[4 * k : 4 * k + 4]
        assert trained[0] and trained[1] <= set(first)
        assert not upper[0] and upper[1] <= set(second)
        assert all(not t and rows == trained[1] for t, rows in sides)
    assert set().union(*(rows for t, rows in passes if t)) == set(first) and len(passes) == 32


# --- loops


def held_out_ids(k):
    return {"ids": held_out(k)}


def made(dtype=DT):
    torch.manual_seed(1)
    model = Language(dtype=dtype)
    fastpeft.adapt(model, "bilora", rank=RANK)
    return model


def bilevel(**options):
    return [train.BiLoRABilevel(held_out_ids, **(dict(lr=0.1) | options))]


def run_of(steps=8, micros=1, **options):
    return Run(made, functools.partial(bilevel, **options), tokens(steps, micros), loss=loss_in_output)


@pytest.mark.parametrize("options", [{}, dict(hypergrad="darts", lower_steps=2, upper_steps=2)], ids=str)
@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, micros, options, tmp_path):
    run = run_of(8, micros, **options)
    assert_resumes(run, cut, tmp_path / "state")
    upper = torch.load(tmp_path / "state", weights_only=True)["runner"]["procedures"]["0.BiLoRABilevel"]["upper"]
    assert len(upper["state"]) == (6 if cut == 4 or not options else 0)


def test_the_upper_state_is_needed(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        real = train.BiLoRABilevel.load_state_dict
        patch.setattr(train.BiLoRABilevel, "load_state_dict", lambda self, s: real(self, s | {"upper": None}))
        assert_resumes(run_of(), 4, tmp_path / "state")


def test_accumulated_micro_batches_equal_one_batch():
    run, whole = run_of(6, 3), run_of(6)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (one, _), (three, _) = plain(whole), plain(run)
    for (n, a), b in zip(one.state_dict().items(), three.state_dict().values(), strict=True):
        assert_fp64(a, b, n)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips(fused):
    """They are none, and take no upper step."""

    def trained(skips=(), scale=1.0):
        model, procedures = made(torch.float32), bilevel(gamma1=0.0)
        scaled(model, procedures, tokens(6), scaler_of(scale), skips, loss=loss_in_output, fused=fused)
        return model, procedures[0].batches

    model, count = trained((1, 4), 1024.0)
    want, plainly = trained()
    assert_same(model, want)
    assert count == plainly == 6


@pytest.mark.parametrize("accumulation", [1, 3])
def test_under_transformers_trainer(accumulation, tmp_path):
    pytest.importorskip("transformers")
    import loops

    case = loops.Case("bilora", lambda: [train.BiLoRABilevel(loops.held_out())], {"values": "sigmoid"})
    begun = case.begin()
    start = values(begun[0])
    loops.trainer_of(begun, tmp_path, accumulation).train()
    loops.assert_same(begun[0], loops.plain(case, 20, accumulation))
    assert all(not torch.equal(t, start[n]) for n, t in values(begun[0]).items() if n.endswith(".E"))


@pytest.mark.accept
def test_in_the_job(tmp_path):
    """A fifth of the training examples is the upper level's, and no arm's; the memory of its steps is measured."""
    pytest.importorskip("transformers")
    from job_models import WORDS, tiny_model, write_rows

    from fastpeft.job.finetune import finetune
    from fastpeft.job.settings import Settings

    data = write_rows(tmp_path / "rows.csv", [(f"{WORDS[k]} {' '.join(WORDS[k % 3 :: 3])}", "ab"[k % 2]) for k in range(24)])
    settings = Settings(
        model=str(tiny_model(tmp_path, "bert")[0]), data=str(data), method="bilora", options={"rank": 2}, epochs=1, batch_size=3,
        max_length=12, threads=1, compare=False, target_modules=("query",), output=str(tmp_path / "out"), quick=True,
    )  # fmt: skip
    [arm] = finetune(settings).arms
    assert "20% of the training examples are BiLoRABilevel's alone" in arm.note
    assert len(arm.losses[0]) == 6, "16 of 20 training examples"


@pytest.mark.parametrize(("method", "more"), [("bilora", {"lr": 0.05}), ("alora_alloc", {"warmup": 3, "interval": 2}), ("aflora", {"start": 2, "tail": 3, "deltaT": 1})])
def test_a_stopped_job_goes_on(method, more, tmp_path):
    """Held-out examples, upper optimiser, gates, frozen matrices: all bits of the result are those of a job that was not stopped."""
    pytest.importorskip("transformers")
    from job_models import WORDS, tiny_model, write_rows
    from test_job_resume import at, changed, result_of
    from test_job_resume import go as run_job

    from fastpeft.job.settings import Settings

    data = write_rows(tmp_path / "rows.csv", [(f"{WORDS[k]} {' '.join(WORDS[k % 3 :: 3])}", "ab"[k % 2]) for k in range(24)])
    kept = Settings(
        model=str(tiny_model(tmp_path, "bert")[0]), data=str(data), method=method, options={"rank": 2, "dropout": 0.1}, epochs=2, batch_size=4,
        max_length=12, threads=1, compare=False, target_modules=("query", "output.dense"), output=str(tmp_path / "a" / "out"), save_every=1,
        procedure_options=more,
    )  # fmt: skip
    stopped = at(kept, tmp_path / "b")
    run_job(kept)
    run_job(stopped, kill=("forward", 7))
    run_job(stopped, again=True)
    assert changed(result_of(stopped), result_of(kept)) == []


def test_what_the_job_holds_out():
    from fastpeft.job.data import Examples
    from fastpeft.job.errors import JobError
    from fastpeft.job.procedures import hold_out

    data = Examples([[k] for k in range(30)], list(range(30)), 0)
    [procedure], used = [train.BiLoRABilevel()], bilevel()
    rest = hold_out([procedure, *used], data, 4, seed=1)
    other = {int(i) for k in range(2) for i in procedure.source(k)["input_ids"][:, 0]}
    assert len(rest) == 24 and other | {r[0] for r in rest.ids} == set(range(30)) and len(other) == 6
    assert [r[0] for r in rest.ids] == rest.labels and used[0].source is held_out_ids
    assert hold_out([procedure], rest, 4, seed=1) is rest, "it has data now"
    with pytest.raises(JobError, match=r"BiLoRABilevel needs a share 0.2 of the training examples"):
        hold_out([train.BiLoRABilevel()], Examples([[1]], [0], 0), 4, seed=1)


# --- a small task


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(20, 40), nn.Linear(40, 40), nn.Linear(40, 2)

    def forward(self, x, y):
        logits = self.head(torch.tanh(self.mid(torch.tanh(self.up(x)))))
        return {"loss": nn.functional.cross_entropy(logits, y)}


def gap(method, seed, procedures=None, **options):
    """Test loss minus training loss after 250 steps on 150 examples, a sixth of whose labels are wrong; procedures(D2): two levels."""
    torch.manual_seed(seed)
    model, teacher, generator = Small(), Small(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        teacher.load_state_dict(model.state_dict())
        for p in (teacher.up.weight, teacher.mid.weight, teacher.head.weight):
            p.add_(1.5 * torch.randn(len(p), 1, generator=generator) @ torch.randn(1, p.shape[1], generator=generator) / p.shape[1] ** 0.5)
        x = torch.randn(1150, 20, generator=generator)
        top = teacher.head(torch.tanh(teacher.mid(torch.tanh(teacher.up(x))))).argmax(1)
        y = torch.where(torch.rand(1150, generator=generator) < 1 / 6, 1 - top, top)
    fastpeft.adapt(model, method, rank=8, target_modules=["up", "mid"], **options)
    first, second = train.divide(150, seed=seed) if procedures else (list(range(150)), [])
    attached = procedures({"x": x[second], "y": y[second]}) if procedures else []
    optimizer = train.build_optimizer(model.train(), attached, torch.optim.AdamW, lr=0.01, weight_decay=0.0)
    with train.attach(model, optimizer, attached) as runner:
        for _ in range(250):
            rows = [first[i] for i in torch.randint(len(first), (32,), generator=generator).tolist()]
            model(x[rows], y[rows])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    with torch.no_grad():
        trained, tested = (float(model.eval()(x[rows], y[rows])["loss"]) for rows in (first, slice(150, None)))
    return tested - trained


def test_the_gap_between_training_and_test_loss_is_smaller_than_loras():
    """On three draws of a small task, with the defaults; also smaller than that of the same layer, all of it trained on all the data.

    Most of that is the work of R1: a layer trained in one level with R1 in its loss comes close.
    """
    for seed in range(3):
        two = gap("bilora", seed, lambda d2: [train.BiLoRABilevel([d2], lr=0.02)], alpha=64)
        assert two < 0.7 * gap("lora", seed) and two < 0.7 * gap("bilora", seed, alpha=64)


# --- arguments


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(hypergrad="exact"), ValueError, "hypergrad='exact'.*betty, darts, first_order"),
    (dict(lower_steps=0), ValueError, "lower_steps=0.*at least 1"),
    (dict(upper_steps=1.0), TypeError, "upper_steps=1.0"),
    (dict(gamma1=-1), ValueError, "gamma1=-1.*at least 0"),
    (dict(gamma2=float("nan")), ValueError, "gamma2=nan"),
    (dict(lr=0.0), ValueError, "lr=0.0.*more than 0"),
    (dict(radius=0), ValueError, "radius=0.*more than 0"),
    (dict(source=3), TypeError, "source is int"),
])  # fmt: skip
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        train.BiLoRABilevel(**options)


def test_what_is_refused():
    model, _, runner = run_of(2).made()
    runner.procedures[0].source = None
    with runner, pytest.raises(RuntimeError, match="BiLoRABilevel: there is no data for the upper level; give source="):
        loss_in_output(model, tokens(1)[0][0])
    low = MLP(torch.bfloat16)
    fastpeft.adapt(low, "bilora", rank=2)
    if next(iter(parts(low).values())).A.dtype is torch.float32:
        low.bfloat16()
    for model, options, words in (
        (low, {}, "factors of 'up' are torch.bfloat16, in which differences are lost"),
        (adapted(), {"gamma2": 0.1}, "gamma2=0.1 at 'up' with values='softmax'; R2 is for values='sigmoid'"),
        (MLP(), {}, "attached to a MLP without a bilora layer"),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=words):
            train.attach(model, optimizer, bilevel(lr=None, **options)).__enter__()
        assert not any(m.attached for m in parts(model).values())
    model = adapted()
    with pytest.raises(ValueError, match="E of 'up' is not in the optimiser"):
        train.attach(model, torch.optim.SGD(own(model)[1].values(), lr=0.1), bilevel(lr=None)).__enter__()
    [a], [b] = bilevel(), bilevel(hypergrad="darts")
    with pytest.raises(ValueError, match=r"other settings.*'hypergrad': \('darts', 'betty'\)"):
        a.load_state_dict(b.state_dict())
    with pytest.raises(ValueError, match="parts are missing"):
        a.load_state_dict(a._settings())


def test_the_layer_trains_without_it():
    model = Net()
    assert fastpeft.adapt(model, "bilora", rank=2).procedures == ["BiLoRABilevel"]
    model.train()(x=rand(3, 16), y=rand(3, 16, grad=False))["loss"].backward()
    assert not any(p.grad is None for p in own(model)[1].values())
    go(run_of(2), *run_of(2).made()[:2], _Nothing())


class _Nothing:
    def step_end(self):
        pass
