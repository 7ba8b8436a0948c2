"""`fastpeft laplace`: report folders and lone adapters, what it writes against the library called by hand and against PEFT, and errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from job_models import WORDS, tiny_model, write_rows
from test_cli import error_of

import fastpeft
from fastpeft import laplace
from fastpeft.cli import main

CLASSES = ("no", "perhaps", "yes")
QUICK = ["--threads", "1", "--samples", "500"]


def rows(n, seed):
    """Texts of two to six words; the label is that of the first, but for a fifth of them."""
    draw = random.Random(seed)
    texts = [[draw.randrange(len(WORDS)) for _ in range(draw.randrange(2, 7))] for _ in range(n)]
    return [(" ".join(WORDS[w] for w in t), CLASSES[(t[0] + (draw.random() < 0.2)) % 3]) for t in texts]


TRAIN, HELD = rows(60, 0), rows(40, 1)


class Job:
    """A tiny BERT and rows for it. finetuned: report folders of `fastpeft finetune`, by name."""

    def __init__(self, folder: Path):
        from fastpeft.job import memory

        self.folder = folder
        self.model, self.tokenizer = tiny_model(folder, "bert")
        self.train, self.held = write_rows(folder / "train.csv", TRAIN), write_rows(folder / "held.csv", HELD)
        self.data = ["--data", str(self.train), "--eval-data", str(self.held)]
        self.finetuned = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "measure", lambda *a, **k: {"peak": 1, "loaded": 1, "cuda_peak": 0})
            for name, more in {"run": [], "stopping": ["--patience", "9"], "dora": ["--method", "dora"]}.items():
                self.finetuned[name] = folder / name
                own = ["--method", "lora", "--rank", "2", "--lr", "0.02", "--epochs", "4", "--batch-size", "8", "--seed", "3"]
                own += ["--no-compare", "--threads", "1", "--output", str(folder / name)]
                assert main(["finetune", "--model", str(self.model), *self.data, *own, *more]) == 0

    def fresh(self):
        import transformers

        torch.manual_seed(11)
        names = dict(id2label=dict(enumerate(CLASSES)), label2id={c: k for k, c in enumerate(CLASSES)})
        return transformers.AutoModelForSequenceClassification.from_pretrained(str(self.model), **names)

    def batches(self, rows, size=8, classes=CLASSES):
        for k in range(0, len(rows), size):
            texts, labels = zip(*rows[k : k + size], strict=True)
            batch = dict(self.tokenizer(list(texts), padding=True, return_tensors="pt"))
            batch.pop("token_type_ids", None)
            yield batch | {"labels": torch.tensor([classes.index(c) for c in labels])}

    def lone(self, adapter, *more):
        """The command for an adapter without a report."""
        return ["laplace", str(adapter), "--model", str(self.model), *self.data, *QUICK, *more]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("laplace"))


def asked(capsys, command):
    """What `--json` prints."""
    capsys.readouterr()
    assert main([*command, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def by_hand(job, adapter, **options):
    """(model, posterior) of fastpeft.laplace."""
    model = job.fresh()
    fastpeft.load_adapter(model, adapter)
    return model, laplace.fit(model, list(job.batches(TRAIN)), **options)


def test_a_report_folder_equals_the_library_called_by_hand(job, capsys):
    folder = job.finetuned["run"]
    assert main(["laplace", str(folder), *QUICK, "--bins", "7", "--seed", "5"]) == 0
    said = capsys.readouterr().out
    got = json.loads((folder / "laplace.json").read_text())
    model, posterior = by_hand(job, folder / "adapter")
    evidence = posterior.tune()
    assert got["precision"] == pytest.approx(posterior.precision.item(), rel=1e-6) and abs(got["precision"] - 1) > 0.05
    assert got["log_evidence"] == pytest.approx(evidence, rel=1e-6)
    assert got["layers"] == list(posterior.layers) and len(got["layers"]) == 13 and got["notes"] == []
    assert got["examples"] == {"fitted": 60, "tuned_on": 0, "judged": 40} and got["classes"] == list(CLASSES)
    held = list(job.batches(HELD))
    for kind in ("map", "probit", "mc"):
        more = dict(samples=500, generator=torch.Generator().manual_seed(5)) if kind == "mc" else {}
        p, y = posterior.evaluate(held, kind, **more)
        want = laplace.scores(p, y, 7)
        assert want["ece"] != laplace.scores(p, y)["ece"]
        for name, value in want.items():
            assert got["kinds"][kind][name] == pytest.approx(value, abs=1e-5), (kind, name)
            assert f"{got['kinds'][kind][name]:.4f}" in said
        mine, its = laplace.reliability(p, y, 7), got["reliability"][kind]
        assert its["share"] == pytest.approx(mine.share.tolist()) and len(its["share"]) == 7
        assert [v is None for v in its["accuracy"]] == mine.accuracy.isnan().tolist()
    assert got["kinds"]["mc"] != got["kinds"]["map"]
    report = json.loads((folder / "report.json").read_text())
    assert got["kinds"]["map"]["accuracy"] == pytest.approx(report["arms"][0]["accuracy_after"])
    assert (folder / "reliability.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p.name for p in folder.rglob(".*")]

    again = laplace.load(model, folder / "adapter")
    assert again.precision.item() == got["precision"]
    for a, b in zip(again.logits(held[0]), posterior.logits(held[0]), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_a_folder_of_stock_peft(job, capsys, tmp_path):
    """Judged as PEFT's own model answers, and the same as the same adapter saved by us; --output leaves the adapter's folder alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(job.fresh(), config)
    torch.nn.init.normal_(theirs.base_model.model.classifier.modules_to_save["default"].weight, std=0.5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    names = sorted(p.name for p in (tmp_path / "theirs").iterdir())
    got = asked(capsys, job.lone(tmp_path / "theirs", "--output", str(tmp_path / "out")))
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == names
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"laplace.json", "laplace.safetensors", "reliability.png"}
    assert len(got["layers"]) == 4 and got == json.loads((tmp_path / "out" / "laplace.json").read_text())
    theirs.eval()
    with torch.no_grad():
        parts = [(theirs(**b).logits.double().softmax(1), b["labels"]) for b in job.batches(HELD)]
    p, y = (torch.cat(v) for v in zip(*parts, strict=True))
    for name, value in laplace.scores(p, y).items():
        assert got["kinds"]["map"][name] == pytest.approx(value, abs=1e-5)

    ours = job.fresh()
    fastpeft.load_adapter(ours, tmp_path / "theirs")
    fastpeft.save_adapter(ours, tmp_path / "ours")
    same = asked(capsys, job.lone(tmp_path / "ours"))
    assert (tmp_path / "ours" / "laplace.safetensors").is_file()
    keys = ("kinds", "precision", "log_evidence", "layers", "reliability")
    assert {k: got[k] for k in keys} == {k: same[k] for k in keys}

    # another order of the outputs
    turned = ("yes", "no", "perhaps")
    other = asked(capsys, job.lone(tmp_path / "ours", "--classes", *turned, "--output", str(tmp_path / "turned")))
    y = torch.cat([b["labels"] for b in job.batches(HELD, classes=turned)])
    assert other["kinds"]["map"]["nll"] == pytest.approx(laplace.nll(p, y), abs=1e-5)
    assert abs(other["kinds"]["map"]["nll"] - got["kinds"]["map"]["nll"]) > 0.01


