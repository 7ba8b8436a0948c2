"""The checks of stage part_grouped notice what is wrong, and bench.experts measures what it says: pytest bench/."""

from __future__ import annotations

import time

import pytest
import torch

from bench import expert_arms, experts
from bench.experts import ALL, GROUPED, Problem, chosen, formula, limits, step, terms
from bench.gpu import part_grouped
from bench.gpu.common import Run
from bench.machine import read_rows
from bench.oracle import distance
from fastpeft.ops import grouped


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(part_grouped, "IMPL", "torch")
    return Run("cpu", True, tmp_path, time.monotonic() + 100)


def rolled(monkeypatch):
    real = grouped._weight
    monkeypatch.setattr(grouped, "_weight", lambda w, pairs: real(w, pairs.roll(1)) if w else None)


def other_every_time(monkeypatch):
    real, calls = grouped.Family.add, []

    def add(self, y, x, tensors, scale):
        calls.append(1)
        real(self, y, x, tensors, scale * (1 + 1e-6 * len(calls)))

    monkeypatch.setattr(grouped.Family, "add", add)


@pytest.mark.parametrize(("plant", "words"), [(rolled, "too far"), (other_every_time, "other bits")])
def test_a_check_of_operators_can_fail(run, plant, words, monkeypatch):
    assert part_grouped.checked(run, part_grouped.SMALL[0], torch.float32)["right"]
    plant(monkeypatch)
    found = part_grouped.checked(run, part_grouped.SMALL[0], torch.float32)
    assert not found["right"] and words in found["wrong"]


def test_a_check_of_layers_can_fail(run, monkeypatch):
    assert part_grouped.ways(run, 2, "torch.compile")["right"]
    rolled(monkeypatch)
    assert not part_grouped.ways(run, 2, "torch.compile")["right"]


@pytest.mark.parametrize("arm", [ALL, GROUPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_arms_of_the_switch_are_right(arm, dtype):
    problem = Problem(65, (40, 24), dtype)
    own = problem.experts(128)
    index = chosen(problem, own, 2)
    got = dict(zip(part_grouped.NAMES, step(problem, own, terms(own, 2)[arm]), strict=True))
    exact, plain = (formula(problem, own, index, d) for d in (torch.float64, dtype))
    assert distance(got, exact, plain)[1] == []
    exact, plain = (formula(problem, own, index.roll(1, 0), d) for d in (torch.float64, dtype))
    assert set(distance(got, exact, plain)[1]) >= {"y", "dx", "dA", "dB"}, "tokens of other experts"


def test_a_limit_holds_at_every_shape_from_there_on():
    def row(total, tokens, high, dtype="float32"):
        return {"bench": "experts switch", "dtype": dtype, "active": 16, "total": total, "shape": [tokens, 1, 1], "over_all": [0, 0, high]}

    rows = [row(128, 8, 0.9), row(256, 8, 1.1), row(512, 8, 0.9), row(512, 9, 0.8), row(1024, 8, 0.7), row(1024, 8, 1.2, "bfloat16")]
    assert limits(rows) == {("float32", 16): 512, ("bfloat16", 16): None}
    assert limits([*rows, row(512, 10, 1.0)])["float32", 16] == 1024


def test_the_bench_runs_and_times_no_wrong_arm(monkeypatch, tmp_path, capsys):
    """At small sizes; a wrong grouped product is reported and has no time."""
    pytest.importorskip("peft")
    monkeypatch.setattr(experts, "SHAPES", [(32, 48)])
    monkeypatch.setattr(experts, "COST", (32, 24, 40))
    monkeypatch.setattr(experts, "FILE", tmp_path / "experts.jsonl")
    own = ["--rounds", "1", "--tokens", "32", "--total", "64", "--k", "2", "--dtype", "fp32", "--save"]
    experts.main(own)
    rows = read_rows(tmp_path / "experts.jsonl")
    assert [r["arm"] for r in rows[:2]] == [ALL, GROUPED] and len(rows) == 2 + 10 and not any(r["wrong"] for r in rows)
    assert all("ratio" in r for r in rows) and "over_all" in rows[1] and all("over_lora" in r for r in rows[2:])
    assert len([r for r in rows[2:] if r["library"] == "PEFT"]) == 4
    rolled(monkeypatch)
    experts.main([*own[:-1], "--only", "switch"])
    assert "WRONG: y" in capsys.readouterr().out


def test_the_formulas_of_the_arms_differ():
    """An arm held against another one's formula is wrong."""
    pytest.importorskip("peft")
    shape = expert_arms.Shape(32, 24, 40)
    x, dy, linear = expert_arms.inputs(shape)
    found = {a.name: a for a in expert_arms.arms(shape, x, linear)}
    assert experts.check(found["fastpeft moa"], x, dy, linear)[1] == []
    found["fastpeft moa"].formula = lambda x, q, base: base + expert_arms.mixed(x, q["A"], q["B"], torch.ones(*x.shape[:-1], 8))
    assert "y" in experts.check(found["fastpeft moa"], x, dy, linear)[1]
