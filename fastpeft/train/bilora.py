"""BiLoRA's two levels: the loop trains V, all but E, on its data D1; after T1 steps E takes T2 steps on other data, D2.

    lower: min over V of C(V, E; D1) + gamma1 R1(V)        upper: min over E of C(V*(E), E; D2) + gamma2 R2(E)

With d = dC/dE and v = dC/dV on a batch of D2, L1 the lower loss on the last step's batch of D1, w = v (in "darts" xi v, xi the lower
learning rate) and e = radius / ||w||, the upper gradient is d - [dL1/dE (V + e w) - dL1/dE (V - e w)] / 2e.

Paper: arXiv 2403.13037.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpeft.method.bilora import BiLoRA, binary_entropy
from fastpeft.option_checks import check_finite, check_int
from fastpeft.train.layers import held, inner, parts_of, take_charge
from fastpeft.train.optimizer import split_off
from fastpeft.train.protocol import Batch, Context, Procedure
from fastpeft.train.source import Loss, Source, batch_of, check_source, loss_of, mean_over_ranks, need_source

HYPERGRADS = ("betty", "darts", "first_order")
UPPER = functools.partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.1)


class BiLoRABilevel(Procedure):
    """Trains the values E of bilora layers on data of their own; the loop's optimiser trains everything else, and not E.

    source: batches of D2 (fastpeft.train.divide, fastpeft.train.Batches); in a parallel run each process has a source of its own and
        gradients are averaged. It may be set until the first step.
    hypergrad: "betty": around the V that the lower steps ended with, no learning rate in it, as the Betty library does, which the paper
        used; "darts": around the V before the last lower step: exact for a lower step of SGD; "first_order": d alone.
    lower_steps, upper_steps: T1 steps of the loop, then T2 of E; each of these takes a batch of D2.
    gamma1, gamma2: weights of R1, the sum over layers of ||A A^T - I||_F^2 + ||B^T B - I||_F^2, and R2, the binary entropy of the values
        of all layers (only with values="sigmoid"). R1 is added to the model's own loss; gamma1=0 adds none.
    lr: of E, beside the loop's lr (fastpeft.train.build_optimizer), whose scheduler moves both; None: the loop's lr for E.
    upper: (parameters, lr=...) -> the optimiser of E; its state is the procedure's.
    radius: of the difference, over all of w together.   loss: (output, batch) -> C; None: the `loss` of the model's output.

    V is every parameter of the optimiser but E. The upper passes are in evaluation mode, without dropout, and put generators, modes
    and V back. A lower step that is skipped is none. Cost of a betty or darts step: four passes forward and backward, where a LoRA has one,
    and one copy of V (darts: two). Raises ValueError on other arguments, on an E that the optimiser does not hold and on factors in 16
    bits, in which the difference would be lost; RuntimeError in the first step without a source.
    """

    HOLDS_OUT: ClassVar = 0.2  # of a job's training data, for the source

    def __init__(
        self,
        source: Source | None = None,
        *,
        hypergrad: str = "betty",
        lower_steps: int = 1,
        upper_steps: int = 1,
        gamma1: float = 0.1,
        gamma2: float = 0.0,
        lr: float | None = None,
        upper: Callable[..., Optimizer] = UPPER,
        radius: float = 0.01,
        loss: Loss | None = None,
    ):
        if hypergrad not in HYPERGRADS:
            raise ValueError(f"BiLoRABilevel: hypergrad={hypergrad!r}; it must be one of {', '.join(HYPERGRADS)}.")
        for name, value in (("gamma1", gamma1), ("gamma2", gamma2)):
            if check_finite("BiLoRABilevel", name, value) < 0:
                raise ValueError(f"BiLoRABilevel: {name}={value}; it must be at least 0.")
        for name, value in (("lr", 1.0 if lr is None else lr), ("radius", radius)):
            if check_finite("BiLoRABilevel", name, value) <= 0:
                raise ValueError(f"BiLoRABilevel: {name}={value}; it must be more than 0.")
        self.lower_steps = check_int("BiLoRABilevel", "lower_steps", lower_steps, 1, None, "lower_steps")
        self.upper_steps = check_int("BiLoRABilevel", "upper_steps", upper_steps, 1, None, "upper_steps")
        self.source, self.loss, self.hypergrad = check_source("BiLoRABilevel", source), loss, hypergrad
        self.gamma1, self.gamma2, self.lr, self.upper, self.radius = float(gamma1), float(gamma2), lr, upper, float(radius)
        self._layers: dict[str, BiLoRA] = {}
        self._E: list[nn.Parameter] = []
        self._V: list[nn.Parameter] = []
        self._optimizer: Optimizer | None = None
        self._state: dict[str, Any] | None = None  # of that optimiser, until it is made
        self._batches: list[Batch] = []  # of the last lower step
        self._old: list[Tensor] = []  # V before it
        self._took = False
        self.batches = 0  # of D2 so far

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.lr is None:
            return groups
        return split_off(groups, [m.E for m in parts_of(model, BiLoRA).values()], lr=self.lr)

    def on_train_begin(self, ctx: Context) -> None:
        layers = take_charge(ctx, BiLoRA, "BiLoRABilevel", "bilora")
        values, everything = [m.E for m in layers.values()], held(ctx.optimizer)
        for name, m in layers.items():
            if m.E not in everything:
                raise ValueError(f"BiLoRABilevel: E of {name!r} is not in the optimiser, which says its learning rate; leave it there.")
            if torch.finfo(m.A.dtype).bits < 32:
                raise ValueError(f"BiLoRABilevel: the factors of {name!r} are {m.A.dtype}, in which differences are lost; keep adapters in fp32.")
            if self.gamma2 and m.kind != "sigmoid":
                raise ValueError(f"BiLoRABilevel: gamma2={self.gamma2} at {name!r} with values={m.kind!r}; R2 is for values='sigmoid'.")
        self._layers, self._E = layers, values
        self._V = [p for p in inner(ctx.model).parameters() if p in everything and not any(p is e for e in values)]
        self._optimizer = self.upper(values, lr=1.0)
        if self._state is not None:
            self._optimizer.load_state_dict(self._state)
            self._state = None
        ctx.closing.callback(self._release)

    def _release(self) -> None:
        self._state = None if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict())
        self._layers, self._E, self._V, self._optimizer, self._batches, self._old = {}, [], [], None, [], []

    def on_step_begin(self, ctx: Context) -> None:
        need_source("BiLoRABilevel", self.source, "the upper level")
        self._batches = []

    def before_forward(self, ctx: Context, batch: Batch) -> None:
        if self.hypergrad != "first_order":
            self._batches.append(batch)

    def extra_loss(self, ctx: Context) -> Tensor | None:
        if not self.gamma1:
            return None
        parts = [m.orthogonality() for m in self._layers.values()]
        return self.gamma1 * torch.stack([r.to(parts[0].device) for r in parts]).sum()

    def after_backward(self, ctx: Context, micro: int, is_last: bool) -> None:
        # before clipping, in whose norm E has no part; and without a gradient no optimiser moves it
        for e in self._E:
            e.grad = None

    def before_step(self, ctx: Context) -> None:
        if self.hypergrad == "darts" and (ctx.step + 1) % self.lower_steps == 0:
            self._old = [p.detach().clone() for p in self._V]

    def after_step(self, ctx: Context, skipped: bool) -> None:
        self._took = not skipped

    def on_step_end(self, ctx: Context) -> None:
        if self._took and ctx.step % self.lower_steps == 0:
            for _ in range(self.upper_steps):
                self._upper_step(ctx)
        self._took, self._batches, self._old = False, [], []

    def _upper_step(self, ctx: Context) -> None:
        assert self._optimizer is not None
        batch = batch_of(self.source, self.batches, inner(ctx.model))  # type: ignore[arg-type]
        self.batches += 1
        groups = {p: g for g in ctx.optimizer.param_groups for p in g["params"]}
        for group in self._optimizer.param_groups:
            group["lr"] = groups[group["params"][0]]["lr"]
        with ctx.quiet():
            inner(ctx.model).eval()
            grads = self.hypergradient(ctx, batch, self._batches)
        for e, g in zip(self._E, grads, strict=True):
            e.grad = g
        self._optimizer.step()
        self._optimizer.zero_grad()

    def hypergradient(self, ctx: Context, upper: Batch, lower: list[Batch]) -> list[Tensor]:
        """The gradient that E steps along, one tensor per layer; to be called in ctx.quiet()."""
        first = self.hypergrad == "first_order"
        value = self._loss(ctx, upper)
        if self.gamma2:
            value = value + self.gamma2 * sum(binary_entropy(m.spectrum()).to(value.device) for m in self._layers.values())
        d, v = self._gradient(value, [*self._E, *([] if first else self._V)])
        if first:
            return d
        if self.hypergrad == "darts":
            rates = {p: float(g["lr"]) for g in ctx.optimizer.param_groups for p in g["params"]}
            v = [g * rates[p] for p, g in zip(self._V, v, strict=True)]
        size = float(torch.stack([g.double().square().sum().to(v[0].device) for g in v]).sum().sqrt())
        if not 0.0 < size < float("inf"):
            return d
        e = self.radius / size
        now = [p.detach().clone() for p in self._V]
        centre = self._old if self.hypergrad == "darts" else now
        sides = []
        try:
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    for p, c, g in zip(self._V, centre, v, strict=True):
                        p.copy_(c + (sign * e) * g)
                sides.append(self._lower(ctx, lower))
        finally:
            with torch.no_grad():
                for p, c in zip(self._V, now, strict=True):
                    p.copy_(c)
        return [g - (a - b) / (2 * e) for g, a, b in zip(d, *sides, strict=True)]

    def _loss(self, ctx: Context, batch: Batch) -> Tensor:
        return loss_of(inner(ctx.model), batch, self.loss, "BiLoRABilevel")

    def _lower(self, ctx: Context, batches: list[Batch]) -> list[Tensor]:
        """E's gradient of the loss of the loop's step, a micro-batch's graph at a time. R1 has no part in it: its own is zero."""
        shares = [1.0 if b.kwargs.get("num_items_in_batch") is not None else 1 / len(batches) for b in batches]
        each = [self._gradient(s * self._loss(ctx, b), self._E)[0] for s, b in zip(shares, batches, strict=True)]
        return [torch.stack(g).sum(0) for g in zip(*each, strict=True)]

    def _gradient(self, loss: Tensor, parameters: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of a loss, averaged over the processes: those of E, and the rest."""
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else mean_over_ranks(g.contiguous()) for p, g in zip(parameters, grads, strict=True)]
        return found[: len(self._E)], found[len(self._E) :]

    def state_dict(self) -> dict[str, Any]:
        state = self._state if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict())
        return self._settings() | {"batches": self.batches, "upper": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wrong = {k: (state.get(k), v) for k, v in self._settings().items() if state.get(k) != v}
        if wrong or not {"batches", "upper"} <= state.keys():
            raise ValueError(f"BiLoRABilevel: the state is of other settings (state, here): {wrong or 'parts are missing'}.")
        self.batches = int(state["batches"])
        if self._optimizer is None:
            self._state = copy.deepcopy(state["upper"])
        elif state["upper"] is not None:
            self._optimizer.load_state_dict(state["upper"])

    def _settings(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("hypergrad", "lower_steps", "upper_steps", "gamma1", "gamma2", "lr", "radius")}