def test_the_prior_and_the_layers(job, capsys, tmp_path):
    run, stopping = job.finetuned["run"], job.finetuned["stopping"]

    def of(folder, *more):
        return asked(capsys, ["laplace", str(folder), *QUICK, "--output", str(tmp_path / "out"), *more])

    fixed = of(run, "--prior", "3.5", "--layers", "last")
    assert fixed["precision"] == 3.5 and fixed["layers"] == ["bert.pooler.dense"]
    _, posterior = by_hand(job, run / "adapter", sites="last")
    assert fixed["log_evidence"] == pytest.approx(posterior.log_evidence(3.5).item(), rel=1e-6)
    assert of(run, "--prior", "1e9")["kinds"]["probit"] == pytest.approx(fixed["kinds"]["map"], abs=1e-4)

    # a fifth of what the adapter was trained on, and a word about that
    seen = of(run, "--prior", "validation")
    assert seen["examples"]["tuned_on"] in range(9, 13) and seen["examples"]["fitted"] == 60 - seen["examples"]["tuned_on"]
    assert "the adapter was trained on them" in seen["notes"][0]
    assert of(run, "--prior", "validation", "--seed", "1")["validation_nll"] != seen["validation_nll"]
    # the examples of early stopping, which no arm trained on
    report = json.loads((stopping / "report.json").read_text())
    unseen = of(stopping, "--prior", "validation")
    assert unseen["examples"] == {
        "fitted": report["data"]["train"], "tuned_on": report["data"]["validation"], "judged": 40,
    }  # fmt: skip
    assert "early stopping held out" in unseen["notes"][0] and unseen["validation_nll"] > 0
    assert unseen["precision"] != of(stopping)["precision"]


# errors


def copied(folder, to, **changes):
    """The report folder with other entries in its report's settings."""
    import shutil

    shutil.copytree(folder, to)
    path = to / "report.json"
    report = json.loads(path.read_text())
    report["settings"] |= changes
    path.write_text(json.dumps(report))
    return to


