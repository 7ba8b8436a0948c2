"""O-LoRA: stock PEFT's LoRA of the stacked ranks, the penalty and its gradient, three tasks in a row, folders between them."""

from __future__ import annotations

import copy
import json

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand
from test_methods import grads
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.method.o_lora import overlap
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, moved, peft_logits, peft_lora

IN, OUT, RANK, ALPHA = 13, 11, 3, 6.0


def built(tasks=3, **options):
    """A layer in its `tasks`-th task, everything moved."""
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="o_lora", rank=RANK, alpha=ALPHA, dtype=DT, **options))
    for _ in range(tasks - 1):
        layer.adapter.o_lora.advance()
        moved(layer)
    return layer, layer.adapter.o_lora


def stacked(m):
    if m.A_prev is None:
        return m.A, m.B
    return torch.cat([m.A_prev, m.A]), torch.cat([m.B_prev, m.B], 1)


def adapted(tasks=1, model=None, **options):
    model = model or MLP()
    fastpeft.adapt(model, "o_lora", **(dict(rank=RANK, alpha=ALPHA) | options))
    perturb(model)
    for _ in range(tasks - 1):
        train.next_task(model)
        perturb(model)
    return model


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_equals_peft_lora_of_the_stacked_ranks(tasks, options, lead):
    """alpha grows with the rank: alpha / rank stays. One dropout mask serves all tasks' factors."""
    layer, m = built(tasks, **options)
    assert_equals_peft(layer, lambda: stacked(m), ALPHA * tasks, lead, options.get("dropout", 0.0))


@pytest.mark.parametrize("tasks", [1, 3])
def test_equals_the_formula(tasks):
    layer, m = built(tasks)
    A, B = stacked(m)
    pairs = list(zip(A.split(RANK), B.split(RANK, 1), strict=True))
    x = rand(2, 5, IN)
    got, want = layer(x), papers.o_lora(x, layer.weight, layer.bias, pairs, ALPHA / RANK)
    assert len(pairs) == tasks
    own = {"x": x, "A": m.A, "B": m.B}
    compare(got, want, own, own)


def test_start():
    m = fastpeft.AdaptedLinear(300, 200, method="o_lora").adapter.o_lora
    assert not m.B.any() and not any(delta_weight(t).any() for t in m.terms(None))
    assert 0.9 < m.A.abs().max() * 300**0.5 <= 1 and m.scale == 4.0 and set(m.state_dict()) == {"A", "B"}
    waiting = fastpeft.AdaptedLinear(300, 200, method="o_lora", previous=2).adapter.o_lora
    assert waiting.A_prev.shape == (16, 300) and waiting.B_prev.shape == (200, 16)
    assert not waiting.A_prev.any() and [n for n, _ in waiting.named_parameters()] == ["A", "B"]


# ---- the penalty


@pytest.mark.parametrize("orth", ["l1", "fro2"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_the_penalty_and_its_gradient(tasks, orth):
    _, m = built(tasks)
    value = m.penalty(orth)
    products = [A @ m.A.T for A in m.A_prev.split(RANK)]
    entry = torch.abs if orth == "l1" else torch.square
    assert_fp64(value, sum(entry(e) for P in products for e in P.flatten()))
    dA, dB = torch.autograd.grad(value, (m.A, m.B), allow_unused=True)
    outer = torch.sign if orth == "l1" else (lambda P: 2 * P)
    want = sum(outer(P).T @ A for P, A in zip(products, m.A_prev.split(RANK), strict=True))
    assert_fp64(dA, want)
    assert dB is None and m.A_prev.requires_grad is False


def test_the_penalty_vanishes_for_orthogonal_rows_and_in_the_first_task():
    _, m = built(1)
    assert m.penalty() == 0 and m.penalty("fro2").dtype is DT
    (m.penalty() + m.magnitude()).backward()
    eye = torch.eye(IN, dtype=DT)
    assert overlap(eye[:3], eye[3:6]) == 0 and overlap(eye[:3], eye[2:5]) == 1


def test_the_penalty_is_fp32_under_autocast():
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="o_lora", rank=RANK, dtype=torch.bfloat16))
    layer.adapter.o_lora.advance()
    m = layer.adapter.o_lora
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = m.penalty()
    assert value.dtype is torch.float32 and torch.equal(value, m.penalty())
    low = overlap(m.A_prev.bfloat16(), m.A.bfloat16())
    assert low.dtype is torch.float32
    assert torch.equal(low, overlap(m.A_prev.bfloat16().float(), m.A.bfloat16().float()))


def test_the_magnitude_and_its_gradient_at_a_zero_b():
    _, m = built(1)
    assert_fp64(m.magnitude(), sum(m.A.flatten() ** 2).sqrt() + sum(m.B.flatten() ** 2).sqrt())
    m.advance()
    dA, dB = torch.autograd.grad(m.magnitude(), (m.A, m.B))
    assert_fp64(dA, m.A / m.A.norm())
    assert torch.equal(dB, torch.zeros_like(m.B))


@pytest.mark.parametrize("orth", ["fro", 1, None])
def test_the_penalty_refuses_other_norms(orth):
    with pytest.raises(ValueError, match=r"o_lora: orth=.*'l1' or 'fro2'"):
        built()[1].penalty(orth)


# ---- from task to task


