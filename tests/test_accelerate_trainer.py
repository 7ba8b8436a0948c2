"""An accelerated model under the Transformers Trainer and in generation, accelerated before or after the Trainer took it."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
}


def trained(model, folder, when):
    """The model's losses over four steps with activation checkpointing; `when` it is accelerated: before, after, never."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (16, 12))
    data = [{"input_ids": row, "labels": row} for row in ids]
    if when == "before":
        fastpeft.accelerate(model, strict=True)
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, gradient_checkpointing=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data)
    if when == "after":
        fastpeft.accelerate(model, strict=True)
    fastpeft.reset_calls()
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.accept
@pytest.mark.parametrize("family", list(CONFIGS))
def test_trains_and_generates_as_peft(family, llama, tmp_path):
    start = peft.get_peft_model(llama, CONFIGS[family]())
    models = {when: copy.deepcopy(start) for when in ("never", "before", "after")}
    losses = {}
    for when, model in models.items():
        losses[when] = trained(model, tmp_path / when, when)
        layers = sum(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in model.modules())
        assert fastpeft.fused_calls() == ({} if when == "never" else {family: 2 * 4 * layers})  # each forward is run twice
    assert losses["never"][-1] < losses["never"][0] - 0.01
    for when in ("before", "after"):
        # fp32 rounding, carried through four steps of AdamW
        torch.testing.assert_close(losses[when], losses["never"], rtol=1e-4, atol=0.0)
        prompt = torch.tensor([[5, 6, 7]])
        texts = [m.eval().generate(input_ids=prompt, max_new_tokens=8, do_sample=False) for m in (models[when], models["never"])]
        assert torch.equal(*texts)
    models["before"].save_pretrained(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(start.unload()), tmp_path / "saved").eval()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(again(ids).logits, models["before"](ids).logits)
