"""`fastpeft compare`: pilots choose the rate, finished runs are kept, every file is whole, results are in PEFT's schema."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_models import WORDS, tiny_model, write_rows

from fastpeft.cli import main
from fastpeft.job import compare as job
from fastpeft.job import step_times
from fastpeft.job.compare_plots import front, spread_out
from fastpeft.job.compare_store import Store
from fastpeft.job.recipes import entries

PILOT = 100
# the fields of method_comparison/MetaMathQA/results/*.json in huggingface/peft, September 2026
SCHEMA = {
    "run_info": {"created_at", "total_time", "experiment_name", "peft_branch", "peft_worktree_is_dirty", "train_config", "peft_config", "error_msg"},
    "train_info": {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time", "file_size",
        "num_trainable_params", "num_total_params", "status", "metrics",
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}  # fmt: skip
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile", "use_gc", "query_template", "seed",
    "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp", "autocast_adapter_dtype", "generation_kwargs",
    "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """What every command of this module says: a tiny BERT, 40 rows of two classes."""
    folder = tmp_path_factory.mktemp("compare")
    model, _ = tiny_model(folder, "bert")
    rows = [(f"{WORDS[k % 2]} {WORDS[2 + k % 7]} {WORDS[9 + k % 11]}", str(k % 2)) for k in range(40)]
    data = write_rows(folder / "rows.csv", rows)
    return ["compare", "--model", str(model), "--data", str(data), "--quick", "--threads", "1", "--batch-size", "8"]


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a finished comparison of two recipes, and its command."""
    out = tmp_path_factory.mktemp("out")
    command = [*tiny, "--recipes", "lora,loha", "--out", str(out), "--seeds", "0", "1", "--grid", "1e-4", "3e-2"]
    assert main(command) == 0
    return out, command


def test_the_best_rate_of_the_pilot_is_reported_and_its_seed_is_not(done):
    out, _ = done
    for title in ("frozen", "PEFT lora", "lora", "loha"):
        runs = Store(out).record(title)["runs"]
        pilots = {r["rate"]: r["scores"][-1][0] for r in runs if r["seed"] == PILOT}
        assert sorted(pilots) == [1e-4, 3e-2]
        best = min(pilots, key=pilots.__getitem__)
        assert [(r["seed"], r["rate"]) for r in runs if r["seed"] != PILOT] == [(0, best), (1, best)]
    names = sorted(p.name for p in (out / "results").iterdir())
    assert names == sorted(f"{t}--seed-{k}.json" for t in ("frozen", "PEFT-lora", "lora", "loha") for k in (0, 1))


def test_the_choice_is_the_lowest_loss_of_a_pilot_that_came_to_its_end():
    def run(seed, rate, loss, **more):
        return {"seed": seed, "rate": rate, "scores": [[9.0, 0.1], [loss, 0.9]]} | more

    runs = [run(100, 1e-3, 0.5), run(100, 2e-3, 0.4), run(0, 4e-3, 0.1), {"seed": 100, "rate": 8e-3, "error": "nan", "final": True}]
    assert job.chosen_rate({"runs": runs}, 100) == 2e-3
    assert job.chosen_rate({"runs": runs}, 7) is None


