"""ALoRA's allocation: scores against ranks that are really taken out, who loses and who gets, the budget, rounds, resuming."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from checks import DT, MLP, perturb, rand
from procedure_runs import Blocks, Run, assert_resumes, held_out, loss_of, next_token_loss, plain, tokens
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.method.alora_alloc import ALoRAAlloc
from fastpeft.train.alora import shares
from fastpeft.train.layers import parts_of

RANK, ALPHA = 2, 3.0


def made(dtype=DT, **options):
    torch.manual_seed(1)
    model = Blocks(dtype=dtype)
    fastpeft.adapt(model, "alora_alloc", **(dict(rank=RANK, alpha=ALPHA) | options))
    return model


def allocation(**options):
    return [train.ALoRAAllocation(held_out, **(dict(warmup=3, interval=2, rounds=3, loss=next_token_loss) | options))]


def run_of(steps=12, micros=1, **options):
    return Run(made, functools.partial(allocation, **options), tokens(steps, micros), epoch=4)


def parts(model):
    return parts_of(model, ALoRAAlloc)


def live(model):
    return {n: m.gate.nonzero().flatten().tolist() for n, m in parts(model).items()}


def squares(output, batch):
    return (output - batch[1]).square().mean()


class Attached:
    """An allocation attached to an MLP of two layers. importance(): scores on this batch.   round(scores): one round by given scores."""

    def __init__(self, ranks=RANK, model=None, **options):
        torch.manual_seed(2)
        self.model = MLP() if model is None else model
        fastpeft.adapt(self.model, "alora_alloc", rank=ranks, alpha=ALPHA)
        perturb(self.model)
        self.batch = (rand(6, 16, grad=False), rand(6, 16, grad=False))
        self.procedure = train.ALoRAAllocation([(self.batch[0],)], **(dict(loss=lambda out, x: squares(out, (x, self.batch[1]))) | options))
        self.optimizer = train.build_optimizer(self.model, [self.procedure], torch.optim.AdamW, lr=0.01)
        self.runner = train.attach(self.model, self.optimizer, [self.procedure])

    def __enter__(self):
        self.runner.__enter__()
        return self

    def __exit__(self, *error):
        self.runner.__exit__(*error)

    def importance(self):
        return self.procedure.importance(self.runner.ctx, train.Batch((self.batch[0],), {}))

    def round(self, scores=None):
        if scores is not None:
            found = {n: torch.tensor(s, dtype=DT) for n, s in scores.items()}
            self.procedure.importance = lambda ctx, batch: found
        self.procedure._reallocate(self.runner.ctx)


# --- the scores


def without(model, keep):
    """A copy whose layers are plain linears with W + s B A of the ranks in `keep` (layer -> list)."""
    bare = MLP()
    with torch.no_grad():
        for name, m in parts(model).items():
            layer, own = model.get_submodule(name), keep.get(name, [])
            A, B = m.A[own], m.B[:, own]
            bare.get_submodule(name).weight.copy_(layer.weight + ALPHA / m.rank * B @ A)
            bare.get_submodule(name).bias.copy_(layer.bias)
    return bare


def test_scores_are_those_of_ranks_that_are_really_taken_out():
    with Attached(3) as a:
        parts(a.model)["up"].close([1])
        parts(a.model)["down"].open(2)
        perturb(a.model)
        scores, now = a.importance(), live(a.model)

        def S(keep):
            with torch.no_grad():
                return -squares(without(a.model, keep)(a.batch[0]), a.batch)

        assert {n: s.isfinite().nonzero().flatten().tolist() for n, s in scores.items()} == now == {"up": [0, 2], "down": [0, 1, 2, 3, 4]}
        for name, ranks in now.items():
            for r in ranks:
                fewer = now | {name: [q for q in ranks if q != r]}
                assert_fp64(scores[name][r], S(now) - S(fewer) + S({name: [r]}), f"{name} {r}")


def test_a_rank_whose_b_is_zero_scores_as_the_base_model():
    with Attached(3) as a:
        with torch.no_grad():
            parts(a.model)["up"].B[:, 1] = 0.0
        scores = a.importance()["up"]
        with fastpeft.adapters_off(a.model), torch.no_grad():
            base = -squares(a.model(a.batch[0]), a.batch)
        assert abs(scores[1] - base) < 1e-12 and abs(scores[0] - base) > 1e-6


def test_scoring_changes_nothing():
    """Gates, generators, modes, gradients; also when a pass fails. No event is told of it, and dropout does not act."""

    class Told(train.Procedure):
        seen = 0

        def before_forward(self, ctx, batch):
            self.seen += 1

    with Attached(3) as a:
        told = Told()
        a.runner.procedures.append(told)
        a.model.train()
        a.model.down.eval()
        for m in parts(a.model).values():
            m.dropout = 0.5
        parts(a.model)["up"].close([0])
        before, state = live(a.model), torch.get_rng_state()
        first = a.importance()
        for m in parts(a.model).values():
            m.dropout = 0.0
        second = a.importance()
        assert all(torch.equal(first[n].nan_to_num(), second[n].nan_to_num()) for n in first)
        calls = itertools.count()

        def fails(output, batch):
            if next(calls) == 3:
                raise KeyError("a loss")
            return output.sum()

        a.procedure.loss = fails
        with pytest.raises(KeyError, match="a loss"):
            a.importance()
        assert live(a.model) == before and torch.equal(torch.get_rng_state(), state) and told.seen == 0
        assert a.model.training and a.model.up.training and not a.model.down.training
        assert all(p.grad is None for p in a.model.parameters())


def test_a_loss_that_is_not_finite_moves_nothing():
    with Attached() as a:
        before = live(a.model)
        a.procedure.loss = lambda out, x: out.sum() * float("nan")
        with pytest.raises(ValueError, match="ALoRAAllocation: a loss on the held-out batch is not finite"):
            a.round()
        assert live(a.model) == before


# --- who loses, who gets


@pytest.mark.parametrize(("count", "spare", "want"), [
    (8, [9, 9, 9], [3, 3, 2]), (7, [9, 9, 9], [3, 2, 2]), (2, [9, 9, 9], [1, 1, 0]), (8, [1, 9, 9], [1, 4, 3]),
    (8, [1, 2, 1], [1, 2, 1]), (3, [], []), (0, [4, 4], [0, 0]), (5, [0, 9], [0, 5]),
])  # fmt: skip
def test_shares(count, spare, want):
    assert shares(count, spare) == want


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(16, 16, dtype=DT))

    def forward(self, x):
        return sum(getattr(self, name)(x) for name in "abcde")


def test_the_lowest_of_all_layers_go_and_the_best_of_the_others_get_the_remainder():
    """Eight of twenty ranks, a and b lose; of c, d, e the mean scores are 5, 9 and 7."""
    with Attached(4, Many(), ranks_per_round=8) as a:
        low = {"a": [-1.0, -2.0, -3.0, -4.0], "b": [0.0, 0.1, 0.2, 0.3]}
        high = {"c": [5.0, 4.0, 6.0, 5.0], "d": [9.0] * 4, "e": [7.0, 7.0, 13.0, 1.0]}
        nan = [float("nan")] * 4
        x = a.batch[0]
        a.round({n: s + nan for n, s in (low | high).items()})
        assert a.procedure.ranks == {"a": 0, "b": 0, "c": 6, "d": 7, "e": 7}
        kept = live(a.model)
        assert_fp64(a.model(x), sum(nn.functional.linear(x, layer.weight + ALPHA / 4 * parts(a.model)[n].B[:, kept[n][:4]]
                                                         @ parts(a.model)[n].A[kept[n][:4]], layer.bias)
                                    for n, layer in a.model.named_children()))  # fmt: skip
        for n in "cde":
            m = parts(a.model)[n]
            assert not m.B[:, kept[n][4:]].any() and m.A[kept[n][4:]].abs().min() > 0


def test_equal_scores_go_by_layer_and_rank():
    with Attached(3, Many(), ranks_per_round=4) as a:
        a.round({n: [1.0] * 3 + [float("nan")] * 3 for n in "abcde"})
        assert a.procedure.ranks == {"a": 0, "b": 2, "c": 5, "d": 4, "e": 4}


def test_the_total_shrinks_where_every_layer_loses_or_none_has_room():
    with Attached(2, ranks_per_round=2) as a:
        a.round({"up": [0.0, 5.0, *[float("nan")] * 2], "down": [0.1, 5.0, *[float("nan")] * 2]})
        assert a.procedure.ranks == {"up": 1, "down": 1}
    with Attached(2, ranks_per_round=2) as a:
        a.round({"up": [0.0, 0.1, *[float("nan")] * 2], "down": [1.0, 1.0, *[float("nan")] * 2]})
        assert a.procedure.ranks == {"up": 0, "down": 4}
        a.round({"up": [float("nan")] * 4, "down": [1.0, 1.0, 1.0, 1.0]})
        assert a.procedure.ranks == {"up": 2, "down": 2}, "a layer that has none left lost none"
    with Attached(2, ranks_per_round=3) as a:
        a.round({"up": [0.0, 0.1, *[float("nan")] * 2], "down": [2.0, 1.0, *[float("nan")] * 2]})
        assert a.procedure.ranks == {"up": 0, "down": 1}


def test_the_budget_holds_over_rounds():
    """Never above the start, and met after every round with a layer that lost nothing and has room."""
    generator = torch.Generator().manual_seed(3)
    with Attached(4, Many(), ranks_per_round=3, rounds=40) as a:
        most = sum(a.procedure.ranks.values())
        for _ in range(40):
            before = a.procedure.ranks
            spare = {n: 8 - r for n, r in before.items()}
            scores = {n: torch.randn(8, generator=generator, dtype=DT).masked_fill(~m.gate, float("nan")) for n, m in parts(a.model).items()}
            a.round({n: s.tolist() for n, s in scores.items()})
            after = a.procedure.ranks
            flat = sorted((float(v), n) for n, s in scores.items() for v in s[s.isfinite()])
            losers = {n for _, n in flat[:3]}
            room = sum(v for n, v in spare.items() if n not in losers)
            assert sum(after.values()) == sum(before.values()) - 3 + min(3, room)
            assert sum(after.values()) <= most and all(0 <= r <= 8 for r in after.values())


def test_closed_ranks_are_out_of_the_optimiser_and_new_ones_start_afresh():
    model, optimizer, runner = run_of(4).made()
    with runner:
        for batch in itertools.chain(*run_of(3).data):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
        moved = [m for m in parts(model).values() if m.gate.tolist() != [True] * RANK + [False] * RANK]
        assert moved and runner.procedures[0].round == 1
        for m in parts(model).values():
            changed = (m.gate != (torch.arange(4) < RANK)) | ~m.gate
            for key in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[m.A][key][changed].any() and not optimizer.state[m.B][key][:, changed].any()
            assert not m.A[~m.gate].any() and not m.B[:, ~m.gate].any()
        for batch in itertools.chain(*tokens(2, seed=8)):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
        assert all(not m.A[~m.gate].any() and not m.B[:, ~m.gate].any() for m in parts(model).values())


class OneType(nn.Module):
    """Residual blocks of two linears; what `k` computes is not used, so only ranks in `q` can help."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8, dtype=DT) for n in "qk"}) for _ in range(2))

    def forward(self, x):
        for b in self.blocks:
            x = x + b["q"](torch.tanh(x)) + 0.0 * b["k"](x)
        return x


