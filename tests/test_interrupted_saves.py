"""A save that a SIGKILL or a full disk stops leaves the old checkpoint or the new one, and nothing of the two mixed."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damaged import CONFIG, SOURCES, TARGETS, WEIGHTS, Bomb, Net
from test_checkpoint_faults import shaken
from torch import nn

import fastpeft
from fastpeft.folder import replace_file
from fastpeft.job import statefile
from fastpeft.job.errors import JobError

transformers = pytest.importorskip("transformers")


def adapted(method: str, seed: int, rank: int) -> nn.Module:
    """Trained values of their own for each seed, in all that is saved; rank: so that a config of the other one would not fit."""
    model = Net()
    fastpeft.adapt(model, method, rank=rank, target_modules=TARGETS, modules_to_save=["head"])
    return shaken(model, seed)


def is_one_of(folder: Path, *models: nn.Module) -> int:
    """Which of the models the folder holds, to the last bit; fails where it is none of them."""
    fastpeft.load_adapter(loaded := Net(), folder)
    state = loaded.state_dict()
    same = [
        state.keys() == own.keys() and all(torch.equal(t, own[k]) for k, t in state.items()) for own in (m.state_dict() for m in models)
    ]
    assert sum(same) == 1, f"{folder} holds none of the checkpoints that were saved"
    return same.index(True)


class Writer:
    """A file whose every write says so first; where that is the end of it, half of the data is on the disk."""

    def __init__(self, file: Any, step: Callable[[str], None]):
        self.file, self.step = file, step

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.step("write")
        return half + self.file.write(data[half:])

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextlib.contextmanager
def at_call(at: int, end: Callable[[], None]) -> Iterator[list[str]]:
    """end() in place of call number `at` of those that change a disk: create, write, fsync, replace, mkdir. The list: the calls made."""
    made: list[str] = []

    def step(name: str) -> None:
        made.append(name)
        if len(made) - 1 == at:
            end()

    def guarded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step(name)
            return real(*args, **kwargs)

        return call

    real = builtins.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return real(path, mode, *args, **kwargs)
        step("create")
        return Writer(real(path, mode, *args, **kwargs), step)

    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(builtins, "open", opened)
        for name in ("fsync", "replace", "mkdir"):
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        yield made
    finally:
        patch.undo()


# ---- a SIGKILL


def survives(at: int, save: Callable[[], None]) -> bool:
    """save() in a process of its own that gets a SIGKILL at its call number `at`; False if it did."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), at_call(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            save()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def test_a_kill_during_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """At every call that changes the disk; each save finds what the kill before left, and saves the checkpoint that is not there."""
    models = adapted("lora", 1, 2), adapted("hydralora", 2, 3)
    fastpeft.save_adapter(models[0], tmp_path)
    (tmp_path / "README.md").write_text("of the user's")
    now, changes = 0, []
    for at in range(100):
        done = survives(at, lambda other=models[1 - now]: fastpeft.save_adapter(other, tmp_path))
        found = is_one_of(tmp_path, *models)
        changes.append(found != now)
        now = found
        if done:
            break
    assert changes[0] is False and changes[-1] is True and changes.count(True) > 2 and len(changes) > 8
    assert (tmp_path / "README.md").read_text() == "of the user's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_a_kill_during_the_save_of_a_state_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    statefile.write(tmp_path, {"step": -1, "values": torch.full((500,), -1.0)})
    steps = [-1]
    for at in range(100):
        new = {"step": at, "values": torch.full((500,), float(at))}
        done = survives(at, lambda new=new: statefile.write(tmp_path, new))
        found = statefile.read(tmp_path)
        assert found is not None and found["step"] in (steps[-1], at) and found["values"].eq(found["step"]).all()
        steps.append(found["step"])
        if done:
            break
    assert steps[1] == -1 and steps[-1] == at and len(steps) > 4


# ---- a full disk


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", ["fastpeft", "peft", "nothing"])
def test_a_full_disk_leaves_the_old_or_the_new(before: str, tmp_path: Path) -> None:
    """At every create, write, fsync, rename and mkdir of a save in turn; over a folder of ours, of stock PEFT, and where there is none."""
    folder, model = tmp_path / "a" / "b", adapted("hydralora", 2, 3)
    old = adapted("hydralora", 1, 2)
    if before == "peft":
        pytest.importorskip("peft")
        SOURCES["peft_lora"].write(folder, Net(), TARGETS)
        fastpeft.load_adapter(old := Net(), folder)
    for at in range(100):
        if before == "fastpeft":
            fastpeft.save_adapter(old, folder)
        with at_call(at, full) as made:
            try:
                fastpeft.save_adapter(model, folder)
                break
            except OSError as e:
                assert e.errno == errno.ENOSPC
        renamed = made[:-1].count("replace")
        if before == "nothing" and not renamed:
            assert not list(folder.glob("*")), "half a checkpoint where there was none"
            continue
        assert is_one_of(folder, old, model) == (renamed > 0)
        if not renamed:
            assert not [p.name for p in folder.iterdir() if p.name.startswith(".")], "leftovers take room on a full disk"
        if renamed and before != "fastpeft":
            break
    assert {"create", "write", "fsync", "replace"} <= set(made) and made.count("replace") == 2
    fastpeft.save_adapter(model, folder)
    assert is_one_of(folder, old, model) == 1 and not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    """replace_file, by which the states of jobs, of the Trainer's procedures, masks and posteriors are written."""
    path = tmp_path / "made" / "file"
    for at in range(100):
        if path.exists():
            path.write_bytes(b"old")
        with at_call(at, full) as made:
            try:
                replace_file(path, b"new and longer")
                break
            except OSError as e:
                assert e.errno == errno.ENOSPC
        if path.exists():
            assert path.read_bytes() == (b"new and longer" if "replace" in made[:-1] else b"old")
            assert [p.name for p in path.parent.iterdir()] == [path.name]
        elif path.parent.exists():
            assert not list(path.parent.iterdir())
            path.write_bytes(b"old")
    assert path.read_bytes() == b"new and longer" and made.count("replace") == 1


