"""Adapter folders of six methods, and the ways to damage one: KINDS, name -> Kind."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastpeft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TARGETS = ["body.0", "body.2"]


class Net(nn.Module):
    """Flags and modes differ from layer to layer, so that what puts them back all alike is seen."""

    def __init__(self, width: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.body[2].weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


class Other(nn.Module):
    """Another architecture: no module of Net's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(12, 16), nn.Linear(16, 8)


@dataclass(frozen=True)
class Source:
    """How a folder comes about.   method, options: fastpeft's.   stock: PEFT's config class and fields, where stock PEFT writes it.

    rank, number: config fields (a path into nested ones) of the rank, and of a number that scales or seeds.
    flag: of one that is true or false.   converts: whether `fastpeft convert` takes it.
    """

    method: str
    options: dict[str, Any]
    rank: tuple[str, ...]
    number: tuple[str, ...]
    flag: tuple[str, ...] | None = None
    stock: tuple[str, dict[str, Any]] | None = None
    converts: bool = False

    def write(self, folder: Path, model: nn.Module, targets: list[str]) -> None:
        generator = torch.Generator().manual_seed(1)
        if self.stock is None:
            fastpeft.adapt(model, self.method, target_modules=targets, **self.options)
        else:
            import peft

            name, fields = self.stock
            model = peft.get_peft_model(model, getattr(peft, name)(target_modules=targets, **fields))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn(p.shape, generator=generator))
        if self.stock is None:
            fastpeft.save_adapter(model, folder)
        else:
            model.save_pretrained(folder)


SOURCES = {
    "peft_lora": Source("lora", {"rank": 3, "alpha": 5}, ("r",), ("lora_alpha",), ("use_rslora",), ("LoraConfig", {"r": 3, "lora_alpha": 5}), True),
    "dora": Source("dora", {"rank": 2, "alpha": 3}, ("r",), ("lora_alpha",), ("use_dora",), None, True),
    "peft_lokr": Source("lokr", {"rank": 1, "alpha": 3}, ("r",), ("alpha",), ("decompose_both",), ("LoKrConfig", {"r": 1, "alpha": 3}), True),
    "adalora": Source("adalora", {"rank": 3, "alpha": 5}, ("init_r",), ("lora_alpha",)),
    "hydralora": Source("hydralora", {"rank": 2, "heads": 2, "modules_to_save": ["head"]}, ("options", "rank"), ("options", "alpha")),
    "shira": Source("random_masking", {"rank": 1, "seed": 5}, ("r",), ("random_seed",)),
}


@dataclass(frozen=True)
class Kind:
    """act(folder, source) damages it and returns a regex that the message must hold; None where the folder has no such thing.

    file: no reader can make sense of it; otherwise what the folder holds is wrong, and `fastpeft inspect` may show it.
    alone: methods of which it is seen without a model, so that `fastpeft convert` refuses it too.   error: what is raised.
    """

    act: Callable[[Path, Source], str | None]
    file: bool = False
    alone: tuple[str, ...] = ("lora", "dora", "lokr")
    error: type[Exception] = fastpeft.CheckpointError


KINDS: dict[str, Kind] = {}


def kind(**how: Any) -> Callable[[Callable[[Path, Source], str | None]], Any]:
    def add(act: Callable[[Path, Source], str | None]) -> Any:
        KINDS[act.__name__] = Kind(act, **how)
        return act

    return add


# ---- the weights as a file


@kind(file=True, error=FileNotFoundError)
def weights_absent(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).unlink()
    return WEIGHTS


@kind(file=True)
def weights_of_no_byte(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).write_bytes(b"")
    return WEIGHTS


@kind(file=True)
def header_cut_short(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:40])
    return WEIGHTS


