"""What procedures count over the steps: the history of a job, its resume, and what its report shows of it."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from unittest import mock

import pytest
import torch
from job_models import WORDS, tiny_model, write_rows
from test_job_resume import at, changed, go, result_of

from fastpeft.job import loop, procedures
from fastpeft.job.history import History, module_type
from fastpeft.job.page import _PROGRESS
from fastpeft.job.plots import PROGRESS_LABELS
from fastpeft.job.settings import Settings
from fastpeft.method.adalora import AdaLoRA
from fastpeft.method.aflora import AFLoRA
from fastpeft.method.alora_alloc import ALoRAAlloc
from fastpeft.method.sora import SoRA

# method -> what it counts, its options, its procedure's: something changes in 12 steps
CASES = {
    "alora_alloc": ("ranks", {"rank": 2}, {"interval": 2, "ranks_per_round": 3}),  # the first round at an epoch's end
    "adalora": ("ranks", {"rank": 4}, {"target_rank": 2, "tinit": 2, "tfinal": 3, "deltaT": 3}),  # masked ranks come back between masks
    "sora": ("ranks", {"rank": 4}, {"xi": 0.1}),
    "aflora": ("freezing", {"rank": 2, "train_square": True}, {"start": 2, "tail": 3, "deltaT": 2}),
}


def counted(model: torch.nn.Module) -> dict[str, int]:
    """The model's own ranks in use, or which matrices train, read off its tensors."""
    found = {}
    for name, m in model.named_modules():
        site = name.rpartition(".adapter.")[0]
        if isinstance(m, ALoRAAlloc):
            found[site] = sum(bool(g) for g in m.gate)
        elif isinstance(m, (SoRA, AdaLoRA)):
            found[site] = sum(x != 0 for x in (m.g if isinstance(m, SoRA) else m.E).flatten().tolist())
        elif isinstance(m, AFLoRA):
            found |= {f"{site}.A": int(m.A.requires_grad), f"{site}.B": int(m.B.requires_grad)}
    return found


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("base")
    model, _ = tiny_model(folder, "bert")
    draw = random.Random(0)
    rows = [(" ".join([WORDS[k % 2]] * 2 + draw.choices(WORDS, k=4)), str(k % 2)) for k in range(60)]
    return Settings(
        model=str(model), data=str(write_rows(folder / "rows.csv", rows)), epochs=2, batch_size=8, max_length=16, lr=2e-2,
        seeds=(0, 1), output=str(folder / "out"), threads=1, compare=False, save_every=2, target_modules=("query", "value"),
    )  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def whole(request, settings, tmp_path_factory):
    """(settings, kind, what was seen of the model per seed before each step and at the end, what the run left)."""
    kind, options, more = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    mine = at(settings, folder, method=request.param, options=options, procedure_options=more)
    seen: list[list[dict[str, int]]] = []
    step = loop.train_step

    def spy(t, *rest):
        if not t.losses:
            seen.append([])
        seen[-1].append(counted(t.arm.model))
        return step(t, *rest)

    def whole_train(*a, **k):
        real(*a, **k)
        seen[-1].append(counted(a[0][0].arm.model))

    real = loop._train
    with mock.patch.object(loop, "_train", whole_train), mock.patch.object(loop, "train_step", spy):
        go(mine)
    return mine, kind, seen, result_of(mine)


def test_the_history_is_that_of_the_model(whole):
    mine, kind, seen, left = whole
    [arm] = left["report"]["arms"]
    assert len(arm["progress_per_seed"]) == len(seen) == 2
    for found, own in zip(arm["progress_per_seed"], seen, strict=True):
        assert list(found) == [kind] and len(own) == 13
        history = History(found[kind])
        for k, counts in enumerate(own):
            # every E is zero before AdaLoRA's first step, and no rank is masked
            want = dict.fromkeys(counts, 4) if mine.method == "adalora" and k == 0 else counts
            assert history.at(k) == want, k
        assert own[-1] != own[1] and len(history.changes) > 2
        for (_, a), (_, b) in zip(history.states(), list(history.states())[1:], strict=False):
            assert a != b


def test_a_resumed_run_has_the_same_history(whole, tmp_path):
    mine, _, _, left = whole
    # in the second seed, after a change of the first and between two saves
    again = at(mine, tmp_path)
    go(again, kill=("forward", 12 + 10))
    go(again, again=True)
    assert changed(result_of(again), left) == []


