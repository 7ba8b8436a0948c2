"""Mixture-of-LoRAs: the loss of the routers, which learn the domain labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.method.moa import MoA
from fastpeft.option_checks import check_finite
from fastpeft.routing import Routing
from fastpeft.routing_hooks import routing_of
from fastpeft.train.layers import inner, take_charge
from fastpeft.train.protocol import Context, Procedure


class MoARouting(Procedure):
    """Adds eta * (mean over blocks and sequences of the cross-entropy of R h against the domain label) to the loss.

    eta: 0.1 is ours.   The model is called with domain=[batch]; under Transformers' Trainer that needs remove_unused_columns=False.
    The cross-entropy is taken here and not in the blocks, so that the routers get their gradient under either kind of checkpointing.
    accuracy: the share of (block, sequence) of the last forward whose router agrees with the label; nan before the first.

    RuntimeError for a training forward without domain=. ValueError on another eta and on a model without moa layers.
    """

    def __init__(self, eta: float = 0.1):
        if check_finite("MoARouting", "eta", eta) < 0:
            raise ValueError(f"MoARouting: eta={eta}; it must be at least 0.")
        self.eta = float(eta)
        self._routing: Routing | None = None
        self._right: Tensor | None = None

    @property
    def accuracy(self) -> float:
        return float("nan") if self._right is None else self._right.float().mean().item()

    def on_train_begin(self, ctx: Context) -> None:
        take_charge(ctx, MoA, "MoARouting", "moa")
        self._routing = routing_of(inner(ctx.model), "MoARouting")
        ctx.closing.callback(self._release)

    def _release(self) -> None:
        self._routing = None

    def extra_loss(self, ctx: Context) -> Tensor | None:
        routing = self._routing
        assert routing is not None
        if not routing.enabled or routing.fixed is not None:
            return None
        forward = routing.last
        if forward is None or forward.domain is None:
            raise RuntimeError("MoARouting: a training forward without labels of its domains; call the model with domain=[batch].")
        losses, right = [], []
        for name, pooled in forward.pooled.items():
            logits = routing.routers[name].logits(pooled)
            label = forward.domain.to(logits.device)
            losses.append(F.cross_entropy(logits, label))
            right.append(logits.detach().argmax(-1) == label)
        self._right = torch.stack([r.to(right[0].device) for r in right])
        loss = torch.stack([x.to(losses[0].device) for x in losses]).mean()
        return self.eta * loss if loss.requires_grad else None

    def state_dict(self) -> dict[str, Any]:
        return {"eta": self.eta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if dict(state) != self.state_dict():
            raise ValueError(f"MoARouting: the state is of other settings (state, here): {dict(state)}, {self.state_dict()}.")
