"""O-LoRA: the penalty of a task, and the step from one task to the next: outside training, so buffers may change their size here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.method.o_lora import OLoRA
from fastpeft.option_checks import check_finite
from fastpeft.record import adaptation
from fastpeft.registry import get_recipe
from fastpeft.train.layers import take_charge
from fastpeft.train.protocol import Context, Procedure


class OLoRAPenalty(Procedure):
    """Adds lambda1 * (sum over layers of the overlap of A with earlier tasks' A) + lambda2 * (sum of ||A||_F + ||B||_F) to the loss.

    orth: the overlap is the sum over entries of A_prev A^T of |entry| ("l1", the authors' code), or entry^2 ("fro2", the paper).
    lambda1: 0.5 is the authors', for "l1".   lambda2: theirs is 0 but in some tasks of the long runs.

    Once per optimiser step, however many micro-batches make it. In the first task there is nothing to be orthogonal to. The loss must be
    the model's own output. Raises ValueError on other arguments and on a model without o_lora layers.
    """

    def __init__(self, lambda1: float = 0.5, lambda2: float = 0.0, *, orth: str = "l1"):
        for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
            if check_finite("OLoRAPenalty", name, value) < 0:
                raise ValueError(f"OLoRAPenalty: {name}={value}; it must be at least 0.")
        if orth not in ("l1", "fro2"):
            raise ValueError(f"OLoRAPenalty: orth={orth!r}; it must be 'l1' or 'fro2'.")
        self.lambda1, self.lambda2, self.orth = float(lambda1), float(lambda2), orth
        self._layers: dict[str, OLoRA] = {}

    def on_train_begin(self, ctx: Context) -> None:
        self._layers = take_charge(ctx, OLoRA, "OLoRAPenalty", "o_lora")
        ctx.closing.callback(self._release)

    def _release(self) -> None:
        self._layers = {}

    def extra_loss(self, ctx: Context) -> Tensor | None:
        later = [m for m in self._layers.values() if m.A_prev is not None] if self.lambda1 else []
        parts = [self.lambda1 * m.penalty(self.orth) for m in later]
        if self.lambda2:
            parts += [self.lambda2 * m.magnitude() for m in self._layers.values()]
        return torch.stack([p.to(parts[0].device) for p in parts]).sum() if parts else None

    def state_dict(self) -> dict[str, Any]:
        return {"lambda1": self.lambda1, "lambda2": self.lambda2, "orth": self.orth}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if dict(state) != self.state_dict():
            raise ValueError(f"OLoRAPenalty: the state is of other settings (state, here): {dict(state)}, {self.state_dict()}.")


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