def test_ranks_go_where_the_task_needs_them():
    torch.manual_seed(4)
    model, teacher = OneType(), OneType()
    fastpeft.adapt(model, "alora_alloc", rank=2, capacity=4)
    x = torch.randn(64, 8, dtype=DT)
    with torch.no_grad():
        y = teacher(x)
    procedure = train.ALoRAAllocation([(x,)], warmup=15, interval=10, rounds=2, loss=lambda out, _: (out - y).square().mean())
    optimizer = train.build_optimizer(model, [procedure], torch.optim.AdamW, lr=0.03)
    with train.attach(model, optimizer, [procedure]) as runner:
        for _ in range(40):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    ranks = {n: m.live() for n, m in parts(model).items()}
    assert ranks == {"blocks.0.q": 4, "blocks.0.k": 0, "blocks.1.q": 4, "blocks.1.k": 0}


# --- rounds


@pytest.mark.parametrize(("options", "at"), [
    (dict(warmup=3, interval=2, rounds=3), [3, 5, 7]),
    (dict(warmup=None, interval=3, rounds=2), [4, 7]),
    (dict(warmup=None, interval=None, rounds=4), [4, 5, 6, 7]),  # epochs of 4 steps: a quarter is one
    (dict(warmup=8, interval=None, rounds=9), [8, 10, 12]),
    (dict(warmup=3, rounds=0), []),
], ids=str)  # fmt: skip
def test_when_rounds_come(options, at):
    run, seen = run_of(12, **options), []
    model, optimizer, runner = run.made()
    count, source = runner.procedures[0].round, []
    runner.procedures[0].source = lambda k: source.append(k) or held_out(k)
    with runner:
        for k, [batch] in enumerate(run.data, 1):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
            if k % run.epoch == 0:
                runner.epoch_end()
            if runner.procedures[0].round != count:
                count = runner.procedures[0].round
                seen.append(k)
    assert seen == at and source == list(range(len(at))), "one batch per round"


