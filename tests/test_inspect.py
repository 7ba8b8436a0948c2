"""fastpeft inspect: what a folder or file holds, counted from the model that was saved."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checks import perturb
from safetensors.torch import load_file, save_file
from torch import nn

import fastpeft
from fastpeft.cli import main
from fastpeft.inspection import inspect


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 6), "up1": nn.Linear(6, 16)}) for _ in range(3))})


@pytest.mark.parametrize("name", ["lora", "lokr", "melora", "lotr", "dora"])
def test_counts_and_norms(name, tmp_path):
    net = model()
    fastpeft.adapt(net, name, rank=2)
    perturb(net)
    fastpeft.save_adapter(net, tmp_path)
    found, file = inspect(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert found.numbers == sum(t.numel() for t in file.values())
    assert found.size == sum(t.numel() * t.element_size() for t in file.values())
    assert sum(k.count for k in found.tensors) == len(file) and not any(k.broken for k in found.tensors)
    total = sum(k.size * k.count for k in found.tensors)
    assert total == pytest.approx(sum(float(t.double().norm()) for t in file.values()))
    assert f"written by fastpeft as {name}" in str(found)
    if name in ("lora", "dora"):
        assert {(k.module, k.leaf, k.count) for k in found.tensors} >= {("h.*.q", "lora_A.weight", 3), ("h.*.up1", "lora_B.weight", 3)}
        assert found.kind == "LORA" and found.config["r"] == 2


def test_what_is_zero_or_broken_is_said(tmp_path, capsys):
    net = model()
    fastpeft.adapt(net, "lora", rank=2)
    fastpeft.save_adapter(net, tmp_path)
    zeros = {k.leaf: k.zeros for k in inspect(tmp_path).tensors}
    assert zeros == {"lora_A.weight": 0, "lora_B.weight": 3}
    file = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in file if "lora_A" in k)
    file[key][0, 0] = math.nan
    save_file(file, tmp_path / "adapter_model.safetensors")
    assert sum(k.broken for k in inspect(tmp_path).tensors) == 1 and "1 with NaN or Inf" in str(inspect(tmp_path))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "LORA"
    save_file({"lora_unet_a_b.lora_down.weight": torch.ones(2, 3), "lora_unet_a_b.alpha": torch.ones(())}, tmp_path / "k.safetensors")
    found = inspect(tmp_path / "k.safetensors")
    assert found.kind == "file" and [(k.module, k.leaf, k.shapes) for k in found.tensors] == [
        ("lora_unet_a_b", "alpha", [[]]), ("lora_unet_a_b", "lora_down.weight", [[2, 3]])
    ]  # fmt: skip


def test_bad_input(tmp_path, capsys):
    for path in (tmp_path / "none", tmp_path):
        assert main(["inspect", str(path)]) == 2
        assert capsys.readouterr().err.startswith("error: inspect: ")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 2
    assert "no readable safetensors" in capsys.readouterr().err
