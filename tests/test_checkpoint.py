"""Adapter folders: round trips, both directions with stock PEFT, bad files, interrupted saves."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastpeft
from fastpeft import checkpoint, folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2, n_positions=32)).eval()


IDS = torch.arange(20).view(2, 10)
ADAPT = {
    "lora": ("lora", {"rank": 3, "alpha": 7}),
    "rslora": ("lora", {"rank": 3, "alpha": 7, "rslora": True, "lora_bias": True, "exclude_modules": ["pooler.dense"]}),
    "pattern": ("lora", {"rank": 3, "rank_pattern": {"query": 2}, "alpha_pattern": {"key": 5}}),
    "bias": ("lora", {"rank": 2, "bias": "all"}),
    "lora_only": ("lora", {"rank": 2, "bias": "lora_only", "target_modules": ["query", "dense"]}),
    "dora": ("dora", {"rank": 3, "alpha": 7}),
    "melora": ("melora", {"rank": 2, "n": 2}),
    "both": (["lora", "melora"], {"rank": 2}),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(make, method, options, **more):
    """An adapted model whose every trainable tensor was moved."""
    model = make()
    fastpeft.adapt(model, method, **options, **more)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("case", ADAPT)
def test_round_trip(case, tmp_path):
    method, options = ADAPT[case]
    model = trained(bert, method, options, modules_to_save=["classifier"])
    fastpeft.save_adapter(model, tmp_path)
    fresh = bert()
    fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model)) and not torch.equal(logits(fresh), logits(bert()))
    fastpeft.load_adapter(model, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("case", [c for c in ADAPT if c not in ("melora", "both")])
def test_folder_loads_in_stock_peft(case, tmp_path, quiet):
    from peft import PeftModel

    method, options = ADAPT[case]
    model = trained(bert, method, options, modules_to_save=["classifier"])
    fastpeft.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_conv1d_folder_loads_in_stock_peft(method, tmp_path, quiet):
    from peft import PeftModel

    model = trained(gpt2, method, {"rank": 3, "alpha": 7})
    fastpeft.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


PEFT = {
    "lora": {"target_modules": ["query", "value"]},
    "regex": {"target_modules": r".*\.(key|dense)", "exclude_modules": ["pooler.dense"]},
    "all-linear": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "rslora": {"target_modules": ["query"], "use_rslora": True, "lora_bias": True},
    "pattern": {"target_modules": ["query", "key"], "rank_pattern": {"key": 2}, "alpha_pattern": {"layer.1.*query": 3}},
    "bias": {"target_modules": ["query"], "bias": "all"},
    "lora_only": {"target_modules": ["query"], "bias": "lora_only"},
    "head": {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    "dora": {"target_modules": ["query", "dense"], "use_dora": True},
}


@pytest.mark.parametrize("case", PEFT)
def test_peft_folder_loads(case, tmp_path):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(bert(), LoraConfig(r=4, lora_alpha=6, **PEFT[case])).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    ours = bert()
    fastpeft.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    assert not torch.equal(logits(ours), logits(bert()))


def test_a_peft_config_is_a_method():
    from peft import LoraConfig

    model = bert()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query"], use_dora=True, modules_to_save=["classifier"])
    report = fastpeft.adapt(model, config)
    assert len(report.adapted) == 2 and report.saved_modules == ["classifier"]
    assert model.bert.encoder.layer[0].attention.self.query.adapter.dora.scale == 1.5
    with_head = bert()
    report = fastpeft.adapt(with_head, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert report.saved_modules == ["classifier"] and with_head.classifier.weight.requires_grad
    with pytest.raises(ValueError, match="layers_to_transform"):
        fastpeft.adapt(bert(), LoraConfig(target_modules=["query"], layers_to_transform=[0]))


@pytest.mark.parametrize("method,options", [("lora", {"rank": 3, "rslora": True}), ("melora", {"n": 2}), (["lora", "melora"], {})])
def test_export_is_a_plain_lora(method, options, tmp_path):
    from peft import PeftModel

    model = trained(bert, method, options)
    fastpeft.export_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


def test_export_refuses_a_gain(tmp_path):
    with pytest.raises(ValueError, match="Gain"):
        fastpeft.export_lora(trained(bert, "dora", {}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def half_one(tensors, config):
    key = next(k for k in tensors if "lora_A" in k)
    tensors[key] = tensors[key].half()


def change(key, value):
    def edit(tensors, config):
        config[key] = value

    return edit


def edit_tensor(function):
    def edit(tensors, config):
        key = next(k for k in tensors if "lora_B" in k)
        tensors[key] = function(tensors[key])

    return edit


BAD = {
    "missing": (lambda t, c: t.pop(next(iter(t))), "missing"),
    "unexpected": (lambda t, c: t.update(extra=torch.zeros(1)), "unexpected"),
    "nan": (edit_tensor(lambda t: t * float("nan")), "NaN"),
    "inf": (edit_tensor(lambda t: t.fill_(float("inf"))), "Inf"),
    "int": (edit_tensor(lambda t: t.long()), "dtype"),
    "double": (edit_tensor(lambda t: t.double()), "dtype"),
    "one half": (half_one, "dtype"),
    "shape": (edit_tensor(lambda t: t[:, :1].clone()), "shape"),
    "rank": (change("r", 5), "shape"),
    "narrow": (change("target_modules", ["query"]), "unexpected"),
    "no target": (change("target_modules", ["nowhere"]), "matches no layer"),
    "type": (change("peft_type", "VERA"), "VERA"),
    "feature": (change("use_qalora", True), "use_qalora"),
    "start": (change("init_lora_weights", "pissa"), "pissa"),
    "alpha": (change("lora_alpha", float("nan")), "alpha"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("adapted", [False, True])
def test_bad_folder_changes_nothing(case, adapted, tmp_path):
    edit, words = BAD[case]
    fastpeft.save_adapter(trained(bert, "lora", {"rank": 3}), tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    edit(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = trained(bert, "lora", {"rank": 3}) if adapted else bert()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(fastpeft.CheckpointError, match=None if adapted else words):
        fastpeft.load_adapter(model, tmp_path)
    assert classes == [type(m) for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_unreadable_files(tmp_path):
    model = bert()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastpeft.load_adapter(model, tmp_path / "nowhere")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(fastpeft.CheckpointError, match="pickle"):
        fastpeft.load_adapter(model, tmp_path)
    fastpeft.save_adapter(trained(bert, "lora", {}), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for data in (b"", whole[:100], whole[:-10], b"\x00" * 64):
        (tmp_path / WEIGHTS).write_bytes(data)
        with pytest.raises(fastpeft.CheckpointError, match="no readable safetensors"):
            fastpeft.load_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    for text in ("", "{", "[]", "{}"):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(fastpeft.CheckpointError):
            fastpeft.load_adapter(model, tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        fastpeft.load_adapter(model, tmp_path)


def test_a_config_edited_by_hand_is_named(tmp_path):
    fastpeft.save_adapter(trained(bert, "lora", {}), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 99}))
    with pytest.raises(fastpeft.CheckpointError, match=r"lora_alpha.*99"):
        fastpeft.load_adapter(bert(), tmp_path)


def test_other_method_or_options(tmp_path):
    fastpeft.save_adapter(trained(bert, "lora", {"rank": 3, "alpha": 7}), tmp_path)
    for method, options in (("dora", {"rank": 3, "alpha": 7}), ("lora", {"rank": 3, "alpha": 8}), ("lora", {"rank": 4, "alpha": 7})):
        with pytest.raises(fastpeft.CheckpointError, match=r"adapted with|other options"):
            fastpeft.load_adapter(trained(bert, method, options), tmp_path)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_interrupted_save_leaves_old_or_new(calls, tmp_path, monkeypatch):
    """Stop at each rename; the second checkpoint has another config, so the two files cannot be swapped one by one."""
    old, new = trained(bert, "lora", {"rank": 2}), trained(bert, "dora", {"rank": 3})
    fastpeft.save_adapter(old, tmp_path)
    real, done = os.replace, []

    def stop(*args):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(args)
        real(*args)

    monkeypatch.setattr(checkpoint.os, "replace", stop)
    try:
        fastpeft.save_adapter(new, tmp_path)
    except KeyboardInterrupt:
        pass
    model = bert()
    fastpeft.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(new if calls else old))


def test_a_failed_write_leaves_the_old(tmp_path, monkeypatch):
    model = trained(bert, "lora", {"rank": 2})
    fastpeft.save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(folder, "sync_write", full)
    with pytest.raises(OSError, match="no space"):
        fastpeft.save_adapter(trained(bert, "dora", {}), tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_16_bit_factors_are_widened(tmp_path):
    model = trained(bert, "lora", {"rank": 3})
    fastpeft.save_adapter(model, tmp_path)
    tensors = {k: v.bfloat16() for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    fresh = bert()
    fastpeft.load_adapter(fresh, tmp_path)
    A = fresh.bert.encoder.layer[0].attention.self.query.adapter.lora.A
    assert A.dtype == torch.float32 and torch.equal(A, A.bfloat16().float())


def test_a_name_that_is_another_names_suffix(tmp_path):
    """Adapting '1' must not make PEFT adapt '0.1' too."""
    from peft import PeftModel

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))

    model = make()
    fastpeft.adapt(model, "lora", target_modules="1", rank=2)
    nn.init.normal_(model[1].adapter.lora.B)
    fastpeft.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(PeftModel.from_pretrained(make(), tmp_path)(x), model(x))
