"""Damaged adapter folders: every reader refuses each with a typed error that says what is wrong, and leaves the model bit-identical."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import KINDS, SOURCES, TARGETS, WEIGHTS, Kind, Net, Source, put
from safetensors.torch import load_file
from torch import nn

import fastpeft
from fastpeft.cli import main
from fastpeft.integrations.to_lycoris import to_lycoris

pytest.importorskip("peft")

# of a folder and of a lone file alike
OF_A_FILE = [k for k in KINDS if k.startswith(("header_cut", "header_longer", "header_lists", "body_cut", "bytes_after", "weights_of", "pickle_under"))]
OF_A_FILE += [k for k in KINDS if k.startswith("tensor_")]


class Watched:
    """A model, and everything of it that a failed load must leave alone."""

    def __init__(self, model: nn.Module):
        self.model, self.before = model, self.read(model)

    @staticmethod
    def read(model: nn.Module) -> dict[str, Any]:
        modules = dict(model.named_modules())
        return {
            "bits": {k: t.detach().contiguous().flatten().view(torch.uint8).clone() for k, t in model.state_dict().items()},
            "tensors": {k: id(t) for k, t in model.state_dict(keep_vars=True).items()},
            "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
            "training": {n: m.training for n, m in modules.items()},
            "classes": {n: type(m) for n, m in modules.items()},
            "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
            "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
            "random": torch.get_rng_state(),
        }

    def check(self, where: str) -> None:
        now = self.read(self.model)
        for what, old in self.before.items():
            new = now[what]
            if what == "bits":
                assert old.keys() == new.keys(), where
                changed = [k for k in old if not torch.equal(old[k], new[k])]
                assert not changed, f"{where}: {changed} changed"
            elif what == "random":
                assert torch.equal(old, new), f"{where}: the random generator moved"
            else:
                assert old == new, f"{where}: {what}: {old} became {new}"

    def refuses(self, read: Callable[[nn.Module], Any], error: type[Exception], word: str, where: str) -> None:
        """read(model) raises exactly `error`, in one paragraph that holds the regex `word`."""
        self.before["random"] = torch.get_rng_state()
        with pytest.raises(error) as caught:
            read(self.model)
        assert type(caught.value) is error, where
        check_said(str(caught.value), word, where)
        self.check(where)


def check_said(message: str, word: str, where: str) -> None:
    assert re.search(word, message), f"{where}: {word!r} is not in {message!r}"
    assert "\n" not in message.strip() and "Traceback" not in message and len(message) < 2000, f"{where}: {message!r}"


def adapted(source: Source) -> nn.Module:
    model = Net()
    fastpeft.adapt(model, source.method, target_modules=TARGETS, **source.options)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An undamaged folder of each source."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SOURCES}
    for name, source in SOURCES.items():
        source.write(folders[name], Net(), TARGETS)
    return folders


@pytest.mark.parametrize("name", SOURCES)
def test_whole_folders_pass_every_reader(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    source, folder = SOURCES[name], whole[name]
    bare, other = Net(), adapted(source)
    fastpeft.load_adapter(bare, folder)
    fastpeft.load_adapter(other, folder)
    x = torch.randn(3, 12)
    base, loaded = Net()(x), bare(x)
    assert torch.equal(loaded, other(x)) and (loaded - base).abs().max() > 1e-3
    assert main(["inspect", str(folder)]) == 0
    assert main(["convert", str(folder), str(tmp_path / "a.safetensors")]) == (0 if source.converts else 2)
    if source.method == "lora":
        fastpeft.adapt(Net(), "phatgoose", experts=[folder])
        fastpeft.load_adapter(again := Net(), tmp_path / "a.safetensors")
        assert torch.equal(again(x), loaded)
    Watched(fastpeft.unload(bare)).check("unloaded")
    pristine = Watched(Net())
    pristine.before |= {k: Watched.read(bare)[k] for k in ("tensors", "random")}
    pristine.model = bare
    pristine.check("after unload")


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_refuses_a_damaged_folder(kind: str, whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    bare, found = Watched(Net()), 0
    for name, source in SOURCES.items():
        folder = tmp_path / name
        shutil.copytree(whole[name], folder)
        word = KINDS[kind].act(folder, source)
        if word is None:
            continue
        found += 1
        error = KINDS[kind].error
        for how, watched in (("bare", bare), ("adapted", Watched(adapted(source)))):
            watched.refuses(lambda model, f=folder: fastpeft.load_adapter(model, f), error, word, f"{name}, {how}")
        if source.method == "lora":
            bare.refuses(lambda model, f=folder: fastpeft.adapt(model, "phatgoose", experts=[f]), error, word, f"{name}, experts")
        on_command_line(KINDS[kind], name, source, folder, word, capsys)
        assert not (folder / "exploded").exists(), "a pickle ran"
    assert found >= 3


def on_command_line(kind: Kind, name: str, source: Source, folder: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect refuses what nobody can read and shows the rest; convert refuses what is wrong without a model, and writes nothing."""
    code = main(["inspect", str(folder)])
    said = capsys.readouterr()
    if kind.file or code:
        assert code == 2 and not said.out, f"{name}, inspect"
        assert said.err.startswith("error: inspect: ")
        check_said(said.err, word, f"{name}, inspect")
    else:
        assert "numbers" in said.out and not said.err, f"{name}, inspect"
    target = folder.with_suffix(".safetensors")
    target.write_bytes(b"as it was")
    code = main(["convert", str(folder), str(target)])
    said = capsys.readouterr()
    if kind.file or source.method in kind.alone:
        assert code == 2, f"{name}, convert"
    if code and source.converts:
        assert said.err.startswith("error: convert: ")
        check_said(said.err, word, f"{name}, convert")
    if code:
        assert not said.out and target.read_bytes() == b"as it was", f"{name}, convert"
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("kind", OF_A_FILE)
def test_a_damaged_file_of_kohya_is_refused(kind: str, whole: dict[str, Path], tmp_path: Path) -> None:
    bare = Watched(Net())
    for name, source in SOURCES.items():
        if source.converts:
            folder = tmp_path / name
            folder.mkdir()
            to_lycoris(whole[name], folder / WEIGHTS)
            word = KINDS[kind].act(folder, source)
            assert word is not None
            word = r"body[._]0" if "body_0" in word else word  # its messages may name the layer, and then the leaf
            bare.refuses(lambda model, f=folder: fastpeft.load_adapter(model, f / WEIGHTS), fastpeft.CheckpointError, word, name)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("leaf", ["alpha", "dora_scale"])
def test_an_alpha_and_a_magnitude_of_no_number_are_refused(leaf: str, dtype: torch.dtype, whole: dict[str, Path], tmp_path: Path) -> None:
    to_lycoris(whole["dora"], tmp_path / WEIGHTS)
    tensors = load_file(tmp_path / WEIGHTS)
    put(tmp_path, tensors | {f"lycoris_body_0.{leaf}": tensors[f"lycoris_body_0.{leaf}"].to(dtype)})
    load = lambda model: fastpeft.load_adapter(model, tmp_path / WEIGHTS)  # noqa: E731
    Watched(Net()).refuses(load, fastpeft.CheckpointError, f"lycoris_body_0[.:] ?{leaf}", leaf)


def test_a_hundred_folders_and_twenty_kinds() -> None:
    assert len(KINDS) >= 20 and len(SOURCES) >= 5 and len(KINDS) * len(SOURCES) >= 100