def refused(capsys, folder, message, *more, code=2):
    before = {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*")} if Path(folder).is_dir() else {}
    capsys.readouterr()
    assert main(["laplace", str(folder), *QUICK, *more]) == code
    line = error_of(capsys, code)
    assert message in line and line.startswith("error: laplace: ") and "finetune: " not in line, line
    assert before == ({p: p.stat().st_mtime_ns for p in Path(folder).rglob("*")} if before else {}), "something was written"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prior", "best"], "--prior best; it must be evidence, validation or a number above 0"),
        (["--prior", "-1"], "--prior -1.0; a prior precision is a finite number above 0"),
        (["--prior", "nan"], "a prior precision is a finite number above 0"),
        (["--n-kfac", "0"], "--n-kfac 0; it must be at least 1"),
        (["--bins", "0"], "--bins 0; it must be at least 1"),
        (["--samples", "0"], "--samples 0; it must be at least 1"),
        (["--max-length", "3"], "--max-length 3; it must be at least 4"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--output", "/proc/nothing"], "cannot write into /proc/nothing"),
        (["--model", "x", "--split-seed", "1"], "--model, --split-seed: the report in"),
    ],
)
def test_values_out_of_range(job, capsys, more, message):
    refused(capsys, job.finetuned["run"], message, *more)


def test_folders_that_hold_no_trained_classifier(job, capsys, tmp_path):
    run = job.finetuned["run"]
    refused(capsys, tmp_path / "missing", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(capsys, tmp_path / "empty", "neither report.json nor adapter_config.json")
    refused(capsys, run / "adapter", "an adapter without a report; give --model and --data")
    unfinished = copied(run, tmp_path / "unfinished")
    (unfinished / "resume.state").write_bytes(b"x")
    refused(capsys, unfinished, "holds an unfinished run (resume.state); finish it with `fastpeft finetune --resume`")
    refused(capsys, copied(run, tmp_path / "lm", task="causal-lm"), "belongs to a causal language model")
    refused(capsys, copied(run, tmp_path / "newer", colour=3), "which this version does not know")
    refused(capsys, copied(run, tmp_path / "moved", data=str(tmp_path / "gone.csv")), "gone.csv: no such file")
    refused(capsys, copied(run, tmp_path / "shorter", max_length=4), "training examples was sha256")
    refused(capsys, job.finetuned["dora"], "dora, which is not one LoRA's A and B")
    broken = copied(run, tmp_path / "broken")
    (broken / "report.json").write_text("{")
    refused(capsys, broken, "is no report of this version")
    (broken / "report.json").unlink()
    refused(capsys, broken, "neither report.json nor adapter_config.json")
    gone = copied(run, tmp_path / "gone")
    (gone / "adapter" / "adapter_model.safetensors").unlink()
    refused(capsys, gone, "adapter_model.safetensors does not exist")


def test_lone_adapters_that_do_not_fit(job, capsys, tmp_path, gpt2):
    import transformers

    lone = ["--model", str(job.model), *job.data]
    refused(capsys, job.finetuned["run"] / "adapter", "the data's classes are no, perhaps, yes", *lone, "--classes", "no", "yes")
    two = write_rows(tmp_path / "two.csv", [r for r in TRAIN if r[1] != "yes"])
    refused(capsys, job.finetuned["run"] / "adapter", "does not belong to this model", "--model", str(job.model), "--data", str(two))

    fastpeft.adapt(gpt2, "lora", rank=2)
    fastpeft.save_adapter(gpt2, tmp_path / "lm")
    refused(capsys, tmp_path / "lm", "belongs to a causal language model", *lone)

    model = transformers.AutoModel.from_pretrained(str(job.model))
    headless = transformers.BertForSequenceClassification(model.config)
    fastpeft.adapt(headless, "lora", rank=2, target_modules=["query"])
    fastpeft.save_adapter(headless, tmp_path / "headless")
    refused(capsys, tmp_path / "headless", "does not hold classifier, which", *lone)

    # a model that brings the head needs none in the adapter
    own = job.fresh()
    own.save_pretrained(tmp_path / "own")
    job.tokenizer.save_pretrained(tmp_path / "own")
    command = ["laplace", str(tmp_path / "headless"), "--model", str(tmp_path / "own"), *job.data, *QUICK]
    assert len(asked(capsys, command)["layers"]) == 2


def test_a_failure_on_the_way_writes_nothing(job, capsys, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(laplace.Posterior, "logits", fails)
    refused(capsys, copied(job.finetuned["run"], tmp_path / "copy"), "Nothing was written. A smaller --large", code=1)
