"""DyLoRA's sampling: the draws, the ranks in use, what a step of each mode moves."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from checks import MLP, perturb, rand

import fastpeft
from fastpeft import train
from fastpeft.method.dylora import DyLoRA, set_rank

RANK, LR = 4, 1e-3


def adapted(**options):
    torch.manual_seed(1)
    model = MLP()
    fastpeft.adapt(model, "dylora", **({"rank": RANK} | options))
    return perturb(model)


def layers(model):
    return [m for m in model.modules() if isinstance(m, DyLoRA)]


def begun(model, procedure, cls=torch.optim.AdamW, **options):
    optimizer = train.build_optimizer(model, [procedure], cls, lr=LR, **options)
    return optimizer, train.attach(model, optimizer, [procedure], accumulation=2)


def step(model, optimizer, runner, look=lambda: None):
    for _ in range(2):
        model(rand(5, 16, grad=False)).square().mean().backward()
    seen = look()
    optimizer.step()
    optimizer.zero_grad()
    runner.step_end()
    return seen


# --- the draws


def share(counts, b, draws):
    return counts[b] / draws


@pytest.mark.parametrize("distribution", ["uniform", "geometric"])
def test_draws_follow_the_distribution(distribution):
    """Within five standard deviations of each rank's probability, over 20000 steps."""
    draws, p = 20000, 0.15
    counts = Counter(train.DyLoRASampling(distribution).draw(k, 8) for k in range(draws))
    weights = [1.0 if distribution == "uniform" else p * (1 - p) ** (b - 1) for b in range(1, 9)]
    assert set(counts) == set(range(1, 9))
    for b, w in enumerate(weights, 1):
        want = w / sum(weights)
        assert abs(share(counts, b, draws) - want) < 5 * (want * (1 - want) / draws) ** 0.5, b


def test_a_draw_is_a_function_of_seed_and_step():
    first = [train.DyLoRASampling(seed=7).draw(k, 8) for k in range(50)]
    torch.manual_seed(99)
    assert [train.DyLoRASampling(seed=7).draw(k, 8) for k in reversed(range(50))] == first[::-1]
    assert [train.DyLoRASampling(seed=8).draw(k, 8) for k in range(50)] != first
    assert {train.DyLoRASampling().draw(k, 1) for k in range(9)} == {1}


# --- ranks in use


def test_one_rank_for_all_layers_and_micro_batches_and_the_old_one_between_steps():
    model, procedure = adapted(rank_pattern={"down": 2}), train.DyLoRASampling(seed=2)
    up, down = layers(model)
    assert (up.b, down.b) == (4, 2)
    seen = []
    model.up.register_forward_hook(lambda *_: seen.append(up.b))
    model.down.register_forward_hook(lambda *_: seen.append(down.b))
    optimizer, runner = begun(model, procedure)
    with runner:
        for _ in range(12):
            step(model, optimizer, runner)
            assert (up.b, down.b) == (4, 2)
    want = [b for k in range(12) for b in (procedure.draw(k, 4), min(procedure.draw(k, 4), 2)) * 2]
    assert seen == want and set(seen) == {1, 2, 3, 4}


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_rank_is_what_it_was_before(fails):
    model = adapted()
    set_rank(model, 3)
    optimizer, runner = begun(model, train.DyLoRASampling())
    try:
        with runner:
            step(model, optimizer, runner)
            assert [m.b for m in layers(model)] == [3, 3]
            model(rand(5, 16))
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [m.b for m in layers(model)] == [3, 3]


# --- what a step moves