def test_results_have_the_fields_of_pefts_schema(done):
    out, _ = done
    for path in (out / "results").iterdir():
        found = json.loads(path.read_text())
        assert {k: set(v) for k, v in found.items()} == SCHEMA
        assert set(found["run_info"]["train_config"]) == TRAIN_CONFIG
        *epochs, end = found["train_info"]["metrics"]
        assert len(epochs) == 1 and epochs[0]["valid accuracy"] == end["test accuracy"] and end["step"] == 4
        assert {"train loss", "train samples", "train total tokens"} < set(end)
        assert found["train_info"]["train_time"] is None  # never a time of a machine that does other work
        assert set(found["meta_info"]["package_info"]) >= {"torch-version", "peft-version"} and "gpu" not in found["meta_info"]["system_info"]
    lora = json.loads((out / "results/lora--seed-1.json").read_text())
    chosen = job.chosen_rate(Store(out).record("lora"), PILOT)
    assert lora["run_info"]["peft_config"]["peft_type"] == "LORA" and lora["run_info"]["peft_config"]["r"] == 8
    assert lora["run_info"]["train_config"]["seed"] == 1 and lora["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == chosen
    peft = json.loads((out / "results/PEFT-lora--seed-1.json").read_text())
    assert lora["train_info"]["num_trainable_params"] == peft["train_info"]["num_trainable_params"] == 3840 + 34  # and the head
    assert json.loads((out / "results/frozen--seed-0.json").read_text())["run_info"]["peft_config"] is None


def test_the_report_shows_what_it_links(done):
    out, _ = done
    text = (out / "report.md").read_text()
    rows = [s.split("|") for s in text.splitlines() if s.startswith("| ")][2:]
    accuracies = [float(r[2].split("±")[0]) for r in rows]
    assert len(rows) == 4 and accuracies == sorted(accuracies, reverse=True)
    assert all(r[9].strip() == r[10].strip() == "" for r in rows)  # times that nothing measured
    for name in ("pareto.png", "curves.png", "rates.png"):
        assert f"({name})" in text and (out / name).read_bytes().startswith(b"\x89PNG")
    assert "pareto_time" not in text and not (out / "pareto_time.png").exists()
    assert "reported: seeds 0, 1" in text and f"chosen by evaluation loss on seed {PILOT}" in text


def test_a_finished_run_is_not_made_again(done, monkeypatch, capsys):
    out, command = done
    before = {p: p.read_bytes() for p in (out / "runs").iterdir()}
    monkeypatch.setattr(job, "_train", lambda *a, **k: pytest.fail("a run that the folder holds was made again"))
    monkeypatch.setattr(job, "Bench", lambda *a: pytest.fail("a model was loaded for nothing"))
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {p: p.read_bytes() for p in (out / "runs").iterdir()} == before
    assert {r["title"]: r["seeds"] for r in rows} == {t: [0, 1] for t in ("lora", "loha", "frozen", "PEFT lora")}
    lora = next(r for r in rows if r["title"] == "lora")
    assert lora["own"] == 8 * (2 * (4 * 32 + 2 * 48) + 32)  # rank 8 times in + out of six layers in two blocks, and the pooler
    assert lora["saved_per_token"] > next(r for r in rows if r["title"] == "frozen")["saved_per_token"] > 0


def test_other_settings_are_refused(done, capsys):
    _, command = done
    assert main([*command, "--max-length", "20"]) == 2
    assert "max_length was 48 and is 20 now" in capsys.readouterr().err
    for more, message in ((["--seeds", "100"], "is one of --seeds"), (["--grid", "0"], "--grid"), (["--recipes", "lorra"], "no such recipe")):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_times_fill_the_empty_columns_and_a_busy_machine_does_not(done, monkeypatch, capsys):
    out, command = done

    def measured(bench, entry, rounds):
        return {"ratio": 2.0, "to_peft": 0.5, "peft_lora": 4.0, "again": 1.3 if entry.title == "loha" else 1.01, "rounds": rounds}

    monkeypatch.setattr(step_times, "step_times", measured)
    assert main([*command, "--timings"]) == 0
    assert "too busy" in capsys.readouterr().err
    text = (out / "report.md").read_text()
    assert "(pareto_time.png)" in text and (out / "pareto_time.png").read_bytes().startswith(b"\x89PNG")
    cells = {s.split("|")[1].strip(): s.split("|")[9:11] for s in text.splitlines() if s.startswith("| ")}
    assert [c.strip() for c in cells["lora"]] == ["2.00", "0.50"] and [c.strip() for c in cells["loha"]] == ["", ""]


def test_what_goes_wrong_is_a_row(tiny, tmp_path, monkeypatch, capsys):
    """A run that diverges is its result; a defect is said, keeps no other recipe, and is tried again."""
    inner = job._train

    def faulty(bench, entry, rate, seed, facts, *, keep):
        if entry.title == "loha":
            raise RuntimeError("planted")
        if rate == 8e-3:
            raise job.JobError("compare: the loss is nan", code=1)
        return inner(bench, entry, rate, seed, facts, keep=keep)

    monkeypatch.setattr(job, "_train", faulty)
    command = [*tiny, "--recipes", "loha,phatgoose,moa", "--out", str(tmp_path)]
    assert main(command) == 1
    text = (tmp_path / "report.md").read_text()
    assert "**loha**: failed: rate 0.002, seed 100: RuntimeError: planted" in text
    assert "**phatgoose**" in text and "left out: needs trained experts" in text
    assert "**moa**" in text and "no column 'domain'" in text
    assert Store(tmp_path).record("frozen")["runs"][-1]["rate"] == 2e-3
    assert "loha went wrong" in capsys.readouterr().err
    calls = []
    monkeypatch.setattr(job, "_train", lambda bench, entry, rate, *a, **k: calls.append((entry.title, rate)) or inner(bench, entry, rate, *a, **k))
    assert main(command) == 0
    assert {t for t, _ in calls} == {"loha"} and "planted" not in (tmp_path / "report.md").read_text()


@pytest.mark.accept
def test_a_kill_leaves_whole_files_and_the_same_command_continues(tiny, tmp_path):
    command = [*tiny, "--recipes", "lora", "--out", str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-m", "fastpeft", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held: dict[str, list[dict]] = {}
    try:
        for _ in range(1200):
            time.sleep(0.05)
            held = {p.name: json.loads(p.read_text())["runs"] for p in (tmp_path / "runs").glob("*.json")}
            if "frozen.json" in held or child.poll() is not None:
                break
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL and held["frozen.json"]
    held = {p.name: json.loads(p.read_text())["runs"] for p in (tmp_path / "runs").glob("*.json")}
    assert main(command) == 0
    for name, runs in held.items():
        assert json.loads((tmp_path / "runs" / name).read_text())["runs"][: len(runs)] == runs
    assert len(Store(tmp_path).record("lora")["runs"]) == 3 and (tmp_path / "report.md").exists()


def test_front_and_label_places():
    assert front([(3, 0.9), (1, 0.5), (2, 0.4), (3, 0.8), (1, 0.3), (4, 0.9)]) == [1, 0]
    places = spread_out([0.5, 0.5, 0.5, 0.9] + 46 * [0.99], 0.0, 1.0)
    assert all(b - a >= 0.02 - 1e-12 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
    assert max(places) <= 1.0 and max(places[:3]) < places[3] < min(places[4:])


def test_every_recipe_has_an_entry():
    import fastpeft

    assert {m.name for m in fastpeft.methods()} <= set(entries()) and entries()["rosa"].options == {"density": 0.01}