def test_the_report_shows_it(whole):
    mine, kind, seen, left = whole
    folder = Path(mine.output)
    other = ({"ranks", "freezing"} - {kind}).pop()
    assert (folder / f"{kind}.png").read_bytes().startswith(b"\x89PNG") and not (folder / f"{other}.png").exists()
    text = (folder / "report.md").read_text()
    before = History(left["report"]["arms"][0]["progress_per_seed"][0][kind]).at(0)
    layers = {n: c for n, c in before.items() if module_type(n).startswith("attention.self.query")}
    first, ends = sum(before.values()), [sum(own[-1].values()) for own in seen]
    assert f"![{kind}]({kind}.png)" in text and f"| all | {len(before)} | {first} | {ends[0]}, {ends[1]} |" in text
    for name in {module_type(n) for n in layers}:
        own = [n for n in layers if module_type(n) == name]
        assert f"| {name} | 2 | {sum(before[n] for n in own)} | {', '.join(str(sum(s[-1][n] for n in own)) for s in seen)} |" in text


@pytest.fixture(scope="module")
def bilora(settings, tmp_path_factory):
    mine = at(settings, tmp_path_factory.mktemp("bilora"), method="bilora", options={"rank": 2})
    go(mine)
    return mine, json.loads((Path(mine.output) / "report.json").read_text()), (Path(mine.output) / "report.md").read_text()


def test_without_such_a_procedure_there_is_nothing(bilora, settings, tmp_path):
    mine = at(settings, tmp_path, options={"rank": 2})
    go(mine)
    for folder in (Path(mine.output), Path(bilora[0].output)):
        both = (folder / "report.json").read_text() + (folder / "report.md").read_text()
        assert not list(folder.glob("*ranks*")) + list(folder.glob("*freezing*"))
        assert "progress" not in both and not any(title in both for title, _ in _PROGRESS.values())
    plain = (Path(mine.output) / "report.json").read_text() + (Path(mine.output) / "report.md").read_text()
    assert "aside" not in plain and "D1" not in plain


def test_bilora_s_report_says_the_split(bilora):
    _, report, text = bilora
    # 48 training examples, a fifth for the upper level
    assert report["data"]["train"] == 48 and report["data"]["learned_from"] == 38 and report["data"]["aside"] == {"BiLoRABilevel": 10}
    assert "of the 48 examples 38 train every arm (D1), 10 are BiLoRABilevel's alone (D2)" in text
    assert len(report["arms"][0]["losses"][0]) == 2 * 5


def test_the_gap_between_the_losses(bilora):
    _, report, text = bilora
    [arm] = report["arms"]
    for k in range(2):
        last = statistics.fmean(arm["losses"][k][5:])
        assert arm["training_loss_per_seed"][k] == last and arm["loss_gap_per_seed"][k] == arm["evaluation_loss_per_seed"][k][-1] - last
    assert f"fastpeft bilora {statistics.fmean(arm['loss_gap_per_seed']):+.3f}" in text


def test_history():
    h = History()
    h.record(0, {"a.0.q": 2, "a.1.q": 2, "a.0.v": 4})
    h.record(1, {"a.0.q": 2, "a.1.q": 2, "a.0.v": 4})
    h.record(3, {"a.0.q": 1, "a.1.q": 2, "a.0.v": 4})
    h.record(3, {"a.0.q": 1, "a.1.q": 0, "a.0.v": 4})
    assert h.changes == [(0, {"a.0.q": 2, "a.1.q": 2, "a.0.v": 4}), (3, {"a.0.q": 1, "a.1.q": 0})]
    assert h.at(2) == h.at(0) and h.at(3) == {"a.0.q": 1, "a.1.q": 0, "a.0.v": 4}
    assert h.by_type(statistics.fmean) == {"q": [(0, 2.0), (3, 0.5)], "v": [(0, 4.0), (3, 4.0)]}
    again = History(json.loads(json.dumps(h.changes)))
    again.record(4, {"a.0.q": 1, "a.1.q": 0, "a.0.v": 4})
    assert again == h
    assert [module_type(n) for n in ("h.3.mlp.c_fc", "pooler.dense", "layer.1", "0")] == ["mlp.c_fc", "pooler.dense", "layer.1", "0"]


def test_every_kind_has_its_words():
    kinds = {c.PROGRESS for c in procedures.known().values()} - {None}
    assert kinds == set(PROGRESS_LABELS) == set(_PROGRESS) == {k for k, _, _ in CASES.values()}
