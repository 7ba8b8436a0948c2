"""RoSA's schedule: LoRA alone, then LoRA while the gradient of W is scored, then both parts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.method.rosa import RoSA
from fastpeft.ops.topk import largest
from fastpeft.option_checks import check_finite, check_int
from fastpeft.train.layers import held, parts_of
from fastpeft.train.optimizer import split_off
from fastpeft.train.protocol import Context, Procedure

SCORES = ("mean_sq", "mean_signed", "mean_abs")


class Parts(NamedTuple):
    """What a step does: whether LoRA trains, the gradient of W is collected, the sparse values train."""

    low: bool
    collect: bool
    sparse: bool


class RoSASchedule(Procedure):
    """When each part of `rosa` trains, and which entries of W its sparse part is.

    schedule: "wlK": K steps of LoRA, then `grads` of LoRA while W's gradient G is collected, then both parts. "default" is
        "wl0". "spa_only": collection, then the sparse part; LoRA stays frozen throughout. "lora_only": LoRA, no mask.
        Steps are those that the optimiser took, from 0; the masks are made at the end of step K + grads - 1.
    score: by what entries are ranked, within a layer: "mean_sq" the mean of G*G over micro-batches, "mean_signed" |mean of G|,
        "mean_abs" the mean of |G|. A score is an fp32 tensor [out, in] per layer, beside W, from the first collection to the
        masks. Ties go to the lower flat index.
    after: "continue", or "save": the run is over when the masks exist (`done`, Runner.done), and a further step raises. Then
        fastpeft.train.save_masks, and load_masks in a run that starts again from the base model, as in the published results.
    sparse_lr: learning rate of the sparse values, without weight decay (the published one is 2e-4, beside 7e-4 for LoRA).
    group: the process group whose ranks see different data; scores are averaged over it before the choice.

    On a model whose masks exist (load_masks, load_adapter) both parts train from step 0. A step that a gradient scaler skips
    counts for nothing, and drops what was collected before it too: its share cannot be told apart. Under DDP a schedule needs
    find_unused_parameters=True, as the sparse values have no gradient before the masks; broadcast_buffers=False spares sending
    every index with every forward. Raises ValueError on other arguments.
    """

    def __init__(
        self,
        schedule: str = "wl64",
        grads: int = 1,
        score: str = "mean_sq",
        after: str = "continue",
        *,
        sparse_lr: float = 2e-4,
        group: Any = None,
    ):
        known = re.fullmatch(r"wl(\d+)", "wl0" if schedule in ("default", "spa_only", "lora_only") else str(schedule))
        if known is None:
            raise ValueError(f"RoSASchedule: schedule={schedule!r}; it must be 'wl' and a number of steps, 'default', 'spa_only' or 'lora_only'.")
        if score not in SCORES:
            raise ValueError(f"RoSASchedule: score={score!r}; it must be one of {', '.join(SCORES)}.")
        if after not in ("continue", "save"):
            raise ValueError(f"RoSASchedule: after={after!r}; it must be 'continue' or 'save'.")
        if check_finite("RoSASchedule", "sparse_lr", sparse_lr) <= 0:
            raise ValueError(f"RoSASchedule: sparse_lr={sparse_lr}; it must be more than 0.")
        self.schedule, self.score, self.after, self.sparse_lr, self.group = schedule, score, after, sparse_lr, group
        self.warmup, self.grads = int(known[1]), check_int("RoSASchedule", "grads", grads, 1, None, "grads")
        self._layers: dict[str, RoSA] = {}
        self._sums: dict[str, Tensor] = {}
        self._collecting = False

    def parts(self, step: int) -> Parts:
        """What the schedule says for a step of a run that begins without masks."""
        if self.schedule == "lora_only":
            return Parts(True, False, False)
        end = self.warmup + self.grads
        return Parts(self.schedule != "spa_only", self.warmup <= step < end, step >= end)

    @property
    def done(self) -> bool:
        return self.after == "save" and self._masked()

    def _masked(self) -> bool:
        return bool(self._layers) and all(m.masked for m in self._layers.values())

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        values = [m.values for m in sparse_layers(model).values()]
        return split_off(groups, values, lr=self.sparse_lr, weight_decay=0.0)

    def on_train_begin(self, ctx: Context) -> None:
        rosa = [m for m in ctx.model.modules() if isinstance(m, RoSA)]
        layers = sparse_layers(ctx.model)
        if not rosa or (not layers and self.schedule != "lora_only"):
            what = "whose density is 0 everywhere: say schedule='lora_only'" if rosa else "without a rosa layer: adapt it with 'rosa'"
            raise ValueError(f"RoSASchedule: attached to a {type(ctx.model).__name__} {what}.")
        if any(m.attached for m in rosa):
            raise RuntimeError("RoSASchedule: the model has a schedule already; attach one.")
        self._check_masks(layers)
        own = held(ctx.optimizer)
        for name, m in layers.items():
            if m.values not in own and self.schedule != "lora_only":
                raise ValueError(
                    f"RoSASchedule: the sparse values of {name!r} are not in the optimiser; make it with "
                    "fastpeft.train.build_optimizer(model, procedures, ...)."
                )
        self._layers = layers
        ctx.closing.callback(self._release, rosa)
        for m in rosa:
            m.attached = True
        if self.schedule == "spa_only":
            for p in (p for m in rosa for p in (m.A, m.B) if p is not None):
                ctx.closing.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(False).grad = None

    def _check_masks(self, layers: Mapping[str, RoSA]) -> None:
        without = [n for n, m in layers.items() if not m.masked]
        if without and len(without) < len(layers):
            raise ValueError(f"RoSASchedule: {', '.join(without[:4])} of {len(layers)} layers have no mask; give masks to all or none.")

    def _release(self, rosa: list[RoSA]) -> None:
        for m in rosa:
            m.attached = False
            m.collect(None)
        self._sums, self._collecting = {}, False

    def on_step_begin(self, ctx: Context) -> None:
        if self.done:
            raise RuntimeError(
                "RoSASchedule: the masks exist and after='save' ends the run here; call fastpeft.train.save_masks, and leave the "
                "loop when runner.done is true."
            )
        parts = self.parts(ctx.step)
        if parts.sparse and not self._masked():
            raise RuntimeError(
                f"RoSASchedule: step {ctx.step} of {self.schedule!r} needs masks, which the model does not have; read its adapter "
                "or state dict of that step before going on."
            )
        if parts.collect and not self._collecting and not self._masked():
            self._start(ctx)

    def _start(self, ctx: Context) -> None:
        wrong = [n for n, s in self._sums.items() if n not in self._layers or s.shape != self._layers[n].shape]
        if wrong:
            raise ValueError(f"RoSASchedule: the state has scores of other layers than the model: {', '.join(wrong[:4])}.")
        self._collecting = True
        self._sums = {n: s.to(self._layers[n].index.device) for n, s in self._sums.items()}
        for name, m in self._layers.items():
            m.collect(partial(self._take, ctx, name))

    @torch.no_grad()
    def _take(self, ctx: Context, name: str, grad: Tensor) -> None:
        """Add the gradient of one micro-batch; sums, because they rank as the means do."""
        if ctx.silent:
            return
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(grad, dtype=torch.float32)
        if self.score == "mean_sq":
            self._sums[name].addcmul_(grad, grad)
        else:
            self._sums[name].add_(grad if self.score == "mean_signed" else grad.abs_())

    def after_step(self, ctx: Context, skipped: bool) -> None:
        if skipped:
            self._sums.clear()

    def on_step_end(self, ctx: Context) -> None:
        if self._collecting and not self.parts(ctx.step).collect:
            self._collecting = False
            for name, m in self._layers.items():
                m.collect(None)
                m.set_mask(self._choose(name, m))

    @torch.no_grad()
    def _choose(self, name: str, m: RoSA) -> Tensor:
        """The mask of one layer; its score is given up."""
        score = self._sums.pop(name, None)
        if score is None:
            score = torch.zeros(m.shape, dtype=torch.float32, device=m.index.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(score, group=self.group)
        top = float(score.abs_().amax())
        if not top < float("inf"):
            raise ValueError(
                f"RoSASchedule: the collected score of {name!r} is not finite (largest entry {top}), so no mask can be chosen; look "
                "for NaN or overflow in the loss of the collecting steps."
            )
        if top == 0.0:
            warnings.warn(f"RoSASchedule: no gradient reached {name!r} while collecting; its mask is its first entries.", stacklevel=2)
        flat = largest(score, m.index.shape[1])
        return torch.stack([flat // m.shape[1], flat % m.shape[1]])

    def state_dict(self) -> dict[str, Any]:
        return self._settings() | {"sums": {n: s.clone() for n, s in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = self._settings()
        wrong = {k: (state.get(k), v) for k, v in own.items() if state.get(k) != v}
        if wrong or "sums" not in state:
            raise ValueError(f"RoSASchedule: the state is of another schedule (state, here): {wrong or 'no sums'}.")
        self._sums = {n: s.clone() for n, s in state["sums"].items()}

    def _settings(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "grads": self.grads, "score": self.score}


def sparse_layers(model: nn.Module) -> dict[str, RoSA]:
    """The rosa parts that have a sparse part, by the name of their layer (of DDP and compiled models: the inner one's)."""
    return {n: m for n, m in parts_of(model, RoSA).items() if m.values is not None}
