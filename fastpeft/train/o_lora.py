"""O-LoRA's step from one task to the next: outside training, so buffers may change their size here."""

from __future__ import annotations

from torch import nn

from fastpeft.method.o_lora import OLoRA
from fastpeft.record import adaptation
from fastpeft.registry import get_recipe


def next_task(model: nn.Module) -> int:
    """Freeze what every o_lora layer of an adapted model has learned and start new factors; returns how many tasks came before.

    The model computes the same before and after, up to rounding. A and B stay the same parameters: make a new optimiser, whose
    moments belong to the new task. save_adapter and load_adapter know the number of tasks from here on.
    ValueError if the model is not adapted with o_lora.
    """
    record = adaptation(model, "next_task")
    if "o_lora" not in record.methods:
        raise ValueError(f"next_task: this model was adapted with {', '.join(record.methods)}; it takes o_lora.")
    for layer in model.modules():
        if isinstance(layer, OLoRA):
            layer.advance()
    record.options["previous"] = (get_recipe("o_lora").options | record.options)["previous"] + 1
    return record.options["previous"]