# ---- what is read again


def zip_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def no_byte(path: Path) -> None:
    path.write_bytes(b"")


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def running_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.parent / "exploded")))


def of_another_kind(path: Path) -> None:
    torch.save([1, 2], path)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [zip_cut, no_byte, one_bit, running_code, of_another_kind, a_directory]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_of_a_job_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    statefile.write(tmp_path, {"values": torch.ones(500)})
    damage(tmp_path / statefile.NAME)
    with pytest.raises(JobError, match=statefile.NAME) as caught:
        statefile.read(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "exploded").exists()


def test_a_state_that_would_run_code_is_refused_under_a_digest_of_its_own(tmp_path: Path) -> None:
    statefile.write(tmp_path, {"bomb": Bomb(tmp_path / "exploded")})
    with pytest.raises(JobError, match="cannot be continued") as caught:
        statefile.read(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d is not one_bit])
def test_a_damaged_state_of_procedures_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """The reader of ProcedureCallback, beside a checkpoint of the Trainer's (torch.save's zip has a checksum of its own, of parts)."""
    from fastpeft.integrations.transformers import ProcedureCallback

    (tmp_path / "checkpoint-3").mkdir()
    path = tmp_path / "checkpoint-3" / "fastpeft_procedures.pt"
    torch.save({"step": 3, "parameters": [], "runner": {"values": torch.ones(500)}}, path)
    damage(path)
    arguments = SimpleNamespace(output_dir=str(tmp_path), world_size=1, process_index=0)
    model = Net()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=f"{path.name} is damaged") as caught:
        warnings.simplefilter("ignore")  # torch's, about the pickle's protocol
        ProcedureCallback([])._read(arguments, SimpleNamespace(global_step=3), model, torch.optim.SGD(model.parameters()))
    assert not (tmp_path / "checkpoint-3" / "exploded").exists() and "\n" not in str(caught.value)
