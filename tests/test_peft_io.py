"""Adapter folders cross between fastpeft and stock PEFT in both directions with the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.integrations.peft import from_config, from_dict

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# of Transformers about itself, raised inside stock PEFT whatever the adapter
OWN_NOTICE = "`is_gradient_checkpointing` is deprecated"

IDS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(3))


def bert() -> nn.Module:
    torch.manual_seed(0)
    # 0.3, not 0.02: with the usual start the logits hardly depend on the adapters, and a wrong one would pass
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {"bert": (bert, ["query", "value"]), "gpt2": (gpt2, ["c_attn"])}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("bert", "lora", {}, {}),
    "rslora": ("bert", "lora", {"rslora": True}, {"use_rslora": True}),
    "dora": ("bert", "dora", {}, {"use_dora": True}),
    "lora_bias": ("bert", "lora", {"lora_bias": True}, {"lora_bias": True}),
    "bias_all": ("bert", "lora", {"bias": "all"}, {"bias": "all"}),
    "bias_lora_only": ("bert", "lora", {"bias": "lora_only"}, {"bias": "lora_only"}),
    "head": ("bert", "lora", {"modules_to_save": ["classifier"]}, {"modules_to_save": ["classifier"]}),
    "seq_cls": ("bert", "lora", {"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}),
    "seq_cls_bias_all": (
        "bert", "lora", {"modules_to_save": ["classifier"], "bias": "all"}, {"task_type": "SEQ_CLS", "bias": "all"}
    ),
    "patterns": (
        "bert", "lora", {"rank_pattern": {"1.attention.self.query": 3}, "alpha_pattern": {"value": 9}},
        {"rank_pattern": {"1.attention.self.query": 3}, "alpha_pattern": {"value": 9}},
    ),
    "regex": (
        "bert", "lora", {"target_modules": r".*\.1\..*\.(query|key)"}, {"target_modules": r".*\.1\..*\.(query|key)"}
    ),
    "exclude": ("bert", "lora", {"exclude_modules": r".*\.0\..*"}, {"exclude_modules": r".*\.0\..*"}),
    "all_linear": (
        "bert", "lora", {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "conv1d": ("gpt2", "lora", {}, {"fan_in_fan_out": True}),
    "conv1d_dora": ("gpt2", "dora", {}, {"fan_in_fan_out": True, "use_dora": True}),
    "conv1d_bias": ("gpt2", "lora", {"bias": "lora_only"}, {"fan_in_fan_out": True, "bias": "lora_only"}),
    "causal_lm": ("gpt2", "lora", {}, {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_our_folder_loads_in_peft_without_a_warning(case: str, tmp_path: Path) -> None:
    name, method, ours, _ = CASES[case]
    build, targets = MODELS[name]
    model = build()
    fastpeft.adapt(model, method, **({"rank": 4, "alpha": 6, "target_modules": targets} | ours))
    want, base = logits(shaken(model)), logits(build())
    assert (want - base).abs().max() > 1e-3
    fastpeft.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OWN_NOTICE, FutureWarning)
        loaded = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_their_folder_loads_here(case: str, tmp_path: Path) -> None:
    name, _, _, theirs = CASES[case]
    build, targets = MODELS[name]
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": targets} | theirs))
    other = shaken(peft.get_peft_model(build(), config))
    want = logits(other)
    other.save_pretrained(tmp_path)
    model = build()
    fastpeft.load_adapter(model, tmp_path)
    assert (want - logits(build())).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_adapt_takes_a_peft_config(case: str) -> None:
    name, method, _, theirs = CASES[case]
    build, targets = MODELS[name]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets} | theirs
    model, other = build(), peft.get_peft_model(build(), peft.LoraConfig(**settings))
    report = fastpeft.adapt(model, peft.LoraConfig(**settings))
    layers = [n.removeprefix("base_model.model.") for n, m in other.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert sorted(report.adapted) == sorted(layers)
    assert all(r.methods == (method,) for r in report.layers.values() if r.reason is None)
    if theirs.get("task_type") != "SEQ_CLS":  # there PEFT adds the head while it wraps the model, not in the config
        assert report.trainable == sum(p.numel() for p in other.parameters() if p.requires_grad)


def test_export_loads_in_peft(tmp_path: Path) -> None:
    model = bert()
    fastpeft.adapt(model, "lora", rank=4, alpha=6, target_modules=["query"], rank_pattern={"1.attention.self.query": 3})
    want = logits(shaken(model))
    fastpeft.export_lora(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OWN_NOTICE, FutureWarning)
        loaded = peft.PeftModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)


def test_our_config_has_no_field_that_peft_does_not_know(tmp_path: Path) -> None:
    model = bert()
    fastpeft.adapt(model, "dora", rank=4, grad="full", target_modules=["query"])
    fastpeft.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not written.keys() - peft.LoraConfig().to_dict().keys()


def test_from_config_and_from_dict_agree() -> None:
    config = peft.LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=["a", "b"], rank_pattern={"a": 2})
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    name, settings, options = from_config(config, model)
    assert (name, options["rank"], options["alpha"], options["rslora"]) == ("lora", 5, 7, True)
    assert settings["target_modules"] == ["a", "b"] and settings["rank_pattern"] == {"a": 2}
    assert from_dict(config.to_dict(), model) == (name, settings, options)


@pytest.mark.parametrize("field", [{"use_qalora": True}, {"layers_to_transform": [0]}, {"init_lora_weights": "olora"},
                                   {"target_parameters": ["x"]}, {"trainable_token_indices": [1]}])  # fmt: skip
def test_unsupported_fields_are_named(field: dict[str, Any]) -> None:
    model = bert()
    with pytest.raises(ValueError, match=next(iter(field))):
        fastpeft.adapt(model, peft.LoraConfig(target_modules=["query"], **field))
    assert not any("adapter" in n for n, _ in model.named_modules())


def test_another_kind_of_config_is_refused() -> None:
    with pytest.raises(ValueError, match="IA3"):
        fastpeft.adapt(bert(), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
