"""Domains of texts in the main job: a column of the data, labels of the routers in training, and never told in evaluation."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from job_models import WORDS, tiny_model

import fastpeft
from fastpeft.job import stdlib
from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT, build_arms
from fastpeft.job.data import Examples, encode, load_texts
from fastpeft.job.errors import JobError
from fastpeft.job.evaluate import evaluate
from fastpeft.job.finetune import finetune
from fastpeft.job.kinds import with_experts
from fastpeft.job.loop import train_step, trainee
from fastpeft.job.models import Source, load_model, load_tokenizer
from fastpeft.job.settings import Settings
from fastpeft.job.validation import hold_out


def write(path, count=60):
    """The domain is told by the words: "letters" has the first half of them, "numbers" the other; the label by one word of two."""
    draw = random.Random(0)
    rows = []
    for k in range(count):
        words, domain = (WORDS[:3], "letters") if k % 2 else (WORDS[8:11], "numbers")
        label = draw.randrange(2)
        rows.append({"body": " ".join([*draw.choices(words, k=8), WORDS[20 + label]]), "label": f"c{label}", "kind": domain})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def settings(tmp_path):
    model, _ = tiny_model(tmp_path, "bert")
    return Settings(
        model=str(model), data=str(write(tmp_path / "rows.jsonl")), text_column="body", domain_column="kind", method="moa", threads=1,
        options={"rank": 2}, epochs=4, batch_size=8, lr=2e-2, output=str(tmp_path / "out"),
    )  # fmt: skip


def test_a_run_trains_routers_beside_arms_that_have_none(settings, tmp_path):
    settings = replace(settings, data=str(write(tmp_path / "more.jsonl", 160)), epochs=6)
    outcome = finetune(settings)
    ours = outcome.arm(FASTPEFT)
    before, after = (ours.scores[0][e].routed for e in (0, -1))
    assert after == 1.0 and before < 0.9
    assert all(s.routed is None for name in (FROZEN, PEFT) for s in outcome.arm(name).scores[0])
    assert outcome.reload.fastpeft < 1e-5
    assert outcome.settings.options["experts"] == 2
    out = Path(settings.output)
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["domains"] == ["letters", "numbers"]
    row = next(a for a in report["arms"] if a["name"] == FASTPEFT)
    assert row["router_accuracy_per_seed"] == [[s.routed for s in ours.scores[0]]]
    assert "in 1.000 of all (block, evaluation text)" in (out / "report.md").read_text()


def built(settings):
    source = Source("tiny", settings.model, True)
    tokenizer = load_tokenizer(source)
    texts = load_texts(settings)
    settings = with_experts(settings, texts.domains)
    model, new = load_model(source, settings, classes=texts.classes, pad=tokenizer.pad_token_id, seed=0)
    arms = dict(zip((FROZEN, FASTPEFT), build_arms([FROZEN, FASTPEFT], model, new, settings, seed=0), strict=True))
    data = encode(texts.train, texts.train_labels, tokenizer, settings, texts.train_domains)
    return settings, arms, data


def test_evaluation_and_other_arms_are_told_nothing(settings):
    settings, arms, data = built(settings)
    batch = data.batch([0, 1, 2])
    assert batch["domain"].tolist() == data.domains[:3]
    assert "domain" not in arms[FROZEN].inputs(batch) and arms[FASTPEFT].inputs(batch).keys() == batch.keys()
    model = arms[FASTPEFT].model
    right = evaluate(model, data, settings)
    turned = replace(data, domains=[1 - d for d in data.domains])
    wrong = evaluate(model, turned, settings)
    assert (wrong.loss, wrong.accuracy) == (right.loss, right.accuracy)
    assert wrong.routed == pytest.approx(1 - right.routed)
    with pytest.raises(RuntimeError, match="without labels of its domains"):
        t = trainee(arms[FASTPEFT], settings, total_steps=3)
        t.arm.model.train()
        with t.runner:
            train_step(t, {k: v for k, v in batch.items() if k != "domain"}, 1e-3, settings)


def test_domains_follow_their_texts(settings, tmp_path):
    texts = load_texts(settings)
    own = {t: texts.domains[d] for t, d in zip(texts.train, texts.train_domains, strict=True)}
    held = {t: texts.domains[d] for t, d in zip(texts.evaluation, texts.evaluation_domains, strict=True)}
    for text, domain in (own | held).items():
        assert domain == ("letters" if text.split()[0] in WORDS[:8] else "numbers")
    rest, unseen = hold_out(texts, replace(settings, patience=1))
    kept = zip([*rest.train, *unseen.texts], [*rest.train_domains, *unseen.domains], strict=True)
    assert Counter(kept) == Counter(zip(texts.train, texts.train_domains, strict=True))
    tokenizer = load_tokenizer(Source("tiny", settings.model, True))
    windows = encode(["wa wb wc wd we wf wg", "wa"], None, tokenizer, replace(settings, max_length=4, task="causal-lm"), [5, 7])
    assert windows.domains == [5, 5, 7] and len(windows) == 3
    assert windows.part([2, 0]).batch([0, 1])["domain"].tolist() == [7, 5]
    assert "domain" not in Examples([[1]], [0], 0).batch([0])


@pytest.mark.accept
def test_a_run_that_was_stopped_goes_on_to_the_bit(settings, tmp_path, monkeypatch):
    whole = finetune(replace(settings, epochs=2, compare=False))
    from fastpeft.job import loop

    other = replace(settings, epochs=2, compare=False, output=str(tmp_path / "again"), save_every=2)
    taken = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda t, *a: taken(t, *a) if len(t.losses) < 9 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(JobError, match="interrupted"):
        finetune(other)
    monkeypatch.undo()
    again = finetune(other, resume=True)
    assert again.arm(FASTPEFT).losses == whole.arm(FASTPEFT).losses
    assert again.arm(FASTPEFT).scores == whole.arm(FASTPEFT).scores


def test_experts_are_the_domains(settings, tmp_path):
    assert with_experts(settings, None) is settings
    names = ["a", "b"]
    given = replace(settings, options={"experts": {"b": "2", "a": "1"}})
    assert list(with_experts(given, names).options["experts"].items()) == [("a", "1"), ("b", "2")]
    for experts, message in (({"a": "1"}, "names a; the data's domains are a, b"), (3, "is 3"), (["x", "y"], "a dict of domain -> folder")):
        with pytest.raises(JobError, match=message):
            with_experts(replace(settings, options={"experts": experts}), names)


@pytest.mark.accept
def test_language_modelling_routes_by_the_whole_window(settings, tmp_path):
    model, _ = tiny_model(tmp_path, "gpt2")
    outcome = finetune(replace(settings, model=str(model), task="causal-lm", epochs=1, compare=False, max_length=8))
    assert 0 <= outcome.arm(FASTPEFT).scores[0][-1].routed <= 1 and outcome.metric == "perplexity"


@pytest.mark.accept
def test_trained_loras_as_experts(settings, tmp_path):
    """A run whose experts are folders, given in any order; its report says that they are in the order of the domains."""
    settings, _, _ = built(settings)
    source, folders = Source("tiny", settings.model, True), {}
    for seed, name in enumerate(("letters", "numbers")):
        model, _ = load_model(source, settings, classes=["c0", "c1"], pad=0, seed=0)
        torch.manual_seed(seed)
        fastpeft.adapt(model, "lora", rank=3, target_modules=["query", "value"])
        for n, p in model.named_parameters():
            if n.endswith(".B"):
                torch.nn.init.normal_(p.data, std=0.3)
        folders[name] = str(tmp_path / name)
        fastpeft.save_adapter(model, folders[name])
    outcome = finetune(replace(settings, options={"experts": dict(reversed(folders.items()))}, compare=False, epochs=1))
    assert outcome.settings.options["experts"] == folders and outcome.reload.fastpeft < 1e-5


def test_built_in_domains():
    packages = [p for own in stdlib.DOMAINS.values() for p in own]
    assert sorted(packages) == sorted(stdlib.PACKAGES)
    texts = load_texts(Settings(method="moa", quick=True))
    assert texts.domains == sorted(stdlib.DOMAINS)
    pairs = set(zip(texts.train_labels, texts.train_domains, strict=True))
    assert {(texts.classes[y], texts.domains[d]) for y, d in pairs} == {(p, d) for d, own in stdlib.DOMAINS.items() for p in own}
    assert load_texts(Settings(quick=True)).domains is None


def test_bad_domains(settings, tmp_path):
    with pytest.raises(JobError, match=r"no column 'nowhere'.*--domain-column"):
        load_texts(replace(settings, domain_column="nowhere"))
    one = tmp_path / "one.csv"
    one.write_text("text,label,domain\n" + "".join(f"x{k},{k % 2},law\n" for k in range(20)))
    with pytest.raises(JobError, match="every training row has the domain 'law'"):
        load_texts(Settings(method="moa", data=str(one)))
    gap = tmp_path / "gap.csv"
    gap.write_text("text,label,domain\nx,1,law\ny,2,\n")
    with pytest.raises(JobError, match="row 2: 'domain' is ''"):
        load_texts(Settings(method="moa", data=str(gap)))
    train, held = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("text,label,domain\nx,1,law\ny,2,art\n")
    held.write_text("text,label,domain\nx,1,sport\n")
    with pytest.raises(JobError, match="domains that no training row has: sport"):
        load_texts(Settings(method="moa", data=str(train), eval_data=str(held)))
