"""LoRA-FA's preconditioned mode: B steps along the gradient that comes nearest to that of W itself.

With A frozen, s dB A can follow the gradient G of W only inside A's row space. The g' with s g' A nearest to G is
g' = (1 / s^2) g (A A^T)^-1, where g = s G A^T is B's gradient; the optimiser is given g' in g's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpeft.method.lora_fa import LoRAFA
from fastpeft.option_checks import check_finite
from fastpeft.train.layers import take_charge
from fastpeft.train.protocol import Context, Procedure


class LoRAFAPreconditioner(Procedure):
    """B.grad <- (1 / s^2) B.grad pinv(A A^T + delta I) before each step, on every lora_fa layer, whatever the optimiser.

    With HFAdamW as the optimiser this is PEFT's create_lorafa_optimizer, but for the product, which PEFT makes from bf16
    operands even in fp32 training. The inverse is fp32 or wider, made at the first step and kept: A must stay as it is while
    the procedure is attached. Gradients are clipped before. Under Adam the factor 1 / s^2 cancels, except in eps.
    Raises ValueError on a model without lora_fa layers, a scale of 0, an A that trains, and a delta that is not positive.
    """

    def __init__(self, delta: float = 1e-8):
        if check_finite("LoRAFAPreconditioner", "delta", delta) <= 0:
            raise ValueError(f"LoRAFAPreconditioner: delta={delta}; it must be more than 0.")
        self.delta = float(delta)
        self._layers: dict[str, LoRAFA] = {}
        self._inverse: dict[LoRAFA, Tensor] = {}

    def on_train_begin(self, ctx: Context) -> None:
        self._layers = take_charge(ctx, LoRAFA, "LoRAFAPreconditioner", "lora_fa")
        for name, m in self._layers.items():
            if m.A.requires_grad or m.scale == 0:
                what = "its scale is 0" if m.scale == 0 else "its A trains"
                raise ValueError(f"LoRAFAPreconditioner: at {name!r} {what}; it needs a frozen A and an alpha other than 0.")
        ctx.closing.callback(self._release)

    def _release(self) -> None:
        self._layers, self._inverse = {}, {}

    @torch.no_grad()
    def before_step(self, ctx: Context) -> None:
        for m in self._layers.values():
            if m.B.grad is not None:
                if m not in self._inverse:
                    self._inverse[m] = self._invert(m.A)
                P = self._inverse[m]
                m.B.grad.copy_((1 / m.scale**2) * (m.B.grad.to(P.dtype) @ P))

    def _invert(self, A: Tensor) -> Tensor:
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        return torch.linalg.pinv(A @ A.T + self.delta * torch.eye(A.shape[0], dtype=A.dtype, device=A.device))


class HFAdamW(Optimizer):
    """AdamW as Transformers had it: eps is added to sqrt(v) before v's bias is corrected, and weight decay comes last.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps),
    then p <- p - lr weight_decay p. torch's decays first and adds eps to the corrected root.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"HFAdamW: lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}; betas must be in [0, 1), the others at least 0."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])
