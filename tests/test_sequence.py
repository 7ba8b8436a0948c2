"""`fastpeft sequence`: the accuracy matrix, the folder and what loads of it, the control arms, one clear line per user error."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from job_models import WORDS, tiny_model, write_rows

from fastpeft.cli import main
from fastpeft.folder import CheckpointError
from fastpeft.job import heads, loop
from fastpeft.job import sequence as job
from fastpeft.job.errors import JobError
from fastpeft.job.sequence import HEADS, INCREMENTAL, O_LORA, ONE, Result
from fastpeft.job.tasks import BUILTIN
from fastpeft.method.o_lora import OLoRA

CLASSES = (2, 3, 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, list[str]]:
    """Folder of a tiny BERT, and a CSV file per task, the second with three classes."""
    folder = tmp_path_factory.mktemp("sequence")
    model, _ = tiny_model(folder, "bert")
    files = []
    for task, classes in enumerate(CLASSES):
        rows = [(f"{WORDS[4 * task + k % classes]} {WORDS[12 + k % 7]}", f"c{k % classes}") for k in range(42)]
        files.append(str(write_rows(folder / f"t{task}.csv", rows)))
    return str(model), files


def base(tiny, out: Path) -> list[str]:
    more = ["--rank", "2", "--threads", "1", "--max-length", "8", "--alpha", "4", "--lr", "0.01", "--epochs", "3", "--batch-size", "8"]
    return ["sequence", "--model", tiny[0], "--data", *tiny[1], "--output", str(out), *more]


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory) -> tuple[Path, dict]:
    """Folder and report of a run of all arms over two seeds."""
    out = tmp_path_factory.mktemp("compared")
    assert main([*base(tiny, out), "--compare", "--seeds", "0", "1", "--procedure-option", "lambda1=0.3"]) == 0
    return out, json.loads((out / "report.json").read_text())


def arm(report: dict, name: str) -> dict:
    return next(a for a in report["arms"] if a["name"] == name)


def test_the_matrix_and_the_figures_of_it(compared):
    _, report = compared
    assert [a["name"] for a in report["arms"]] == [O_LORA, INCREMENTAL, ONE, HEADS]
    assert [t["name"] for t in report["tasks"]] == ["t0", "t1", "t2"] and [len(t["classes"]) for t in report["tasks"]] == list(CLASSES)
    for a in report["arms"]:
        for rows, average, forgetting in zip(a["accuracy"], a["average_accuracy"], a["forgetting"], strict=True):
            assert [len(r) for r in rows] == [1, 2, 3] and all(0 <= x <= 1 for r in rows for x in r)
            assert average == pytest.approx([sum(r) / len(r) for r in rows])
            lost = max(rows[0][0], rows[1][0]) - rows[2][0], rows[1][1] - rows[2][1]
            assert forgetting == pytest.approx(sum(lost) / 2)
    # the tasks are read off one word each; chance is 4/9
    just = [row[-1] for a in report["arms"] if a["name"] != HEADS for rows in a["accuracy"] for row in rows]
    assert sum(just) / len(just) > 0.6


def test_forgetting_is_the_best_accuracy_less_the_last():
    result = Result(ONE, accuracy=[[0.9], [0.5, 0.8], [0.7, 0.9, 0.6]])
    assert result.forgetting == pytest.approx(((0.9 - 0.7) + (0.8 - 0.9)) / 2)
    assert result.average() == pytest.approx(2.2 / 3) and result.average(1) == pytest.approx(0.65)


def test_the_control_arms(compared):
    """All learn the first task alike; the frozen model forgets nothing; the penalty alone parts O-LoRA from incremental LoRA."""
    _, report = compared
    ours, free, one, frozen = (arm(report, n) for n in (O_LORA, INCREMENTAL, ONE, HEADS))
    for seed in range(2):
        assert ours["losses"][seed][0] == free["losses"][seed][0] == pytest.approx(one["losses"][seed][0], rel=1e-4)
        # with its first factors at zero, what the penalty adds to the loss is all that differs at a task's first step
        gap = ours["losses"][seed][1][0] - free["losses"][seed][1][0]
        assert gap > 0.1 and one["losses"][seed][1][0] == pytest.approx(free["losses"][seed][1][0], rel=1e-4)
        assert free["losses"][seed][1][1:] != pytest.approx(one["losses"][seed][1][1:], rel=1e-4)
        rows = frozen["accuracy"][seed]
        assert all(row[k] == rows[k][k] for k in range(3) for row in rows[k:])
    # 13 linears; A and B of rank 2: twelve in the two blocks and the pooler
    head = 16 * 2 + 2
    assert ours["trainable_parameters"] == one["trainable_parameters"] and frozen["trainable_parameters"] == [head, 16 * 3 + 3, head]
    assert ours["trainable_parameters"][0] == head + 2 * (2 * (4 * 32 + 2 * 48) + 32)


def test_the_folder_and_the_adapter_that_loads_again(compared, tiny):
    out, report = compared
    wanted = {"adapter", "after-task-1", "after-task-2", "report.json", "report.md", "accuracy.png"}
    assert {p.name for p in out.iterdir()} == wanted and [Path(f).name for f in report["adapters"]] == ["after-task-1", "after-task-2", "adapter"]
    assert all(r["difference"] <= 1e-5 * max(1, r["scale"]) and r["scale"] > 0.1 for r in report["reload"]) and len(report["reload"]) == 3
    model, tasks = heads.load(out / "adapter")
    assert [len(t.classes) for t in tasks] == list(CLASSES) and not model.training
    assert {m.A_prev.shape[0] for m in model.modules() if isinstance(m, OLoRA)} == {2 * 2}
    for k, count in enumerate(CLASSES):
        heads.choose(model, tasks, k)
        assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, count) and model.config.num_labels == count
    first, _ = heads.load(out / "after-task-1")
    assert json.loads((out / "after-task-1" / heads.FILE).read_text())["learned"] == 1
    # the first task's head and factors are what they were after it
    assert torch.equal(first.classifier.heads[0].weight, model.classifier.heads[0].weight)
    pairs = [(a, b) for a, b in zip(first.modules(), model.modules(), strict=True) if isinstance(a, OLoRA)]
    assert pairs and all(torch.equal(a.A, b.A_prev[:2]) and torch.equal(a.B, b.B_prev[:, :2]) for a, b in pairs)
    assert not torch.equal(first.classifier.heads[1].weight, model.classifier.heads[1].weight)
    text = (out / "report.md").read_text()
    last = [statistics.fmean(cell) for cell in zip(*(rows[2] for rows in arm(report, O_LORA)["accuracy"]), strict=True)]
    assert "## one LoRA: accuracy on each task" in text
    own = text.split("## O-LoRA: accuracy on each task")[1].split("\n## ")[0]
    assert f"| after task 3 | {' | '.join(f'{a:.3f}' for a in last)} |" in own


def test_an_arm_alone_is_that_of_the_comparison(compared, tiny, tmp_path):
    _, report = compared
    for name in (O_LORA, ONE):
        more = ["--procedure-option", "lambda1=0.3"] if name == O_LORA else []
        assert main([*base(tiny, tmp_path / name), "--method", name, "--seed", "1", *more]) == 0
        alone = json.loads((tmp_path / name / "report.json").read_text())
        assert [a["name"] for a in alone["arms"]] == [name]
        assert alone["arms"][0]["losses"][0] == arm(report, name)["losses"][1]
        assert max(r["difference"] for r in alone["reload"]) <= 1e-5


def test_the_built_in_tasks(tiny, tmp_path):
    assert main(["sequence", "--model", tiny[0], "--output", str(tmp_path), "--quick", "--rank", "2", "--threads", "1"]) == 0
    tasks = json.loads((tmp_path / "report.json").read_text())["tasks"]
    assert [tuple(t["classes"]) for t in tasks] == list(BUILTIN) and all(t["train"] > 4 * t["evaluation"] / 2 > 8 for t in tasks)


# --- errors


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("training began")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "T0"], "one task is no sequence; give two sources or more"),
        (["--data", "T0", "T1", "T0"], "t0.csv was given twice"),
        (["--data", "T0", "missing.csv"], "--data missing.csv: no such file"),
        (["--data", "T0", "ODD"], "odd.csv: no column 'label'; its columns are text, kind"),
        (["--data", "T0", "ALIKE"], "every training row has the label 'c0'"),
        (["--eval-data", "T0"], "1 --eval-data for 3 --data"),
        (["--method", "dora"], "--method dora: it must be o_lora or lora"),
        (["--method", "nope"], "--method nope: it must be o_lora or lora"),
        (["--option", "previous=1"], "the sequence counts the tasks itself"),
        (["--option", "rslora=True"], "option 'rslora' does not exist for o_lora"),
        (["--rank", "17"], "rank=17"),
        (["--procedure-option", "lambda1=-1"], "lambda1=-1"),
        (["--method", "lora", "--procedure-option", "lambda1=1"], "no procedure has it"),
        (["--epochs", "0"], "error: sequence: --epochs 0"),
        (["--max-length", "65"], "has 64 positions"),
    ],
)
def test_errors_come_before_training(capsys, monkeypatch, tmp_path, tiny, arguments, message):
    monkeypatch.setattr(job, "train", refuse)
    (tmp_path / "odd.csv").write_text("text,kind\nwa,1\nwb,2\n")
    (tmp_path / "alike.csv").write_text("text,label\n" + "".join(f"w{c} wa,c0\n" for c in "abcdefgh"))
    names = {"T0": tiny[1][0], "T1": tiny[1][1], "ODD": str(tmp_path / "odd.csv"), "ALIKE": str(tmp_path / "alike.csv")}
    assert main([*base(tiny, tmp_path / "out"), *(names.get(a, a) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("error: ") == 1 and "finetune:" not in err
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(("at_step", "saved"), [(1, "nothing was saved"), (17, "the adapter of seed 0 after 1 of 3 tasks is in")])
def test_an_interrupt_says_what_was_saved(capsys, monkeypatch, tmp_path, tiny, at_step, saved):
    real, calls = loop.train_step, iter(range(100))

    def step(*args):
        if next(calls) == at_step:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "train_step", step)
    assert main(base(tiny, tmp_path)) == 130
    assert f"sequence: interrupted; {saved}" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == ({"after-task-1"} if at_step == 17 else set())
    if at_step == 17:
        heads.load(tmp_path / "after-task-1")


def test_a_folder_that_is_none(compared, tmp_path, tiny):
    out, _ = compared
    with pytest.raises(JobError, match=r"tasks.json: cannot be read"):
        heads.load(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", heads.FILE):
        (tmp_path / name).write_bytes((out / "adapter" / name).read_bytes())
    notes = json.loads((tmp_path / heads.FILE).read_text())
    notes["tasks"].pop()
    (tmp_path / heads.FILE).write_text(json.dumps(notes))
    with pytest.raises(CheckpointError, match="unexpected"):
        heads.load(tmp_path)
    (tmp_path / heads.FILE).write_text('{"tasks": 3}')
    with pytest.raises(JobError, match="not as `fastpeft sequence` writes it"):
        heads.load(tmp_path)