def test_one_rank_per_type_and_round_by_default():
    with Attached(4, Many()) as a:
        assert a.procedure.count == 5
    model = made()
    [procedure] = allocation(ranks_per_round=None)
    with train.attach(model, train.build_optimizer(model, [procedure], torch.optim.SGD, lr=0.1), [procedure]):
        assert procedure.count == 2, "up and down"


def test_with_no_round_and_every_gate_on_it_is_lora():
    ends = []
    for method, more, procedures in (("lora", {}, list), ("alora_alloc", {"capacity": RANK}, functools.partial(allocation, rounds=0))):
        def begin(method=method, more=more):
            torch.manual_seed(1)
            model = Blocks()
            fastpeft.adapt(model, method, rank=RANK, alpha=ALPHA, **more)
            return model

        model, _ = plain(Run(begin, procedures, tokens(5)))
        ends.append(model(tokens(1)[0][0]))
    assert torch.equal(*ends)


# --- loops


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("cut", [2, 3, 6])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, micros, tmp_path):
    """Before the first round, just after it, between two."""
    run = run_of(10, micros)
    assert_resumes(run, cut, tmp_path / "state")
    model, _ = plain(run)
    assert live(model) != live(made()) and sum(map(len, live(model).values())) == 12


@pytest.mark.parametrize("accumulation", [1, 3])
def test_under_transformers_trainer(accumulation, tmp_path):
    """The default first round is at the first epoch's end: the same bits as in a plain loop."""
    pytest.importorskip("transformers")
    import loops

    case, procedures = loops.MORE["alora_alloc"], []
    asked = loops.Case(case.method, lambda: [procedures.append(p) or p for p in case.procedures()], case.options)
    begun = asked.begin()
    loops.trainer_of(begun, tmp_path, accumulation).train()
    loops.assert_same(begun[0], loops.plain(case, 20, accumulation))
    assert procedures[0].round == (2 if accumulation == 1 else 4)