@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.AdamW, {"weight_decay": 0.3}), (torch.optim.AdamW, {"weight_decay": 0.3, "fused": True}),
     (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.3})],
    ids=str,
)  # fmt: skip
def test_a_frozen_step_moves_row_b_alone(cls, options):
    """Momentum and decay would move the other rows: they keep their bits. Row b moves as without the procedure."""
    model, procedure = adapted(mode="frozen"), train.DyLoRASampling(seed=1)
    optimizer, runner = begun(model, procedure, cls, **options)
    with runner:
        for k in range(12):
            before = [(m.A.clone(), m.B.clone()) for m in layers(model)]
            twin, other = copy.deepcopy(model), procedure.draw(k, RANK)
            follow = cls([p for p in twin.parameters() if p.requires_grad], lr=LR, **options)
            follow.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            torch.manual_seed(k)
            step(model, optimizer, runner)
            set_rank(twin, other)
            torch.manual_seed(k)
            for _ in range(2):
                twin(rand(5, 16, grad=False)).square().mean().backward()
            follow.step()
            for m, t, (A, B) in zip(layers(model), layers(twin), before, strict=True):
                rows = [i for i in range(RANK) if not torch.equal(m.A[i], A[i])]
                columns = [i for i in range(RANK) if not torch.equal(m.B[:, i], B[:, i])]
                assert rows == columns == [other - 1]
                assert torch.equal(m.A[other - 1], t.A[other - 1]) and torch.equal(m.B[:, other - 1], t.B[:, other - 1])
                assert k == 0 or not torch.equal(m.A, t.A), "nothing else would have moved"


def test_a_full_step_trains_all_ranks_up_to_b():
    """Ranks above b have a gradient of zero; without momentum and decay they stay."""
    model, procedure = adapted(), train.DyLoRASampling(seed=1)
    optimizer, runner = begun(model, procedure, torch.optim.SGD)
    with runner:
        for k in range(12):
            before, b = [(m.A.clone(), m.B.clone()) for m in layers(model)], procedure.draw(k, RANK)
            step(model, optimizer, runner)
            for m, (A, B) in zip(layers(model), before, strict=True):
                assert [i for i in range(RANK) if not torch.equal(m.A[i], A[i])] == list(range(b))
                assert [i for i in range(RANK) if not torch.equal(m.B[:, i], B[:, i])] == list(range(b))


def test_a_skipped_step_is_tried_again_with_the_same_rank():
    model, procedure = adapted(mode="frozen"), train.DyLoRASampling(seed=2)
    optimizer, runner = begun(model, procedure)
    seen = []
    with runner:
        for skip in (False, True, False):
            model(rand(5, 16)).sum().backward()
            seen.append(layers(model)[0].b)
            before = [p.clone() for p in model.parameters()]
            if not skip:
                optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
            assert skip == all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert seen == [procedure.draw(0, RANK), procedure.draw(1, RANK), procedure.draw(1, RANK)]


def test_training_at_sampled_ranks_serves_every_rank():
    """On a target of rank 4, the model cut to each lower rank is better than a DyLoRA trained at full rank only."""
    torch.manual_seed(3)
    x = torch.randn(256, 16, dtype=torch.float64)
    base = MLP()
    goal = copy.deepcopy(base)
    goal.down.weight.data += torch.randn(16, 4, dtype=torch.float64) @ torch.randn(4, 32, dtype=torch.float64) / 4
    want, losses = goal(x).detach(), {}
    for sampled in (True, False):
        model = copy.deepcopy(base)
        torch.manual_seed(4)
        fastpeft.adapt(model, "dylora", rank=RANK, target_modules=["down"])
        procedures = [train.DyLoRASampling()] if sampled else []
        optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=0.01)
        with train.attach(model, optimizer, procedures) as runner:
            for _ in range(400):
                (model(x) - want).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()
        for b in range(1, RANK + 1):
            set_rank(model, b)
            losses[sampled, b] = (model(x) - want).square().mean().item()
    assert all(losses[True, b] < losses[False, b] for b in (1, 2, 3)), losses


# --- states, errors


def test_report_names_the_procedure():
    assert fastpeft.adapt(MLP(), "dylora").procedures == ["DyLoRASampling"]


def test_what_is_refused():
    for options, words in (
        ({"distribution": "normal"}, "distribution='normal'; it must be one of uniform, geometric"),
        ({"p": 1.0}, "p=1.0; it must be more than 0 and less than 1"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ValueError, match=words):
            train.DyLoRASampling(**options)
    with pytest.raises(ValueError, match="attached to a MLP without a dylora layer"):
        begun(MLP(), train.DyLoRASampling())[1].__enter__()
    with pytest.raises(ValueError, match="DyLoRASampling: the state is of other draws"):
        train.DyLoRASampling(seed=1).load_state_dict(train.DyLoRASampling().state_dict())