@kind(file=True)
def body_cut_short(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    return WEIGHTS


@kind(file=True)
def bytes_after_the_end(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0" * 64)
    return WEIGHTS


@kind(file=True)
def header_longer_than_the_file(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + (folder / WEIGHTS).read_bytes()[8:])
    return WEIGHTS


@kind(file=True)
def header_shorter_than_it_is(folder: Path, source: Source) -> str:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((int.from_bytes(data[:8], "little") - 8).to_bytes(8, "little") + data[8:])
    return WEIGHTS


@kind(file=True)
def header_lists_a_tensor_twice(folder: Path, source: Source) -> str:
    head, body = _split(folder)
    _, key = target(folder)
    entry = json.dumps(json.loads(head)[key])
    _join(folder, head.rstrip().removesuffix("}") + f',"{key}":{entry}}}', body)
    return re.escape(key)


@kind(file=True)
def weights_are_a_directory(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    return "directory"


@kind(file=True, error=FileNotFoundError)
def weights_are_a_dangling_link(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone.safetensors")
    return "gone.safetensors"


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@kind(file=True)
def pickle_in_their_place(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).unlink()
    torch.save({"x": torch.ones(2), "bomb": Bomb(folder / "exploded")}, folder / "adapter_model.bin")
    return "adapter_model.bin"


@kind(file=True)
def pickle_under_their_name(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    return WEIGHTS


@kind(file=True)
def unreadable(folder: Path, source: Source) -> str:
    (folder / WEIGHTS).chmod(0)
    return WEIGHTS


# ---- the config as a file


@kind(file=True, error=FileNotFoundError)
def config_absent(folder: Path, source: Source) -> str:
    (folder / CONFIG).unlink()
    return CONFIG


def _text(folder: Path, text: str) -> None:
    """Such a config, with the weights' header agreeing where fastpeft wrote it: what is judged is the text, not the mismatch."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        header = file.metadata() or {}
    if "adapter_config" in header:
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, header | {"adapter_config": text})
    (folder / CONFIG).write_text(text)


@kind(file=True)
def config_empty(folder: Path, source: Source) -> str:
    _text(folder, "")
    return CONFIG


@kind(file=True)
def config_cut_short(folder: Path, source: Source) -> str:
    _text(folder, (folder / CONFIG).read_text()[:-10])
    return CONFIG


@kind(file=True)
def config_a_list(folder: Path, source: Source) -> str:
    _text(folder, "[1, 2]")
    return CONFIG


@kind(file=True)
def config_nested_without_end(folder: Path, source: Source) -> str:
    _text(folder, "[" * 200_000)
    return CONFIG


@kind(file=True)
def config_with_a_key_twice(folder: Path, source: Source) -> str:
    _text(folder, '{"target_modules": ["body.0"],' + (folder / CONFIG).read_text().lstrip()[1:])
    return "target_modules"


@kind(file=True)
def config_a_directory(folder: Path, source: Source) -> str:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    return "directory"


@kind(file=True, error=FileNotFoundError)
def config_a_dangling_link(folder: Path, source: Source) -> str:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(folder / "gone.json")
    return "gone.json"


@kind(file=True)
def header_with_another_config(folder: Path, source: Source) -> str:
    """Garbage in the copy that the header holds; PEFT's files get one too, which then is no mark of ours alone."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        header = file.metadata() or {}
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, header | {"adapter_config": "{"})
    return WEIGHTS


# ---- what the config says


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def edit(folder: Path, path: tuple[str, ...], value: Any) -> None:
    config = config_of(folder)
    inner = config
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    _text(folder, json.dumps(config))


@kind(file=True)
def no_peft_type(folder: Path, source: Source) -> str:
    config = config_of(folder)
    del config["peft_type"]
    _text(folder, json.dumps(config))
    return "peft_type"


@kind()
def unknown_peft_type(folder: Path, source: Source) -> str:
    edit(folder, ("peft_type",), "NO_SUCH")
    return "NO_SUCH"


@kind(file=True)
def peft_type_a_list(folder: Path, source: Source) -> str:
    edit(folder, ("peft_type",), ["LORA"])
    return "peft_type"


@kind()
def unknown_field(folder: Path, source: Source) -> str:
    edit(folder, ("from_the_future",), 3)
    return "from_the_future"


@kind()
def rank_a_text(folder: Path, source: Source) -> str:
    edit(folder, source.rank, "two")
    return "rank"


@kind()
def rank_negative(folder: Path, source: Source) -> str:
    edit(folder, source.rank, -1)
    return "rank"


@kind()
def rank_a_fraction(folder: Path, source: Source) -> str:
    edit(folder, source.rank, 1.5)
    return "rank"


@kind()
def rank_not_the_files(folder: Path, source: Source) -> str:
    """Another one that the layers could have."""
    edit(folder, source.rank, 4 if source.method != "lokr" else 2)
    return f"'rank': |{re.escape(target(folder)[1])}|lokr_w2"


@kind()
def scale_a_text(folder: Path, source: Source) -> str:
    edit(folder, source.number, "much")
    return "much"


@kind()
def scale_not_a_number(folder: Path, source: Source) -> str:
    edit(folder, source.number, float("nan"))
    return source.number[-1].removeprefix("lora_").removeprefix("random_")


@kind()
def scale_beyond_every_float(folder: Path, source: Source) -> str:
    edit(folder, source.number, 10**400)
    return source.number[-1].removeprefix("lora_").removeprefix("random_")


@kind()
def flag_a_text(folder: Path, source: Source) -> str | None:
    if source.flag is None:
        return None
    edit(folder, source.flag, "false")
    return source.flag[-1]


@kind()
def targets_that_match_nothing(folder: Path, source: Source) -> str:
    edit(folder, ("target_modules",), ["nowhere"])
    return "nowhere"


@kind()
def targets_excluded(folder: Path, source: Source) -> str | None:
    if source.method == "hydralora":
        return None
    edit(folder, ("exclude_modules",), TARGETS[1:])
    return r"body\.2"


@kind()
def targets_fewer_than_the_files(folder: Path, source: Source) -> str:
    edit(folder, ("target_modules",), TARGETS[:1])
    return "body.2"


@kind()
def targets_a_number(folder: Path, source: Source) -> str:
    edit(folder, ("target_modules",), 7)
    return "target_modules"


@kind()
def targets_no_regex(folder: Path, source: Source) -> str:
    edit(folder, ("target_modules",), "body.(0")
    return "target_modules"


@kind()
def pattern_a_list(folder: Path, source: Source) -> str:
    edit(folder, ("rank_pattern",), ["body.2"])
    return "rank_pattern"


@kind()
def modules_to_save_that_are_not_there(folder: Path, source: Source) -> str:
    edit(folder, ("modules_to_save",), ["nowhere"])
    return "nowhere"


# ---- the tensors


def target(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The file's tensors, and the first that is a matrix with unequal sides and no module's own."""
    tensors = load_file(folder / WEIGHTS)
    return tensors, next(k for k, t in sorted(tensors.items()) if "body" in k and t.dim() == 2 and t.shape[0] != t.shape[1])


def floating(folder: Path) -> tuple[dict[str, Tensor], str]:
    tensors = load_file(folder / WEIGHTS)
    return tensors, next(k for k, t in sorted(tensors.items()) if "body" in k and t.is_floating_point() and t.dim() and "dora_scale" not in k)


def put(folder: Path, tensors: dict[str, Tensor]) -> None:
    with safe_open(folder / WEIGHTS, "pt") as file:
        header = file.metadata()
    save_file(tensors, folder / WEIGHTS, header)


def change(of: Callable[[Path], tuple[dict[str, Tensor], str]], make: Callable[[Tensor], Tensor]) -> Callable[[Path, Source], str]:
    def act(folder: Path, source: Source) -> str:
        tensors, key = of(folder)
        put(folder, tensors | {key: make(tensors[key]).contiguous()})
        return re.escape(key)

    return act


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def make(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[-1] = value
        return t

    return make


@kind()
def tensor_absent(folder: Path, source: Source) -> str:
    tensors, key = floating(folder)
    del tensors[key]
    put(folder, tensors)
    return re.escape(key)


@kind()
def tensor_too_many(folder: Path, source: Source) -> str:
    put(folder, load_file(folder / WEIGHTS) | {f"{PREFIX}body.7.lora_A.weight": torch.ones(2, 3)})
    return r"body\.7\.lora_"


@kind()
def tensor_renamed(folder: Path, source: Source) -> str:
    tensors, key = floating(folder)
    put(folder, {re.sub(r"body(.)0", r"body\1zero", k) if k == key else k: t for k, t in tensors.items()})
    return "body.zero"


@kind()
def no_tensor(folder: Path, source: Source) -> str:
    put(folder, {})
    return "" if source.converts else "body.0"


KINDS |= {
    "tensor_of_another_shape": Kind(change(target, lambda t: torch.cat([t, t])), alone=("lora", "dora")),
    "tensor_transposed": Kind(change(target, lambda t: t.t()), alone=("lora", "dora")),
    "tensor_without_a_dimension": Kind(change(target, lambda t: t.flatten()[0])),
    "tensor_of_no_element": Kind(change(target, lambda t: t[:0])),
    "tensor_of_integers": Kind(change(floating, lambda t: t.to(torch.int32))),
    "tensor_of_truth_values": Kind(change(floating, lambda t: t > 0)),
    "tensor_in_fp8": Kind(change(floating, lambda t: t.to(torch.float8_e4m3fn))),
    "tensor_complex": Kind(change(floating, lambda t: t.to(torch.complex64))),
    "tensor_of_mixed_width": Kind(change(floating, lambda t: t.to(torch.bfloat16))),
    "tensor_wider_than_the_model": Kind(change(floating, lambda t: t.double())),
    "tensor_with_nan": Kind(change(floating, spoilt(float("nan")))),
    "tensor_with_inf": Kind(change(floating, spoilt(float("-inf")))),
}


@kind()
def tensor_in_fp4(folder: Path, source: Source) -> str:
    """Whose file safetensors reads and whose numbers torch does not."""
    head, body = _split(folder)
    key, entries = floating(folder)[1], json.loads(head)
    entries[key] |= {"dtype": "F4", "shape": [8 * math.prod(entries[key]["shape"])]}
    _join(folder, json.dumps(entries), body)
    return f"{key}|variant"  # safetensors of before F4


# ---- whole, and of another model


@kind(alone=())
def of_a_wider_model(folder: Path, source: Source) -> str:
    shutil.rmtree(folder)
    source.write(folder, Net(width=14), TARGETS)
    return "body.0"


@kind(alone=())
def of_another_architecture(folder: Path, source: Source) -> str:
    shutil.rmtree(folder)
    without = {k: v for k, v in source.options.items() if k != "modules_to_save"}
    Source(source.method, without, source.rank, source.number, stock=source.stock).write(folder, Other(), ["query", "value"])
    return "query"


def _split(folder: Path) -> tuple[str, bytes]:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size].decode(), data[8 + size :]


def _join(folder: Path, head: str, body: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(head.encode()).to_bytes(8, "little") + head.encode() + body)


