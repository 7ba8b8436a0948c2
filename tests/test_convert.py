"""fastpeft convert: folders of PEFT as files of kohya and LyCORIS, which LyCORIS itself reads alike, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checks import perturb
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft import CheckpointError
from fastpeft.cli import main
from fastpeft.integrations.to_lycoris import to_lycoris

pytest.importorskip("lycoris")
pytest.importorskip("peft")
import peft
from lycoris import create_lycoris_from_weights
from test_loha import double
from test_lycoris_files import bert
from test_peft_io import logits
from tolerance import assert_fp64

CASES = {
    "lora": ("lora", {"rank": 3, "alpha": 5}),
    "rslora, patterns": ("lora", {"rank": 4, "alpha": 2, "rslora": True, "rank_pattern": {"query": 2}, "alpha_pattern": {"1.attention.self.value": 9}}),
    "dora": ("dora", {"rank": 2, "alpha": 5}),
    "loha": ("loha", {"rank": 3, "alpha": 4, "rank_pattern": {"key": 2}}),
    "lokr": ("lokr", {"rank": 2, "alpha": 3}),
    "lokr, whole": ("lokr", {"rank": 64, "alpha": 16}),
    "lokr, both halves": ("lokr", {"rank": 1, "alpha": 3, "decompose_both": True}),
}


def saved(case: str, folder: Path) -> torch.nn.Module:
    method, options = CASES[case]
    model = bert()
    fastpeft.adapt(model, method, **options)
    perturb(model)
    fastpeft.save_adapter(model, folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_folder_becomes_a_file_of_the_same_adapter(case, tmp_path):
    model = saved(case, tmp_path / "a")
    layers = to_lycoris(tmp_path / "a", tmp_path / "a.safetensors")
    want, ours, theirs = logits(model), bert(), bert()
    assert len(layers) == 13 and (want - logits(ours)).abs().max() > 1e-2
    fastpeft.load_adapter(ours, tmp_path / "a.safetensors")
    assert_fp64(logits(ours), want)
    with double():
        net, _ = create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), theirs)
    net.apply_to()
    if case == "dora":  # whose magnitudes LyCORIS reads in fp32
        assert (logits(theirs) - want).abs().max() < 1e-5 * want.abs().max()
    else:
        assert_fp64(logits(theirs), want)


def test_and_back_where_peft_reads_it(tmp_path, capsys):
    model = saved("rslora, patterns", tmp_path / "a")
    bert().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--prefix", "lora_te"]
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a.safetensors"), "--prefix", "lora_te"]) == 0
    assert all(k.startswith("lora_te_bert_encoder") or "pooler" in k for k in load_file(tmp_path / "a.safetensors"))
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b"), *arguments]) == 0
    assert "13 layers" in capsys.readouterr().out
    again = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "b"))
    assert_fp64(logits(again), logits(model))


def test_what_a_file_has_no_place_for_is_refused(tmp_path, capsys):
    saved("lora", tmp_path / "a")
    weights, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())

    def changed(**more):
        save_file({k: v for k, v in (tensors | more).items() if v is not None}, weights)

    target = tmp_path / "t.safetensors"
    target.write_bytes(b"kept")
    for more, words in (
        ({"base_model.model.classifier.weight": torch.ones(3, 32)}, "no place for: base_model.model.classifier.weight"),
        ({"base_model.model.bert.pooler.dense.lora_B.bias": torch.ones(32)}, "no place for: .*lora_B.bias"),
        ({"base_model.model.conv.lora_A.weight": torch.ones(3, 2, 1, 1)}, "no place for: .*conv"),
        (dict.fromkeys(tensors), "holds no adapter"),
        ({"base_model.model.bert_pooler.dense.lora_A.weight": torch.ones(3, 32), "base_model.model.bert_pooler.dense.lora_B.weight": torch.ones(32, 3)},
         r"bert.*pooler.dense and bert.*pooler.dense of .* have one name"),
    ):  # fmt: skip
        changed(**more)
        with pytest.raises(CheckpointError, match=words):
            to_lycoris(tmp_path / "a", target)
    changed()
    config.write_text(json.dumps(fields | {"peft_type": "VERA"}))
    with pytest.raises(CheckpointError, match=r"is VERA; .* LORA, LOHA, LOKR"):
        to_lycoris(tmp_path / "a", target)
    assert target.read_bytes() == b"kept" and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    for arguments, words in (
        ([str(tmp_path / "none"), "b"], "no such file or folder"),
        ([str(tmp_path / "a"), str(tmp_path / "b")], "name one that ends in .safetensors"),
        ([str(target), str(tmp_path / "b")], "give the --model"),
        ([str(target), str(config), "--model", "x"], "is a file; a file becomes a folder"),
        ([str(target), str(tmp_path / "b"), "--model", str(tmp_path / "none")], "--model "),
    ):
        assert main(["convert", *arguments]) == 2
        assert words in capsys.readouterr().err
