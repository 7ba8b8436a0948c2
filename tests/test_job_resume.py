"""Early stopping and resume of the main job: a killed run, resumed, equals the one that was never stopped, to the bit.

Run as a script with a spec on stdin, this file is the process that the tests kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from job_models import WORDS, tiny_model, write_rows
from safetensors import safe_open

from fastpeft import folder as files
from fastpeft.job import finetune as job
from fastpeft.job import loop, memory, report, resume, rng, snapshot, statefile
from fastpeft.job.data import load_texts
from fastpeft.job.early_stopping import EarlyStopping
from fastpeft.job.errors import Finished, JobError
from fastpeft.job.evaluate import evaluate
from fastpeft.job.identity import differences
from fastpeft.job.settings import Settings
from fastpeft.job.split import near_copies
from fastpeft.job.validation import hold_out

STATE = "resume.state"
# what a resumed run measures anew: times, and the memory of other processes
MEASURED = ("step_seconds", "step_seconds_median", "step_ratio_to_peft", "resumed_at_steps", "wall_seconds", "session_seconds")

# ---- the rule


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "best_epoch", "stops_after"),
    [
        (1, 0.0, [3.0, 2.0, 2.0], 2, 3),  # equal is no improvement
        (2, 0.0, [3.0, 4.0, 2.0, 5.0, 2.5, 1.0], 3, 5),  # an improvement in between starts the count anew
        (3, 0.0, [3.0, 2.0, 1.0, 0.5], 4, None),
        (2, 0.25, [3.0, 2.75, 2.5, 2.25], 3, None),  # less than min_delta below 3.0, then exactly 0.5 below it
        (1, 0.25, [3.0, 2.75], 1, 2),
        (1, 0.0, [float("inf"), float("nan")], 1, 2),
        (1, 0.0, [float("nan"), 2.0, float("nan")], 2, 3),
    ],
)
def test_the_rule(patience, min_delta, losses, best_epoch, stops_after):
    rule, stopped = EarlyStopping(patience, min_delta), None
    for epoch, loss in enumerate(losses, 1):
        rule.update(loss)
        if rule.stopped:
            stopped = epoch
            break
    assert (rule.best_epoch, stopped) == (best_epoch, stops_after)


def test_validation_examples_come_out_of_training_alone():
    texts = load_texts(Settings())
    assert hold_out(texts, Settings()) == (texts, None)
    rest, validation = hold_out(texts, Settings(patience=2))
    assert (rest.evaluation, rest.evaluation_labels) == (texts.evaluation, texts.evaluation_labels)
    pairs = lambda t, y: Counter(zip(t, y, strict=True))  # noqa: E731
    both = pairs(rest.train, rest.train_labels) + pairs(validation.texts, validation.labels)
    assert both == pairs(texts.train, texts.train_labels)
    share = {c: n / texts.train_labels.count(c) for c, n in Counter(validation.labels).items()}
    assert set(share) == set(texts.train_labels) and all(0.05 < s < 0.15 for s in share.values())
    groups = near_copies(rest.train + validation.texts)
    assert not set(groups[: len(rest.train)]) & set(groups[len(rest.train) :])
    assert "held out for early stopping" in rest.description


def test_too_few_rows_to_hold_out(tmp_path):
    data = write_rows(tmp_path / "a.csv", [("x", "1"), ("y", "2"), ("x", "1"), ("y", "2")])
    held = write_rows(tmp_path / "b.csv", [("x", "1")])
    settings = Settings(data=str(data), eval_data=str(held), patience=1)
    with pytest.raises(JobError, match="--patience 1: 4 training rows leave none"):
        hold_out(load_texts(settings), settings)


# ---- the state file


def test_generators_go_on_where_they_were():
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(numpy.random.rand())

    random.random(), numpy.random.standard_normal()
    state = rng.capture()
    first = draw()
    assert draw() != first
    rng.restore(state)
    assert draw() == first


class Runs:
    """A pickle that calls a function when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


