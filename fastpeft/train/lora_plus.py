"""LoRA+: the up factors learn `ratio` times as fast as everything else; a matter of the optimiser's groups alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpeft.option_checks import check_finite
from fastpeft.train.optimizer import check_groups, with_role
from fastpeft.train.protocol import Context, Procedure


class LoRAPlus(Procedure):
    """Learning rate lr of A and everything else, ratio * lr of every parameter whose role is "up".

    ratio: at least 1. The paper tunes it together with lr (its README uses 20, its GLUE scripts up to 80); where it is large, lr
        is best about half of what LoRA takes. A scheduler multiplies all groups alike, so the ratio lasts.
    compat_ndim1: as in PEFT and the authors' code, every 1-D parameter (biases, DoRA's magnitudes, a head's bias) is counted
        among the up factors too; of those, biases and the parameters of a LayerNorm have no weight decay. Otherwise a 1-D
        parameter has the base lr, and weight decay is what the optimiser is given.

    It works with any method that has up factors and with any optimiser made by fastpeft.train.build_optimizer.
    Raises ValueError on other arguments, on a model without up factors, and on an optimiser that has them with the others.
    """

    def __init__(self, ratio: float = 16.0, *, compat_ndim1: bool = False):
        if check_finite("LoRAPlus", "ratio", ratio) < 1:
            raise ValueError(f"LoRAPlus: ratio={ratio}; it must be at least 1.")
        self.ratio, self.compat_ndim1 = float(ratio), compat_ndim1

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        fast = set(with_role(model, "up"))
        if not fast:
            raise ValueError(f"LoRAPlus: this {type(model).__name__} has no parameter whose role is 'up'; adapt it with 'lora_plus'.")
        still: set[nn.Parameter] = set()
        if self.compat_ndim1:
            fast |= {p for p in model.parameters() if p.ndim == 1}
            still = {p for p in _without_decay(model) if p.ndim == 1}
        slow, quick = [], []
        for group in groups:
            if "lr" not in group:
                raise ValueError("LoRAPlus: a group without 'lr' cannot be given a multiple of it; use fastpeft.train.build_optimizer.")
            slow.append(group | {"params": [p for p in group["params"] if p not in fast]})
            own = group | {"lr": self.ratio * group["lr"]}
            quick.append(own | {"params": [p for p in group["params"] if p in fast and p not in still]})
            quick.append(own | {"params": [p for p in group["params"] if p in still], "weight_decay": 0.0})
        return [g for g in (*slow, *quick) if g["params"]]

    def on_train_begin(self, ctx: Context) -> None:
        check_groups(ctx.model, [self], ctx.optimizer, "LoRAPlus")

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "compat_ndim1": self.compat_ndim1}

    def load_state_dict(self, state: Any) -> None:
        if dict(state) != self.state_dict():
            raise ValueError(f"LoRAPlus: the state is of other settings (state, here): {dict(state)}, {self.state_dict()}.")


def _without_decay(model: nn.Module) -> list[nn.Parameter]:
    """Biases and what a LayerNorm holds."""
    biases = [p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"]
    return biases + [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
