"""GaLore's projections: refreshed from the gradient of W every so many steps; each step of the optimiser moved into W."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.adapter import weight_of
from fastpeft.method.galore import GaLore
from fastpeft.train.layers import held, inner, parts_of, take_charge
from fastpeft.train.lora_fa import HFAdamW
from fastpeft.train.optimizer import split_each
from fastpeft.train.protocol import Context, Procedure


class GaLoreAdamW(HFAdamW):
    """galore-torch's AdamW: eps is added before v's bias is corrected (torch's after), weight decay comes last; eps 1e-6 by default.

    With it GaLoreProjection equals galore_torch.GaLoreAdamW step by step. Any other optimiser works too: bitsandbytes' AdamW8bit is
    GaLoreAdamW8bit, Transformers' Adafactor(scale_parameter=False, relative_step=False) is GaLoreAdafactor.
    """


class GaLoreProjection(Procedure):
    """Refresh the projections of `galore` layers at steps 0, gap, 2 gap, ..., and move what the optimiser did to Z into W.

    In a step that refreshes, the gradient G of each layer's weight is summed over the micro-batches and dropped as soon as the
    layer's last one is through; in others it is never formed. The layers' Z are groups of their own in the optimiser, whose weight
    decay acts on W after the step, with the group's learning rate. Everything else trains in the groups that it was in.
    per_layer: each parameter is stepped inside of the last backward of a step, as soon as its gradient is complete, and the gradient
        is dropped; the loop's optimizer.step() then finds nothing to do. No clipping, no gradient scaler and no DDP then. With
        accumulation the gradients wait for the step's last backward, which costs their memory (the official script steps once
        per micro-batch).
    group: the process group whose ranks see different data; G is averaged over it, and all take the first rank's projections.

    Under DDP give broadcast_buffers=False, or every forward sends the projections. RuntimeError for per_layer with several ranks.
    """

    def __init__(self, *, per_layer: bool = False, group: Any = None):
        self.per_layer, self.group = per_layer, group
        self._layers: dict[str, GaLore] = {}
        self._by_z: dict[nn.Parameter, tuple[str, GaLore]] = {}
        self._sums: dict[str, Tensor] = {}
        self._projected: dict[str, Tensor] = {}
        self._micro, self._checked, self._broken = 0, False, ""

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return split_each(groups, [m.Z for m in parts_of(model, GaLore).values()])

    def on_train_begin(self, ctx: Context) -> None:
        self._layers = take_charge(ctx, GaLore, "GaLoreProjection", "galore")
        self._by_z = {m.Z: (n, m) for n, m in self._layers.items()}
        self._checked = False
        own = held(ctx.optimizer)
        if missing := [n for n, m in self._layers.items() if m.Z not in own]:
            raise ValueError(
                f"GaLoreProjection: the optimiser does not hold Z of {missing[0]!r}; make it with "
                "fastpeft.train.build_optimizer(model, procedures, ...)."
            )
        for group in ctx.optimizer.param_groups:
            self._take_decay(group)
        ctx.closing.callback(self._release)
        if self.per_layer:
            if _distributed():
                raise RuntimeError("GaLoreProjection: per_layer=True would step before the ranks' gradients are averaged; leave it out.")
            for p in own:
                ctx.closing.callback(p.register_post_accumulate_grad_hook(partial(self._ready, ctx)).remove)

    def _take_decay(self, group: dict[str, Any]) -> None:
        """Weight decay of Z's group is W's; Z, which starts each step at zero, has none."""
        own = [p for p in group["params"] if p in self._by_z]
        if own and len(own) < len(group["params"]) and group.get("weight_decay"):
            raise ValueError(
                "GaLoreProjection: a group of the optimiser holds Z beside other parameters and has weight decay; make it with "
                "fastpeft.train.build_optimizer(model, procedures, ...)."
            )
        if own:
            group.setdefault("decay_of_w", group.get("weight_decay", 0.0))
            if "weight_decay" in group:
                group["weight_decay"] = 0.0

    def _release(self) -> None:
        for m in self._layers.values():
            m.collect(None)
        self._forget()

    def _forget(self) -> None:
        self._sums, self._projected, self._broken = {}, {}, ""

    def on_step_begin(self, ctx: Context) -> None:
        self._micro = 0
        self._forget()
        if not self._checked:
            stale = [n for n, m in self._layers.items() if ctx.step % m.gap and m.untouched]
            if stale:
                raise RuntimeError(
                    f"GaLoreProjection: {stale[0]!r} has no projection at step {ctx.step}; read the model's state of that step first."
                )
            self._checked = True
        for name, m in self._layers.items():
            if (ctx.step % m.gap == 0) != (m.leaf is not None):
                m.collect(None if m.leaf is not None else partial(self._take, ctx, name))

    def _take(self, ctx: Context, name: str, grad: Tensor) -> None:
        """One micro-batch's G of a layer, in a step that refreshes."""
        if ctx.silent:
            return
        if name in self._projected:
            raise RuntimeError(
                f"GaLoreProjection: {name!r} had two gradients in one backward, as reentrant checkpointing of a layer that is used "
                "twice gives; use use_reentrant=False."
            )
        with torch.no_grad():
            G = self._sums.pop(name).add_(grad) if name in self._sums else grad
        if self._micro < ctx.accumulation - 1 or _distributed():
            self._sums[name] = G
            return
        self._projected[name] = self._refreshed(name, G)
        if self.per_layer:
            self._set(name)
            self._step_one(ctx, self._layers[name].Z)

    def _refreshed(self, name: str, G: Tensor) -> Tensor:
        """New projections from G, and what they make of it; NaN, at which a gradient scaler skips, where G is not finite."""
        m = self._layers[name]
        if not bool(G.isfinite().all()):
            self._broken = name
            return torch.full_like(m.Z, math.nan)
        m.refresh(G)
        if _distributed():
            for P in (P for P in (m.right, m.left) if P is not None):
                torch.distributed.broadcast(P, group=self.group, group_src=0)
        return m.project(G)

    def _set(self, name: str) -> None:
        Z, R = self._layers[name].Z, self._projected[name]
        if Z.grad is None:
            Z.grad = R
        else:
            Z.grad.copy_(R)

    def after_backward(self, ctx: Context, micro: int, is_last: bool) -> None:
        self._micro += 1
        if is_last:
            self._finish()
        if is_last and self.per_layer:
            for name in self._projected:  # Z's own gradient, by the old projection, may come after G
                self._layers[name].Z.grad = None

    @torch.no_grad()
    def _finish(self, late: bool = False) -> None:
        """Gradients of Z by the new projections, in a step that refreshes. late: they were unscaled and clipped already."""
        waiting = self._sums
        if _distributed():
            waiting = {n: waiting.get(n, None) for n, m in self._layers.items() if m.leaf is not None}
        for name, G in waiting.items():
            m = self._layers[name]
            if _distributed():
                G = torch.zeros(m.shape, dtype=m.Z.dtype, device=m.Z.device) if G is None else G
                torch.distributed.all_reduce(G, group=self.group)
                G /= torch.distributed.get_world_size(self.group)
            factor = 1.0
            if late and m.Z.grad is not None and (norm := float(m.project(G).norm())) > 0.0:
                factor = float(m.Z.grad.norm()) / norm  # Z's gradient by the old projection went through both
            self._projected[name] = self._refreshed(name, G) * factor
        self._sums = {}
        if late or not self.per_layer:
            for name in self._projected:
                self._set(name)

    def before_step(self, ctx: Context) -> None:
        if self._sums:  # the step has fewer micro-batches than `accumulation`
            self._finish(late=True)

    def after_step(self, ctx: Context, skipped: bool) -> None:
        if not skipped:
            for group in ctx.optimizer.param_groups:
                for p in group["params"]:
                    if p in self._by_z and p.grad is not None:
                        self._move(ctx, p, group)

    def _move(self, ctx: Context, Z: nn.Parameter, group: dict[str, Any]) -> None:
        name, m = self._by_z[Z]
        if self._broken:
            with torch.no_grad():
                Z.zero_()
            raise ValueError(
                f"GaLoreProjection: the gradient of {self._broken!r} is not finite at step {ctx.step}, so no projection can be made of it; "
                "look for NaN or overflow in the loss."
            )
        W = weight_of(inner(ctx.model).get_submodule(name)).detach()
        m.fold(W, float(group["lr"]) * group["decay_of_w"])

    # --- per_layer

    def _ready(self, ctx: Context, p: nn.Parameter) -> None:
        """p's gradient of this backward is complete."""
        if ctx.silent or self._micro < ctx.accumulation - 1:
            return
        if p in self._by_z and self._by_z[p][1].leaf is not None:
            return  # it waits for G
        self._step_one(ctx, p)

    def _step_one(self, ctx: Context, p: nn.Parameter) -> None:
        groups = ctx.optimizer.param_groups
        whole = [g["params"] for g in groups]
        mine = next(g for g in groups if any(p is q for q in g["params"]))
        ctx.silent = True  # the runner counts the loop's own step
        try:
            for g in groups:
                g["params"] = [p] if g is mine else []
            ctx.optimizer.step()
        finally:
            ctx.silent = False
            for g, params in zip(groups, whole, strict=True):
                g["params"] = params
        if p in self._by_z:
            self._move(ctx, p, mine)
        p.grad = None


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