def signed(body: bytes) -> bytes:
    return statefile._MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda b: b[: len(b) // 2], "truncated or damaged"),
        (lambda b: b[:-1], "truncated or damaged"),
        (lambda b: b + b"x", "truncated or damaged"),
        (lambda b: b[:-300] + bytes([b[-300] ^ 1]) + b[-299:], "truncated or damaged"),
        (lambda b: b"", "no state that this version"),
        (lambda b: b.replace(b"run 2", b"run 1", 1), "no state that this version"),
        (lambda b: b"\x80\x02garbage", "no state that this version"),
        (lambda b: signed(b"\x80\x02garbage"), "cannot be continued"),
        (lambda b: signed(pickle.dumps(Runs())), "cannot be continued"),
    ],
)
def test_a_damaged_state_is_refused_and_kept(tmp_path, monkeypatch, damage, word):
    monkeypatch.chdir(tmp_path)
    statefile.write(tmp_path, {"weights": torch.arange(100.0), "losses": [0.1, float("inf")]})
    assert statefile.read(tmp_path)["losses"] == [0.1, float("inf")]
    path = tmp_path / STATE
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(JobError, match=word) as caught:
        resume.open_run(Settings(output=str(tmp_path)), resume=True, restart=False, began=0.0)
    assert str(path) in str(caught.value) and "--restart" in str(caught.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [STATE]


def test_differences_are_named():
    found = differences({"lr": 0.1, "epochs": 3, "x": "a" * 64}, {"lr": 0.2, "epochs": 3, "x": "b" * 64, "new": 1})
    assert found == [
        "lr was 0.1 and is 0.2 now", "x was sha256 aaaaaaaa... and is sha256 bbbbbbbb... now", "new was None and is 1 now"
    ]  # fmt: skip


# ---- whole runs, stopped and resumed


class Killed(BaseException):
    """Stands for a SIGKILL in this process: nothing of the job catches it."""


def raise_killed() -> None:
    raise Killed


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def dying(place: str, nth: int, die: Callable[[], None]) -> Iterator[None]:
    """Inside, the process dies when it comes to `place` for the nth time."""
    count = 0

    def here() -> None:
        nonlocal count
        count += 1
        if count == nth:
            die()

    def half_write(path: Path, data: bytes) -> None:
        if path.name == f".{STATE}.pending":
            if count + 1 == nth:
                path.write_bytes(data[: len(data) // 2])
            here()
        real(path, data)

    def replace(a: Any, b: Any) -> None:
        wanted = Path(b).name == {"rename": STATE, "renamed": STATE, "adapter": "adapter_config.json", "report": "loss.png"}[place]
        if wanted and place != "renamed":
            here()
        real(a, b)
        if wanted and place == "renamed":
            here()

    def around(*a: Any, **k: Any) -> Any:
        if place in ("forward", "backward", "removal"):
            here()
        result = real(*a, **k)
        if place in ("updated", "epoch"):
            here()
        return result

    owner, name, double = {
        "forward": (loop, "train_step", around),
        "backward": (torch.optim.AdamW, "step", around),  # gradients are there, nothing has moved
        "updated": (torch.optim.AdamW, "step", around),  # moved, and not yet noted
        "epoch": (loop, "_end_epoch", around),
        "write": (files, "sync_write", half_write),
        "rename": (os, "replace", replace),
        "renamed": (os, "replace", replace),
        "adapter": (os, "replace", replace),
        "report": (os, "replace", replace),
        "removal": (statefile, "remove", around),
    }[place]
    real = getattr(owner, name)
    cleans_up = place == "write" and die is raise_killed
    with mock.patch.object(owner, name, double), ExitStack() as stack:
        if cleans_up:  # a killed process does not
            stack.enter_context(mock.patch.object(Path, "unlink", lambda *a, **k: None))
        yield


@contextmanager
def light(final: Path, streams: bool = False, pause: float = 0.0) -> Iterator[None]:
    """The job without its plots and memory processes; each seed's end state goes to `final`.

    streams: the training draws from one unbroken stream of every generator instead of a seed per step.
    pause: seconds before each step.
    """
    real_train, real_step = loop.train, loop.train_step

    def train(trainees: list[Any], data: Any, held: Any, settings: Settings, *, seed: int, **options: Any) -> None:
        real_train(trainees, data, held, settings, seed=seed, **options)
        for t in trainees:
            t.runner = None  # it has ended, and no longer says what a resume would need
        end = {t.arm.name: snapshot.of_trainee(t) for t in trainees}
        for t in trainees:
            del end[t.arm.name]["seconds"], end[t.arm.name]["starts"]
            assert evaluate(t.arm.model, held, settings) == t.scores[t.kept_epoch]
        final.mkdir(exist_ok=True)
        torch.save(end, final / f"{seed}.pt")

    def step(t: Any, batch: Any, lr: float, settings: Settings) -> float:
        time.sleep(pause)
        factor = 0.5 + random.random() * numpy.random.rand() if streams else 1.0
        return real_step(t, batch, lr * factor, settings)

    with ExitStack() as stack:
        patch = lambda *a: stack.enter_context(mock.patch.object(*a))  # noqa: E731
        patch(job, "train", train)
        patch(loop, "train_step", step)
        patch(memory, "measure", lambda *a, **k: {"loaded": 1, "peak": 2, "cuda_peak": 0})
        patch(report, "draw_loss", lambda outcome, path: path.write_bytes(b""))
        patch(report, "draw_memory", lambda outcome, path: path.write_bytes(b""))
        if streams:
            patch(loop, "_reseed", lambda seed, step: None)
        yield


def spoil_generators(value: int) -> None:
    """What a new process finds in its generators is not what the old one had."""
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value)


def go(settings: Settings, *, kill: tuple[str, int] | None = None, again: bool = False, **how: Any) -> None:
    """Run the job in this process; with `kill` it does not survive."""
    spoil_generators(99 if again else 1)
    with light(Path(settings.output).parent / "final", **how):
        if kill is None:
            job.finetune(settings, resume=again)
            return
        with dying(*kill, raise_killed), pytest.raises(Killed):
            job.finetune(settings, resume=again)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    """A tiny BERT, noisy labels, dropout, two seeds: the arms stop at different epochs."""
    folder = tmp_path_factory.mktemp("resume")
    model, _ = tiny_model(folder, "bert")
    draw = random.Random(0)
    rows = []
    for k in range(60):
        label = draw.random() < 0.2
        rows.append((" ".join([WORDS[k % 2]] * 2 + draw.choices(WORDS, k=4)), str((k + label) % 2)))
    data = write_rows(folder / "rows.csv", rows)
    return Settings(
        model=str(model), data=str(data), options={"rank": 2, "alpha": 4, "dropout": 0.1}, epochs=4, batch_size=8,
        target_modules=("query", "value"), max_length=16, lr=2e-2, seeds=(0, 1), output=str(folder / "out"), threads=1,
        patience=1, save_every=2,
    )  # fmt: skip


def at(settings: Settings, folder: Path, **changes: Any) -> Settings:
    from dataclasses import replace

    return replace(settings, output=str(folder / "out"), **changes)


def result_of(settings: Settings) -> dict[str, Any]:
    """All that a finished run leaves, but its times."""
    folder = Path(settings.output)
    figures = json.loads((folder / "report.json").read_text())
    del figures["settings"]["output"]
    for part in [figures, *figures["arms"]]:
        for name in MEASURED:
            part.pop(name, None)
    final = {p.name: torch.load(p, weights_only=True) for p in sorted((folder.parent / "final").iterdir())}
    adapter = {"config": json.loads((folder / "adapter" / "adapter_config.json").read_text())}
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        # the header's entries come in any order, so the bytes of the file itself may differ
        adapter |= {"header": file.metadata(), **{key: file.get_tensor(key) for key in file.keys()}}
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list(folder.glob(f"*{STATE}*"))
    return {"report": figures, "final": final, "adapter": adapter}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


def changed(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two results differ in any bit."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [p for k in a for p in changed(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} long"]
        return [p for k, (x, y) in enumerate(zip(a, b, strict=True)) for p in changed(x, y, f"{path}/{k}")]
    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    else:
        equal = a == b
    return [] if equal else [f"{path}: {a!r} and {b!r}"[:200]]


def test_changed_sees_a_bit():
    a = {"x": [torch.zeros(2), 0.1], "y": (1, None)}
    assert changed(a, {"x": [torch.zeros(2), 0.1], "y": (1, None)}) == []
    assert changed(a, {"x": [torch.tensor([0.0, -0.0]), 0.1], "y": (1, True)}) == [
        "/x/0: tensor([0., 0.]) and tensor([0., -0.])", "/y/1: NoneType and bool"
    ]  # fmt: skip
    assert len(changed(a, {"x": [torch.zeros(2)], "z": 0})) == 1


@pytest.fixture(scope="module")
def whole(settings) -> dict[str, Any]:
    """What the run leaves that was never stopped."""
    torch.set_num_threads(1)
    go(settings)
    return result_of(settings)


def test_arms_stop_by_themselves_and_keep_their_best_epoch(settings, whole):
    arms = whole["report"]["arms"]
    ran = [len(scores) - 1 for a in arms for scores in a["accuracy_per_seed"]]
    kept = [e for a in arms for e in a["kept_epochs"]]
    assert len(set(ran)) > 1 and any(k < r for k, r in zip(kept, ran, strict=True))
    for a in arms:
        for k, (e, losses) in enumerate(zip(a["kept_epochs"], a["validation_loss_per_seed"], strict=True)):
            # patience 1: every epoch but a last one that stopped the arm improved
            assert losses.index(min(losses)) + 1 == e and len(losses) in (e, e + 1)
            assert len(a["losses"][k]) == len(losses) * (len(a["losses"][k]) // len(losses))
        after = [s[e] for s, e in zip(a["accuracy_per_seed"], a["kept_epochs"], strict=True)]
        assert a["accuracy_after"] == pytest.approx(sum(after) / 2)
    for end in whole["final"].values():
        for t in end.values():
            assert changed(t["weights"], t["best"]) == []
    assert whole["report"]["reload"]["fastpeft"] <= 1e-5
    text = (Path(settings.output) / "report.md").read_text()
    assert "Kept epoch per seed" in text and "took no part" in text and "interrupted" not in text


@pytest.mark.parametrize(
    ("place", "nth"),
    [
        ("updated", 9),  # within an epoch, between two saves
        ("epoch", 4),  # evaluated, nothing saved
        ("adapter", 2),  # the adapter's weights are new, its config is not
        ("rename", 5),  # a new state lies beside the old one
        ("renamed", 6),
        ("report", 1),
    ],
)
def test_stopped_and_resumed_it_is_the_same(tmp_path, settings, whole, place, nth):
    mine = at(settings, tmp_path)
    go(mine, kill=(place, nth))
    assert (tmp_path / "out" / STATE).exists()
    go(mine, again=True)
    assert changed(result_of(mine), whole) == []


@pytest.mark.accept
def test_a_run_stopped_again_and_again(tmp_path, settings, whole):
    """Each process does three steps of each arm and dies, now and then before its first save."""
    mine, deaths = at(settings, tmp_path), 0
    go(mine, kill=("forward", 5))
    while deaths < 200:
        try:
            go(mine, kill=("forward", 10 if deaths % 3 else 2), again=True)
        except pytest.fail.Exception:
            break  # it came to its end
        deaths += 1
    assert deaths > 5 and changed(result_of(mine), whole) == []
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(figures["session_seconds"]) > 5 and figures["wall_seconds"] == sum(figures["session_seconds"])
    assert any(figures["arms"][0]["resumed_at_steps"])
    assert "interrupted and resumed" in (tmp_path / "out" / "report.md").read_text()


@pytest.fixture(scope="module")
def streams(settings, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A training that draws from unbroken streams: what it leaves, and the folder of the same one, stopped in its second
    seed, after an epoch."""
    folder = tmp_path_factory.mktemp("streams")
    kept, stopped = at(settings, folder / "a"), at(settings, folder / "b")
    go(kept, streams=True)
    go(stopped, kill=("epoch", 20), streams=True)
    state = statefile.read(folder / "b" / "out")
    assert len(state["results"]["fastpeft"]["losses"]) == 1 and state["trainees"]["frozen"]["stopping"]["losses"]
    return result_of(kept), folder / "b"


SLOW = [pytest.param(part, marks=pytest.mark.accept) for part in ("optimizer", "weights", "stopping", "losses")]


@pytest.mark.parametrize("forgotten", [None, "rng", "best", *SLOW])
def test_every_part_of_the_state_counts(tmp_path, settings, streams, forgotten):
    """Resumed, it is the same; and it is not, if one part of the state is not restored."""
    shutil.copytree(streams[1], tmp_path / "copy")
    stopped = at(settings, tmp_path / "copy")
    real = snapshot.into_trainee

    def forget(t: Any, saved: dict[str, Any]) -> None:
        real(t, saved | {forgotten: snapshot.of_trainee(t)[forgotten]})

    with ExitStack() as stack:
        if forgotten == "rng":
            stack.enter_context(mock.patch.object(rng, "restore", lambda state: None))
        elif forgotten:
            stack.enter_context(mock.patch.object(snapshot, "into_trainee", forget))
        try:
            go(stopped, again=True, streams=True)
            found = changed(result_of(stopped), streams[0])
        except (AssertionError, ValueError) as e:  # ValueError: no report can be made of what is left
            found = [repr(e)]
    assert (found == []) is (forgotten is None), found


def test_a_language_model_in_bfloat16(tmp_path):
    """Its frozen arm has nothing to train and no optimiser; nothing stops early."""
    model, _ = tiny_model(tmp_path, "gpt2")
    data = write_rows(tmp_path / "rows.csv", [(f"{WORDS[k]} {' '.join(WORDS[k % 3 :: 3])}", "x") for k in range(24)])
    settings = Settings(
        model=str(model), data=str(data), task="causal-lm", options={"rank": 2}, epochs=2, batch_size=8, max_length=12,
        dtype="bfloat16", threads=1, save_every=1,
    )  # fmt: skip
    kept, stopped = at(settings, tmp_path / "a"), at(settings, tmp_path / "b")
    go(kept)
    go(stopped, kill=("backward", 9))
    go(stopped, again=True)
    assert changed(result_of(stopped), result_of(kept)) == []


@pytest.mark.parametrize("place, nth", [("forward", 16), ("updated", 15), ("forward", 27)])
def test_a_method_with_a_procedure(tmp_path, settings, place, nth):
    """Stopped while RoSA collects gradients, and after its masks; both arms of each step are counted."""
    options = {"rank": 2, "alpha": 4, "density": 0.1}
    schedule = {"schedule": "wl3", "grads": 4, "sparse_lr": 2e-2}
    mine = at(
        settings, tmp_path / "a", method="rosa", options=options, seeds=(0,), patience=None, save_every=1, procedure_options=schedule
    )
    stopped = at(mine, tmp_path / "b")
    go(mine)
    go(stopped, kill=(place, nth))
    state = statefile.read(Path(stopped.output))["trainees"]["fastpeft"]["runner"]
    assert state["step"] and bool(state["procedures"]["0.RoSASchedule"]["sums"]) is (state["step"] < 7)
    go(stopped, again=True)
    assert changed(result_of(stopped), result_of(mine)) == []
    from safetensors.torch import load_file

    adapter = load_file(tmp_path / "b" / "out" / "adapter" / "adapter_model.safetensors")
    assert any(bool(t.any()) for k, t in adapter.items() if k.endswith("rosa.values"))


def test_an_arm_whose_procedure_is_done_takes_no_further_step(tmp_path, settings):
    """RoSA's masks after 5 steps, for a run that starts again with them; the other arms train on."""
    schedule = {"schedule": "wl3", "grads": 2, "after": "save"}
    mine = at(settings, tmp_path, method="rosa", options={"rank": 2, "density": 0.1}, seeds=(0,), patience=None, procedure_options=schedule)
    go(mine)
    arms = {a["name"]: a for a in json.loads((tmp_path / "out" / "report.json").read_text())["arms"]}
    steps = {name: len(arm["losses"][0]) for name, arm in arms.items()}
    assert steps == {"frozen": 24, "peft": 24, "fastpeft": 5}
    # stopped within the epoch in which it was done: 5 steps of three arms, and then the next call
    stopped = at(mine, tmp_path / "b", save_every=1)
    go(at(mine, tmp_path / "a", save_every=1))
    go(stopped, kill=("forward", 16))
    go(stopped, again=True)
    assert changed(result_of(stopped), result_of(at(mine, tmp_path / "a"))) == []


def spec(settings: Settings, **more: Any) -> str:
    return json.dumps({"settings": settings.as_dict(), **more})


def run_killed(settings: Settings, place: str, nth: int, *, again: bool = False) -> None:
    """The job in a process of its own that gets a real SIGKILL."""
    done = subprocess.run(
        [sys.executable, __file__], input=spec(settings, kill=[place, nth], again=again), text=True,
        capture_output=True, check=False, env=child_environment(),
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def child_environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_kill_9_while_the_state_is_written(tmp_path, settings, whole):
    mine = at(settings, tmp_path)
    run_killed(mine, "write", 3)
    assert (tmp_path / "out" / STATE).exists() and (tmp_path / "out" / f".{STATE}.pending").exists()
    go(mine, again=True)
    assert changed(result_of(mine), whole) == []


@pytest.mark.accept
@pytest.mark.parametrize(
    "kills",
    [
        [("forward", 4)], [("backward", 7)], [("updated", 14)], [("epoch", 1)], [("epoch", 5)], [("adapter", 1)],
        [("write", 1), ("write", 2)], [("rename", 4)], [("renamed", 3), ("rename", 2), ("backward", 5)], [("removal", 1)],
    ],
    ids=str,
)  # fmt: skip
def test_kill_9_anywhere(tmp_path, settings, whole, kills):
    """Killed and resumed in processes of their own; killed before the first state there is nothing to resume."""
    mine = at(settings, tmp_path)
    for place, nth in kills:
        run_killed(mine, place, nth, again=(tmp_path / "out" / STATE).exists())
    finish(mine, again=(tmp_path / "out" / STATE).exists())
    assert changed(result_of(mine), whole) == []


@pytest.mark.accept
@pytest.mark.parametrize("draw", [1, 2])
def test_kill_9_at_random_moments(tmp_path, settings, whole, draw):
    """Killed from outside, at moments drawn after the state appeared, until it gets through."""
    mine, dice = at(settings, tmp_path, save_every=1), random.Random(draw)
    state, deaths = tmp_path / "out" / STATE, 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True, env=child_environment())
        was = state.stat().st_mtime_ns if state.exists() else 0
        process.stdin.write(spec(mine, again=bool(was), pause=0.05))
        process.stdin.close()
        while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > was):
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 1.5))
        process.kill()
        deaths += process.wait() == -signal.SIGKILL
        if not state.exists():
            break
    assert deaths >= 3
    finish(mine, again=state.exists())
    assert changed(result_of(mine), whole | {"report": whole["report"] | {"settings": whole["report"]["settings"] | {"save_every": 1}}}) == []


def finish(settings: Settings, *, again: bool) -> None:
    """The rest of the job, in a process of its own."""
    subprocess.run([sys.executable, __file__], input=spec(settings, again=again), text=True, check=True, env=child_environment())


# ---- what is refused


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, settings) -> Path:
    """A folder with a run that was stopped within its first seed, and its model and data."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(settings.model, folder / "bert")
    shutil.copy(settings.data, folder / "rows.csv")
    go(own(settings, folder), kill=("updated", 8))
    return folder


def own(settings: Settings, folder: Path, **changes: Any) -> Settings:
    return at(settings, folder, **({"model": str(folder / "bert"), "data": str(folder / "rows.csv")} | changes))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.03}, ["lr was 0.02 and is 0.03 now"]),
        ({"epochs": 9, "seeds": (0,)}, ["epochs was 4 and is 9 now", "seeds was [0, 1] and is [0] now"]),
        ({"options": {"rank": 3}}, ["options was {'rank': 2, 'alpha': 4, 'dropout': 0.1} and is {'rank': 3} now"]),
        ({"patience": None}, ["patience was 1 and is None now"]),
        ({"threads": 2}, ["threads was 1 and is 2 now"]),
        ({"method": "dora"}, ["method was 'lora' and is 'dora' now"]),
        ({"data": "other.csv"}, ["data was "]),
    ],
)
def test_other_settings_are_refused(settings, stopped, changes, words):
    before = files_of(stopped)
    with pytest.raises(JobError) as caught:
        job.finetune(own(settings, stopped, **changes), resume=True)
    assert caught.value.code == 2 and str(stopped / "out") in str(caught.value)
    assert all(w in str(caught.value) for w in [*words, "--output", "Nothing was changed"])
    assert files_of(stopped) == before


def test_other_data_are_refused(settings, stopped, tmp_path):
    before, rows = files_of(stopped), stopped / "rows.csv"
    text = rows.read_text()
    rows.write_text(text.rstrip("01\r\n") + "x\n")
    try:
        with pytest.raises(JobError, match=r"examples was sha256 .* now"):
            job.finetune(own(settings, stopped), resume=True)
    finally:
        rows.write_bytes(before["rows.csv"])
    assert files_of(stopped) == before


def test_another_model_is_refused(settings, stopped):
    before, weights = files_of(stopped), stopped / "bert" / "model.safetensors"
    data = bytearray(before["bert/model.safetensors"])
    data[-3] ^= 1
    weights.write_bytes(data)
    try:
        with pytest.raises(JobError, match=r"the model's weights was sha256 .* Nothing was changed"):
            job.finetune(own(settings, stopped), resume=True)
    finally:
        weights.write_bytes(before["bert/model.safetensors"])
    assert files_of(stopped) == before


def test_an_unfinished_run_is_not_overwritten(settings, stopped):
    before = files_of(stopped)
    with pytest.raises(JobError, match=r"holds an unfinished run .*--resume.*--restart.*--output"):
        job.finetune(own(settings, stopped, lr=0.5))
    assert files_of(stopped) == before


def test_a_moved_folder_is_resumed_and_a_restart_starts_anew(settings, stopped, tmp_path, whole):
    shutil.copytree(stopped, tmp_path / "moved")
    there = at(own(settings, stopped), tmp_path / "moved", save_every=0)
    with light(tmp_path / "moved" / "final"):
        job.finetune(there, restart=True)
    assert changed(result_of(there)["final"], whole["final"]) == []
    shutil.copy(stopped / "out" / STATE, tmp_path / "moved" / "out")
    go(there, again=True)
    assert changed(result_of(there)["final"], whole["final"]) == []


def test_a_finished_run_says_so_and_changes_nothing(settings, whole):
    folder = Path(settings.output)
    before = files_of(folder)
    with pytest.raises(Finished, match="is finished; there is nothing to resume") as caught:
        job.finetune(settings, resume=True)
    assert caught.value.code == 0
    with pytest.raises(JobError, match=r"lr was 0\.02 and is 0\.5 now"):
        job.finetune(at(settings, folder.parent, lr=0.5), resume=True)
    assert files_of(folder) == before


def test_nothing_to_resume(settings, tmp_path):
    with pytest.raises(JobError, match="holds no unfinished run"):
        job.finetune(at(settings, tmp_path), resume=True)
    (tmp_path / "out" / "report.json").write_text("[]")
    with pytest.raises(JobError, match="holds no unfinished run"):
        job.finetune(at(settings, tmp_path), resume=True)


def test_a_full_disk_leaves_the_last_state(settings, tmp_path, whole):
    mine, real = at(settings, tmp_path), files.sync_write

    def full(path: Path, data: bytes) -> None:
        if path.name == f".{STATE}.pending" and any((tmp_path / "out" / "adapter").glob("*.safetensors")):
            raise OSError(28, "No space left on device")
        real(path, data)

    with mock.patch.object(files, "sync_write", full), pytest.raises(JobError, match=r"No space left.*--resume continues"):
        go(mine)
    assert not (tmp_path / "out" / f".{STATE}.pending").exists()
    go(mine, again=True)
    assert changed(result_of(mine), whole) == []


def _child() -> None:
    given = json.load(sys.stdin)
    fields = given["settings"]
    settings = Settings(**(fields | {k: tuple(fields[k]) for k in ("seeds", "target_modules", "procedures")}))
    torch.manual_seed(4)
    with ExitStack() as stack:
        stack.enter_context(light(Path(settings.output).parent / "final", pause=given.get("pause", 0.0)))
        if "kill" in given:
            stack.enter_context(dying(*given["kill"], kill_self))
        job.finetune(settings, resume=given["again"])


if __name__ == "__main__":
    _child()