@pytest.mark.parametrize("saves", [dict(save_strategy="steps", save_steps=5), dict(save_strategy="epoch")], ids=str)
@pytest.mark.parametrize("name", ["alora_alloc", "periodic_lora"])
def test_resuming_a_trainer_at_the_end_of_an_epoch(name, saves, tmp_path):
    """A checkpoint of the last step is written before the epoch's end, one per epoch after it: it comes once in either run."""
    pytest.importorskip("transformers")
    import loops

    case = loops.MORE[name]
    whole, resumed = case.begin(), case.begin()
    loops.trainer_of(whole, tmp_path, 3, **saves).train()
    loops.trainer_of(resumed, tmp_path, 3, **saves).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    loops.assert_same(resumed[0], whole[0])


def test_in_the_job(tmp_path, monkeypatch):
    """A part of the training examples is the allocation's; a round takes place after the first epoch."""
    pytest.importorskip("transformers")
    from job_models import WORDS, tiny_model, write_rows

    from fastpeft.job import memory
    from fastpeft.job.finetune import finetune
    from fastpeft.job.settings import Settings

    monkeypatch.setattr(memory, "measure", lambda *a, **k: dict(loaded=1, peak=2, cuda_peak=0))
    data = write_rows(tmp_path / "rows.csv", [(f"{WORDS[k]} {' '.join(WORDS[k % 3 :: 3])}", "ab"[k % 2]) for k in range(24)])
    settings = Settings(
        model=str(tiny_model(tmp_path, "bert")[0]), data=str(data), method="alora_alloc", options={"rank": 2}, epochs=2, batch_size=4,
        max_length=12, threads=1, compare=False, target_modules=("query", "value"), output=str(tmp_path / "out"),
        procedure_options={"rounds": 1},
    )  # fmt: skip
    [arm] = finetune(settings).arms
    assert "10% of the training examples are ALoRAAllocation's alone" in arm.note
    model = fastpeft_model(tmp_path)
    fastpeft.load_adapter(model, tmp_path / "out" / "adapter")
    ranks = [m.live() for m in parts(model).values()]
    assert sum(ranks) == 8 and set(ranks) != {2}


