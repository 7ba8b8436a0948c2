"""The main job's parts: built-in data, sources, split, training, measurement, report. Tiny models, no network."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from job_models import WORDS, tiny_model, write_rows

from fastpeft.job import measure, sources, stdlib
from fastpeft.job.arms import FASTPEFT, Arm
from fastpeft.job.data import encode, load_texts
from fastpeft.job.errors import JobError
from fastpeft.job.finetune import finetune
from fastpeft.job.loop import Trainee, lr_at, train_step
from fastpeft.job.models import Source, load_tokenizer, new_modules
from fastpeft.job.settings import Settings
from fastpeft.job.split import near_copies, split


@pytest.fixture(scope="module")
def harvest() -> tuple[list[str], list[str]]:
    return stdlib.harvest()


def test_harvest_is_a_function_of_the_seed(harvest):
    assert stdlib.harvest() == harvest
    assert stdlib.harvest(seed=1) != harvest
    texts, labels = harvest
    assert set(labels) == set(stdlib.PACKAGES)
    assert max(Counter(labels).values()) <= 150 and min(Counter(labels).values()) >= 50
    assert len({t.lower() for t in texts}) == len(texts)
    assert all(len(t) <= 600 and not re.search(r"\s\s|\n", t) for t in texts)


def test_no_text_names_its_package(harvest):
    leaks = [(y, t) for t, y in zip(*harvest, strict=True) if y in t.lower()]
    assert leaks == []


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Close the HTTPConnection.", "Close the it."),
        ("See http.client and XHTTP_x.", "See it and it."),
        ("The path a.http.b (http)", "The path it (it)"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_mask_takes_the_whole_name(text, masked):
    assert stdlib.mask(text, "http") == masked


def test_docstrings_reads_source_without_importing_it(tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "a.py").write_text(
        '"""Module of pkg   things here."""\nraise SystemExit\n'
        'class K:\n    """A class\n    of many words."""\n    async def f(self):\n        """Wait for pkg.a.K now."""\n'
        'def g():\n    """Too short."""\n'
    )
    (tmp_path / "pkg" / "test" / "b.py").write_text('"""A test module of the package."""\n')
    assert stdlib.docstrings("pkg", tmp_path) == [
        "Module of it things here.",
        "A class of many words.",
        "Wait for it now.",
    ]
    with pytest.raises(JobError, match="no docstrings of 'asyncio'"):
        stdlib.harvest(root=tmp_path)


def test_no_near_copy_across_the_split():
    """Brute force over all pairs, with sets of word triples built here."""
    texts = load_texts(Settings())

    def triples(text: str) -> set[str]:
        words = [w for w in re.split(r"\W+", text.lower()) if w]
        return {" ".join(words[k : k + 3]) for k in range(max(1, len(words) - 2))}

    held = [triples(t) for t in texts.evaluation]
    worst = max(len(a & b) / len(a | b) for a in map(triples, texts.train) for b in held)
    assert 0.2 < worst < 0.5


def test_near_copies_are_grouped_transitively():
    base = [f"word{k}" for k in range(12)]
    a, b, c = (" ".join(base[k : k + 10]) for k in (0, 1, 2))
    groups = near_copies([a, "something else entirely different here", b, c, ""])
    assert groups[0] == groups[2] == groups[3]
    assert len({groups[0], groups[1], groups[4]}) == 3


def test_split_is_stratified_and_keeps_groups_whole():
    draw = random.Random(0)
    strata = ["a"] * 100 + ["b"] * 40 + ["c"]
    groups = [draw.randrange(60) for _ in strata]
    train, held = split(groups, strata, share=0.2, seed=3)
    assert sorted(train + held) == list(range(141))
    assert not {groups[k] for k in train} & {groups[k] for k in held}
    counts = Counter(strata[k] for k in held)
    assert 15 <= counts["a"] <= 20 and 5 <= counts["b"] <= 8 and counts["c"] == 0
    assert split(groups, strata, share=0.2, seed=3) == (train, held)
    assert split(groups, strata, share=0.2, seed=4) != (train, held)


ROWS = [
    ("good day", "yes"),
    ("bad, night", "no"),
    ('a "quoted" text\nof two lines', "yes"),
    ("", "no"),
    ("fine", "1"),
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ""])
def test_sources_agree(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    rows, held = sources.read(str(path), sources.Columns("text", "label"))
    assert (rows.texts, rows.labels, rows.dropped) == (
        ["good day", "bad, night", 'a "quoted" text\nof two lines', "fine"],
        ["yes", "no", "yes", "1"],
        1,
    )
    assert held is None
    assert sources.read(str(path), sources.Columns("label", None))[0].texts == ["yes", "no", "yes", "no", "1"]


def test_datasets_folder_with_class_names_and_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"body": datasets.Value("string"), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    train = datasets.Dataset.from_dict({"body": ["a b", "c d", "e f"], "kind": [0, 1, 1]}, features=features)
    test = datasets.Dataset.from_dict({"body": ["g h"], "kind": [1]}, features=features)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "d"))
    texts = load_texts(Settings(data=str(tmp_path / "d"), text_column="body", label_column="kind"))
    assert (texts.train, texts.train_labels, texts.evaluation, texts.classes) == (
        ["a b", "c d", "e f"], [0, 1, 1], ["g h"], ["cat", "dog"],
    )  # fmt: skip
    assert texts.evaluation_labels == [1] and texts.majority == 1.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        (
            "a.csv",
            "words,label\nx,1\n",
            "no column 'text'; its columns are words, label. Name one with --text-column",
        ),
        ("a.csv", "text,kind\nx,1\n", "no column 'label'.*--label-column"),
        ("a.csv", "text,label\nx\n", "line 2 does not have the 2 fields"),
        ("a.csv", "text,label\nx,1,2\n", "line 2 does not have the 2 fields"),
        ("a.csv", "text,label\nx,\n", "row 1: 'label' is ''"),
        ("a.csv", "text,label\n ,1\n", "every row's 'text' is empty"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
        ("a.csv", "text,label\nx,1\ny,1\nz,1\n", "every training row has the label '1'"),
        ("a.csv", "text,label\nx,1\ny,2\n", "leave none to evaluate on"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', "line 2 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 is a list"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "row 1: 'text' is a int"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "row 1: 'label' is 0.5"),
        ("a.json", '{"text": "x"}', "one list of objects"),
        ("a.xlsx", "x", "unknown file type '.xlsx'"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JobError, match=message) as caught:
        load_texts(Settings(data=str(path)))
    assert caught.value.code == 2


def test_labels_that_training_never_saw(tmp_path):
    train = write_rows(tmp_path / "a.csv", [("x", "1"), ("y", "2")])
    held = write_rows(tmp_path / "b.csv", [("x", "3")])
    with pytest.raises(JobError, match="labels that no training row has: 3"):
        load_texts(Settings(data=str(train), eval_data=str(held)))


def test_language_modelling_loses_no_token(tmp_path):
    path, plain = tiny_model(tmp_path, "gpt2")
    assert plain.pad_token_id is None
    tokenizer = load_tokenizer(Source("tiny", str(path), True))
    texts = [" ".join(WORDS[:9]), " ".join(WORDS[3:5]), " ".join(WORDS[5:12])]
    found = encode(texts, None, tokenizer, Settings(max_length=4))
    kept = [i for row in found.ids for i in row]
    expected = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    assert kept == expected and max(map(len, found.ids)) == 4
    batch = found.batch([0, 2])
    assert batch["labels"].eq(-100).equal(batch["attention_mask"].eq(0))


def test_learning_rate_rises_and_falls():
    rates = [lr_at(k, 20, Settings(lr=1.0, warmup=0.1)) for k in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 18)


def test_new_modules_are_the_outermost_ones():
    model = torch.nn.ModuleDict(
        {"body": torch.nn.Linear(2, 2), "head": torch.nn.Sequential(torch.nn.Linear(2, 2))}
    )
    assert new_modules(model, {"head.0.weight", "head.0.bias", "body.bias"}) == ["head"]


def test_bytes_saved_counts_storages_once_and_no_parameter():
    w = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)

    def forward() -> torch.Tensor:
        h = x @ w  # saves x (w is owned); x needs no gradient
        return (
            h.exp() * h[:2].exp().sum()
        ).sum()  # exp saves its result [4, 8], and [2, 8]; mul saves [4, 8] again, and 1

    # x 4*8, exp 4*8, exp 2*8, sum 1: the product's two saved tensors are the first exp and the sum
    assert measure.bytes_saved(forward, [w]) == 4 * (32 + 32 + 16 + 1)


def test_summaries():
    assert measure.median_after_warm_up([9, 9, 9, 1, 2, 3]) == 2
    assert measure.median_after_warm_up([5]) == 5
    assert measure.median_ratio([9, 9, 9, 2, 8, 3], [1, 1, 1, 1, 2, 3]) == 2
    # resumed at step 4: the three steps from there are warm-up too
    assert measure.after_warm_up([9, 9, 9, 2, 8, 8, 8, 3], [0, 4]) == [2, 3]
    assert measure.median_ratio([9, 9, 9, 2, 8, 8, 8, 3], [1] * 5, [0, 4]) == 2
    assert measure.mean_and_spread([1.0]) == (1.0, None)
    assert measure.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """One whole run with all arms and two seeds on a tiny BERT whose task is one word."""
    folder = tmp_path_factory.mktemp("job")
    model, _ = tiny_model(folder, "bert")
    draw = random.Random(0)
    rows = [
        (" ".join([WORDS[k % 2]] * 4 + draw.choices(WORDS, k=3)), "odd" if k % 2 else "even")
        for k in range(60)
    ]
    data = write_rows(folder / "rows.csv", rows)
    settings = Settings(
        model=str(model), data=str(data), options={"rank": 2, "alpha": 4}, epochs=6, batch_size=8, max_length=16,
        lr=1e-2, seeds=(0, 1), output=str(folder / "out"), threads=1,
    )  # fmt: skip
    return finetune(settings), folder / "out"


def test_run_reports_every_arm(classified):
    _, folder = classified
    assert {p.name for p in folder.iterdir()} == {
        "report.md",
        "report.json",
        "loss.png",
        "memory.png",
        "adapter",
    }
    for plot in ("loss.png", "memory.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text())
    assert [a["name"] for a in report["arms"]] == ["frozen", "peft", "fastpeft"]
    frozen, peft, ours = report["arms"]
    # 2 blocks of 4 [16 -> 16], [16 -> 32] and [32 -> 16], and the pooler: rank 2 times in + out each; head 16 x 2 + 2
    assert frozen["trainable_parameters"] == 34
    assert (
        peft["trainable_parameters"] == ours["trainable_parameters"] == 34 + 2 * (2 * (4 * 32 + 2 * 48) + 32)
    )
    for a in report["arms"]:
        assert a["step_seconds_median"] > 0 and a["peak_bytes"] >= a["loaded_bytes"] > 50 << 20
        assert len(a["losses"]) == 2 and len(a["losses"][0]) == 6 * 6
        assert a["accuracy_spread"] is not None and len(a["accuracy_per_seed"][0]) == 7
        assert a["accuracy_before"] == frozen["accuracy_before"]
    assert 0 < frozen["saved_bytes"] < ours["saved_bytes"] <= peft["saved_bytes"]
    assert report["data"]["majority_accuracy"] == 0.5
    text = (folder / "report.md").read_text()
    for piece in ("frozen + head", "PEFT lora", "fastpeft lora", "saved for backward", "adapter in float32"):
        assert piece in text


def test_run_learns_as_peft_does(classified):
    outcome, _ = classified
    ours, theirs = outcome.arm("fastpeft"), outcome.arm("peft")
    assert min(ours.metric(-1)) >= 0.9
    # equal starts, batches and the model's own dropout: fp32 rounding alone tells the arms apart
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


def test_saved_adapter_gives_the_same_logits(classified):
    outcome, folder = classified
    assert outcome.reload.fastpeft <= 1e-5
    assert outcome.reload.peft is not None and outcome.reload.peft <= 1e-5
    assert outcome.reload.scale > 0.1
    assert {p.name for p in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_causal_language_model(tmp_path):
    model, _ = tiny_model(tmp_path, "gpt2")
    data = write_rows(
        tmp_path / "rows.jsonl", [(f"{WORDS[k]} {' '.join(WORDS[k % 3 :: 3])}", "x") for k in range(24)]
    )
    outcome = finetune(
        Settings(
            model=str(model),
            data=str(data),
            task="causal-lm",
            options={"rank": 2, "alpha": 8},
            epochs=4,
            batch_size=4,
            max_length=12,
            lr=2e-2,
            output=str(tmp_path / "out"),
            threads=1,
            seeds=(3,),
        )
    )
    frozen, peft, ours = outcome.arms
    assert frozen.trainable == 0 and frozen.saved_bytes == 0 and frozen.metric(0) == frozen.metric(-1)
    assert ours.metric(-1)[0] < 0.8 * ours.metric(0)[0]
    assert ours.metric(-1)[0] == pytest.approx(peft.metric(-1)[0], rel=1e-2)
    assert outcome.reload.fastpeft <= 1e-5
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metric"] == "perplexity"


def test_memory_of_a_child_is_its_own():
    """A parent that has held 600 MiB must not show up in the child's peak."""
    import subprocess
    import sys

    held = torch.ones(600 << 18)
    code = "from fastpeft.job.memory import peak_resident; print(peak_resident())"
    child = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert held.nbytes == 600 << 20
    assert 50 << 20 < child < 600 << 20


def test_files_of_others_survive(classified, tmp_path):
    from fastpeft.job.report import write_report

    outcome, _ = classified
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    (tmp_path / "report.md").write_text("old")
    write_report(outcome, tmp_path)
    assert other.read_text() == "mine" and "old" != (tmp_path / "report.md").read_text()
    assert {p.name for p in Path(tmp_path).iterdir()} == {
        "notes.txt",
        "report.md",
        "report.json",
        "loss.png",
        "memory.png",
    }


def test_gradients_are_clipped_by_one_norm_over_all_groups():
    from types import SimpleNamespace

    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))

    class Model(torch.nn.Module):
        def forward(self):
            return SimpleNamespace(loss=(3.0 * a + 4.0 * b).sum())

    optimizer = torch.optim.SGD([{"params": [p], "share": 1.0} for p in (a, b)], lr=1.0)
    t = Trainee(Arm(FASTPEFT, "", "", Model()), optimizer)
    train_step(t, {}, 1.0, Settings(clip=0.5))
    moved = -torch.cat([a, b]).detach()
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(moved / moved[0], torch.tensor([1.0, 1.0, 4 / 3, 4 / 3]))