def test_three_tasks():
    """A new task starts where the last one ended; what earlier ones learned stays to the bit while it trains."""
    model, x = adapted().eval(), rand(5, 16)
    m = model.up.adapter.o_lora
    A, B = m.A, m.B
    for task in (1, 2):
        want = model(x)
        learned = [t.detach().clone() for t in stacked(m)]
        assert train.next_task(model) == task
        assert_fp64(model(x), want, f"logits at the start of task {task + 1}")
        assert m.A is A and m.B is B and not B.any() and A.abs().max() <= 16**-0.5 and A.any()
        assert A.grad is None and B.grad is None
        assert torch.equal(m.A_prev, learned[0]) and torch.equal(m.B_prev, learned[1])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        for _ in range(3):
            loss = model.train()(x).square().sum() + 0.5 * sum(s.adapter.o_lora.penalty() for s in (model.up, model.down))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        assert torch.equal(m.A_prev, learned[0]) and torch.equal(m.B_prev, learned[1])
        assert not torch.equal(model(x), want) and B.any()
    assert m.A_prev.shape == (2 * RANK, 16)


def test_the_penalty_turns_a_new_task_away_from_the_old_rows():
    _, m = built(2)
    optimizer, first = torch.optim.SGD([m.A], lr=0.02), m.penalty("fro2").item()
    for _ in range(300):
        optimizer.zero_grad()
        m.penalty("fro2").backward()
        optimizer.step()
    assert m.penalty("fro2") < 1e-4 * first and m.A.norm() > 0.5


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_folders_hold_every_task(tasks, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = adapted(tasks, copy.deepcopy(plain)).eval()
    want = model(x)
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["options"].get("previous", 0) == tasks - 1
    fresh = copy.deepcopy(plain).eval()
    fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), want)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    fastpeft.load_adapter(model, tmp_path)  # an adapted model in the same task takes it too
    assert torch.equal(model(x), want)
    # and goes on
    assert train.next_task(fresh) == tasks
    assert_fp64(fresh(x), want)
    with pytest.raises(fastpeft.CheckpointError, match="previous"):
        fastpeft.load_adapter(fresh, tmp_path)
    assert_fp64(fresh(x), want)


def test_a_later_task_with_layers_of_unequal_rank(tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = adapted(3, copy.deepcopy(plain), rank_pattern={"down": 2}).eval()
    assert model.down.adapter.o_lora.A_prev.shape == (4, 32) and model.up.adapter.o_lora.A_prev.shape == (6, 16)
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(plain.eval(), tmp_path)
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_exported_lora_is_pefts_of_the_stacked_ranks(tasks, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = adapted(tasks, copy.deepcopy(plain)).eval()
    want = model(x)
    fastpeft.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == tasks * RANK == config["lora_alpha"], "scale 1: alpha / rank of the method is in B"
    assert_fp64(peft_logits(plain, tmp_path, x), want)
    by_hand = copy.deepcopy(plain)
    for name in ("up", "down"):
        layer = model.get_submodule(name)
        setattr(by_hand, name, peft_lora(layer, *(t.detach() for t in stacked(layer.adapter.o_lora)), ALPHA * tasks).eval())
    assert_fp64(by_hand(x), want)
    assert_fp64(fastpeft.merge(model)(x), want)


def test_the_whole_model_after_next_task():
    """Compiled, copied, checkpointed, frozen and unloaded as before it."""
    plain, x = MLP(), rand(5, 16)
    model = adapted(2, copy.deepcopy(plain)).train()
    want = grads(model(x), model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    for got in (grads(compiled(x), model, x), grads(y, model, x)):
        for n, g in want.items():
            assert_fp64(got[n], g, n)
    twin = copy.deepcopy(model)
    train.next_task(twin)
    assert twin.up.adapter.o_lora.A_prev.shape[0] == 2 * RANK and model.up.adapter.o_lora.A_prev.shape[0] == RANK
    assert_fp64(model(x), compiled(x))
    with fastpeft.adapters_off(model):
        assert_fp64(model(x), plain(x))
    fastpeft.unload(model)
    assert torch.equal(model(x), plain(x)) and list(model.state_dict()) == list(plain.state_dict())


def test_next_task_refuses_other_models():
    with pytest.raises(ValueError, match="next_task: this MLP was not adapted"):
        train.next_task(MLP())
    model = MLP()
    fastpeft.adapt(model, "lora", rank=2)
    with pytest.raises(ValueError, match="next_task: this model was adapted with lora; it takes o_lora"):
        train.next_task(model)


def test_olora_is_another_method():
    for call in (lambda: fastpeft.adapt(MLP(), "olora"), lambda: fastpeft.AdaptedLinear(8, 8, method="olora")):
        with pytest.raises(ValueError, match=r"olora.*2406\.01775.*o_lora.*2310\.14152"):
            call()


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(rank=0), ValueError, r"o_lora: rank=0 at 'linear'.*1 to 11"),
    (dict(previous=-1), ValueError, r"o_lora: previous=-1 at 'linear'.*at least 0"),
    (dict(previous=1.0), TypeError, r"o_lora: previous=1.0"),
    (dict(alpha=float("inf")), ValueError, r"o_lora: alpha=inf.*finite"),
    (dict(dropout=1), ValueError, r"o_lora: dropout=1"),
])  # fmt: skip
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "o_lora", **options)
