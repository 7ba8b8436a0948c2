"""Expert folders for tests of the routed methods: LoRAs that stock PEFT wrote, moved away from their start."""

from __future__ import annotations

import copy

import peft
import torch


def peft_lora(plain, folder, targets, rank=3, alpha=4.0, **config):
    """A stock PEFT LoRA on a copy of `plain`, moved and saved into `folder`; returns it."""
    made = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **config)
    model = peft.get_peft_model(copy.deepcopy(plain), made, autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.4 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model.eval()


def peft_factors(model, site):
    """(A, B, s) of a PEFT layer, as its own code has them; None where the site has none."""
    layer = model.base_model.model.get_submodule(site)
    if not hasattr(layer, "lora_A"):
        return None
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
