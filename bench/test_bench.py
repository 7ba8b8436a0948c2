"""Microbenchmarks and the benches' own tests: pytest bench/."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import harness, host, table
from bench.arms import AGAIN, FROZEN, arms, lowrank_variant, peft_name
from bench.harness import compare, inputs
from bench.lowrank import variants
from bench.machine import ROOT, emit
from bench.oracle import check
from fastpeft.job.layerbench import Shape

METHODS = ["lora", "dora", "melora"]
HYDRA = lowrank_variant("hydralora", "hydralora", 3, 0.0, heads=4)


@pytest.mark.parametrize("library", ["frozen", "PEFT", "fastpeft"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layer(benchmark, method, library):
    shape = Shape(256, 256, 256)
    found = arms(shape, [lowrank_variant(method, method, 8, 0.0)])
    names = {"frozen": FROZEN, "PEFT": peft_name(method, "float32"), "fastpeft": f"fastpeft {method}"}
    benchmark(harness.step(found[names[library]], *inputs(shape)))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_arm_is_right(dtype, dropout):
    shape = Shape(33, 64, 72, dtype=dtype)
    hydra = lowrank_variant("hydralora", "hydralora", 3, dropout, heads=4)
    found = arms(shape, [*variants(METHODS, dropout), hydra])
    peft = 2 if dtype == torch.float32 else 4
    assert len(found) == 2 + peft + 5
    for arm in found.values():
        assert check(arm, *inputs(shape))[1] == [], arm.name
        if arm.library == "PEFT":
            assert arm.name.split(", ")[1] == f"{arm.adapter_dtype[0]} adapters"


@pytest.mark.parametrize(
    "variant", [*variants(METHODS, 0.0), *variants(METHODS, 0.1), HYDRA], ids=lambda v: v.name
)
def test_a_wrong_factor_is_noticed(variant):
    shape = Shape(33, 64, 72)
    for name, arm in arms(shape, [variant]).items():
        if name not in (FROZEN, AGAIN):
            with torch.no_grad():
                arm.parameters["B"].mul_(1.01)
            assert "y" in check(arm, *inputs(shape))[1]


def test_another_mask_is_noticed(monkeypatch):
    arm = arms(Shape(33, 64, 72), [lowrank_variant("lora", "lora", 4, 0.1)])["fastpeft lora"]
    monkeypatch.setattr("bench.oracle.draw_seed", lambda device: torch.tensor(1))
    assert check(arm, *inputs(Shape(33, 64, 72)))[1] == ["y", "dx", "dA", "dB"]


def test_a_wrong_arm_is_not_timed(monkeypatch):
    wrong = peft_name("lora", "float32")

    def broken(*args):
        found = arms(*args)
        with torch.no_grad():
            found[wrong].parameters["B"].mul_(2)
        return found

    monkeypatch.setattr(harness.layers, "arms", broken)
    rows = {r["arm"]: r for r in compare("t", Shape(32, 64, 64), variants(METHODS, 0.0), rounds=3)}
    assert rows[wrong]["wrong"] and "ratio" not in rows[wrong]
    assert not rows["fastpeft lora"]["wrong"] and "against" not in rows["fastpeft lora"]
    assert set(rows["fastpeft melora 4x16"]["against"]) == {"fastpeft lora"}
    assert "not timed" in table.lowrank_table(list(rows.values()))


def _row(arm, library, method, ms, dtype="bfloat16", **more):
    base = {
        "shape": [1, 2, 3],
        "dtype": dtype,
        "dropout": 0.0,
        "rounds": 3,
        "error": 0.0,
        "wrong": [],
        "iqr": [1, 1],
    }
    times = {"ms": ms, "ratio": ms / 10, "overhead_ms": ms - 10, "overhead_iqr_ms": [ms - 10, ms - 10]}
    return base | times | {"arm": arm, "library": library, "method": method} | more


def test_claims_and_slower_arms():
    low, wide = peft_name("lora", "bfloat16"), peft_name("lora", "float32")
    against = {
        low: {"overhead": 3.0, "time": [1.0, 1.1, 1.2]},
        wide: {"overhead": 0.5, "time": [0.8, 0.9, 1.0]},
    }
    melora = {"fastpeft lora": {"overhead": 1.25, "time": [1, 1, 1]}}
    runs = {
        (1, 2, 3, "bfloat16"): {
            "fastpeft lora": _row("fastpeft lora", "fastpeft", "lora", 13, against=against),
            "fastpeft melora 4x4": _row("fastpeft melora 4x4", "fastpeft", "melora", 14, against=melora),
        }
    }
    assert table.claims(runs) == {
        "fastpeft lora / PEFT lora, adapters in the layer's dtype": [3.0],
        "fastpeft lora / PEFT lora, fp32 adapters": [0.5],
        "fastpeft melora 4x4 / fastpeft lora": [1.25],
    }
    assert table.slower(runs) == [f"fastpeft lora: 1.10 times {low}, at [1, 2 -> 3] bfloat16"]


def test_rows_are_kept_with_where_they_were_measured(tmp_path):
    path = tmp_path / "results/x.jsonl"
    for n in range(2):
        emit({"n": n}, path)
    rows = [json.loads(s) for s in path.read_text().splitlines()]
    assert [r["n"] for r in rows] == [0, 1]
    assert {"cpu_flags", "threads", "versions", "commit", "changed"} <= rows[0].keys()
    assert set(rows[0]["cpu_flags"]) == {"amx", "avx512_bf16", "avx512f", "avx2"}


def test_host():
    rows = host.rows(Shape(*host.SIZE), rounds=2, calls=2)
    assert len(rows) == 7 * len(host.MEASURES) and not any(r["wrong"] for r in rows)
    dora = next(r for r in rows if r["arm"] == "fastpeft dora")
    assert set(dora["against"]) == {host.PEFT_LORA, host.PEFT_DORA, "fastpeft lora"}


def test_an_operator_check_can_fail():
    from bench.gpu import operators
    from bench.gpu.launches import launches

    for p in (0.0, 0.3):
        m = operators.make(operators.Case(33, 40, 35, 1, 5, torch.float32, torch.float32, p), "cpu")
        for name, output in {"down": "u", "da": "dA", "dx": "dx", "up": "z", "row_sq_norm": "norm"}.items():
            if name in launches(m):
                got = launches(m)[name].torch()
                assert operators.wrong(name, m, {output: got})[1] == []
                for bad in (got * 1.001, got * float("nan")):
                    assert operators.wrong(name, m, {output: bad})[1], name


def test_gpu_rehearsal_goes_on_where_it_stopped(tmp_path):
    def run(*more):
        command = [
            sys.executable,
            "-m",
            "bench.gpu_run",
            "--device",
            "cpu",
            "--dry",
            "--stages",
            "build,ceilings",
            *more,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "stopped: out of time" in run("--minutes", "0")
    assert not list(tmp_path.glob("*.json"))
    assert "stopped" not in run()
    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert set(files) == {"build-cpu-dry.json", "ceilings-cpu-dry.json"}
    run()
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == files


def test_checks_come_first_and_at_once(tmp_path):
    """By two processes; the stage that times takes them over, and makes none again."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu_run", "--device", "cpu", "--dry", "--stages", "products"]
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run([*command, "--jobs", "2", "--checks"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (part,) = tmp_path.glob("*.part")
    found = [json.loads(line) for line in part.read_text().splitlines()]
    assert found and all("check" in f["head"] and f["rows"][0]["right"] for f in found)
    marked = [f | {"rows": [r | {"mark": n} for r in f["rows"]]} for n, f in enumerate(found)]
    part.write_text("".join(json.dumps(f) + "\n" for f in marked))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "products-cpu-dry.json").read_text())["rows"]
    assert [r["mark"] for r in rows if "check" in r] == list(range(len(found)))
    assert {r["direction"] for r in rows if "variant" in r} == {"y", "dx"}


def test_plots_of_what_is_kept(tmp_path):
    from bench import plot

    for name in ("lowrank-cpu", "structured-cpu"):
        rows = plot.read(ROOT / f"bench/results/{name}.jsonl")
        found = plot.panels(rows)
        titles = {"lowrank-cpu": 2, "structured-cpu": 4}
        assert len(found) == titles[name]
        plot.draw(found, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    # the last of equal rows counts
    row = {"bench": "x", "arm": "PEFT lora", "shape": [1, 2, 3], "dtype": "float32", "device": "cpu", "dropout": 0.0, "ratio": 2.0, "iqr": [1.0, 3.0]}
    (series,) = plot.panels([row, row | {"ratio": 2.5}]).values()
    assert series == {"PEFT lora": {"1x2x3\nfloat32": (1.0, 2.5, 3.0)}}