def fastpeft_model(folder):
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)


# --- arguments


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(warmup=0), ValueError, "ALoRAAllocation: warmup=0.*at least 1"),
    (dict(interval=1.5), TypeError, "interval=1.5"),
    (dict(rounds=-1), ValueError, "rounds=-1.*at least 0"),
    (dict(ranks_per_round=0), ValueError, "ranks_per_round=0"),
    (dict(source=iter([1])), TypeError, "source is list_iterator.*Batches"),
    (dict(source="file"), TypeError, "source is str"),
    (dict(source=[]), ValueError, "source is empty"),
])  # fmt: skip
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        train.ALoRAAllocation(**options)


def test_what_is_refused():
    model, _, runner = run_of(2).made()
    runner.procedures[0].source = None
    with runner, pytest.raises(RuntimeError, match="ALoRAAllocation: there is no data for the scores; give source="):
        model(tokens(1)[0][0])
    with Attached(loss=None) as a, pytest.raises(RuntimeError, match=r"output .Tensor. has no `loss` tensor; give loss="):
        a.round()
    with pytest.raises(ValueError, match="ALoRAAllocation: attached to a MLP without a alora_alloc layer"):
        train.attach(MLP(), torch.optim.SGD(MLP().parameters()), allocation()).__enter__()
    [a], [b] = allocation(), allocation(rounds=2)
    with pytest.raises(ValueError, match=r"another allocation.*'rounds': \(2, 3\)"):
        a.load_state_dict(b.state_dict())
    with pytest.raises(ValueError, match="parts are missing"):
        a.load_state_dict(a._settings())


def test_the_layer_trains_without_it():
    report = fastpeft.adapt(MLP(), "alora_alloc", rank=2)
    assert report.procedures == ["ALoRAAllocation"]
    model = made().train()
    before = copy.deepcopy(model.state_dict())
    loss_of(model, tokens(1)[0][0]).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- sources


def test_a_source_gives_every_example_once_per_epoch():
    source = train.Batches(range(10), 4, seed=3, collate=list)
    assert len(source) == 3
    epochs = [[source(3 * e + k) for k in range(3)] for e in range(2)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(10)) and list(map(len, epoch)) == [4, 4, 2] for epoch in epochs)
    assert epochs[0] != epochs[1] and source(4) == train.Batches(range(10), 4, seed=3, collate=list)(4)
    assert train.Batches([{"x": 1.0}, {"x": 2.0}], 2)(0)["x"].sum() == 3.0, "torch's default collation"
    with pytest.raises(ValueError, match="no examples"):
        train.Batches([], 4)
    with pytest.raises(ValueError, match="size=0"):
        train.Batches(range(3), 0)
