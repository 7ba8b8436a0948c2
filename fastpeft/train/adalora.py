"""AdaLoRA's schedule: one budget of ranks for all layers, which falls with the steps, and goes to the triplets that matter most.

An entry w of A, B or E has I = |w dL/dw|, smoothed to S <- beta1 S + (1 - beta1) I, and U <- beta2 U + (1 - beta2) |I - S|; a triplet
(row of A, column of B, entry of E) is scored by `importance` of S and U (fastpeft.method.adalora). Where b of b0 ranks may stay,
E is set to zero where the score is at most the (b0 - b)-th smallest of all layers.

Paper: arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpeft.method.adalora import AdaLoRA, importance
from fastpeft.option_checks import check_finite, check_int
from fastpeft.record import RECORD, Adaptation
from fastpeft.train.layers import count_each, inner, take_charge
from fastpeft.train.protocol import Context, Procedure

# fields of PEFT's AdaLoraConfig -> arguments
READS = {"target_r": "target_rank", "total_step": "total_steps"} | {
    n: n for n in ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
}


class AdaLoRASchedule(Procedure):
    """Masks ranks of every adalora layer after a step t = 0, 1, ..., T - 1, and adds the orthogonality penalty to the loss.

    target_rank: ranks per layer in the end, on average; None: two thirds of the layers' own (12 -> 8), as the authors have b0 = 1.5 bT.
    total_steps: T; None: what attach was told (attach(..., total_steps=...)).
    tinit, tfinal, deltaT: up to step tinit all ranks stay; then the budget is b(t) = int(bT + (b0 - bT) (1 - (t - tinit) /
        (T - tfinal - tinit))^3), and the steps divisible by deltaT mask; step T - tfinal masks in any case, by the scores of the
        step before, and its choice is applied again after each further step, for a masked E has a gradient. With tfinal=0 the
        last step, T - 1, is that step, with scores of its own.
    beta1, beta2: of the two averages.
    orth_reg_weight: the penalty is this times the mean over the layers' A and B of the unsquared ||A A^T - I||_F, ||B^T B - I||_F;
        the loss must be the model's own output. 0 adds none.

    The numbers of steps, names and defaults are PEFT's, `from_config` reads them from an AdaLoraConfig. Scores use the new w, and
    the gradient that the step was taken with: accumulated, averaged over ranks by DDP, clipped. Equal scores are masked
    together, so fewer ranks than b may stay, in a layer also none. A step that a gradient scaler skips is none, so the run is
    shorter by it: leave a tfinal of more than those. A run that ends before step T - tfinal keeps the ranks of its last mask,
    and those that came back since. An adapter folder saved since that step is PEFT's: without the masked ranks.
    Raises ValueError on other arguments, a target above the layers' ranks, and scores that are not finite.
    """

    PROGRESS: ClassVar = "ranks"

    def __init__(
        self,
        target_rank: int | None = None,
        *,
        total_steps: int | None = None,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
    ):
        for name, value, low in (("target_rank", target_rank, 1), ("total_steps", total_steps, 1)):
            if value is not None:
                check_int("AdaLoRASchedule", name, value, low, None, name)
        for name, value, low in (("tinit", tinit, 0), ("tfinal", tfinal, 0), ("deltaT", deltaT, 1)):
            check_int("AdaLoRASchedule", name, value, low, None, name)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 < check_finite("AdaLoRASchedule", name, beta) < 1.0:
                raise ValueError(f"AdaLoRASchedule: {name}={beta}; it must be more than 0 and less than 1.")
        if check_finite("AdaLoRASchedule", "orth_reg_weight", orth_reg_weight) < 0:
            raise ValueError(f"AdaLoRASchedule: orth_reg_weight={orth_reg_weight}; it must be at least 0.")
        self.target_rank, self.total_steps = target_rank, total_steps
        self.tinit, self.tfinal, self.deltaT = tinit, tfinal, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = float(beta1), float(beta2), float(orth_reg_weight)
        self._layers: dict[str, AdaLoRA] = {}
        self._total = self._start = self._target = 0  # T, b0, bT
        self._sensitivity: dict[str, Tensor] = {}  # by name of the parameter: up.A
        self._uncertainty: dict[str, Tensor] = {}
        self._pattern: dict[str, Tensor] = {}  # by layer, from step T - tfinal on: bool [rank], True stays
        self._resumed = 0  # T of the state that was loaded

    @classmethod
    def from_config(cls, config: Any) -> AdaLoRASchedule:
        """The schedule of a peft AdaLoraConfig, or of its fields; what else it says is adapt's."""
        fields = dict(config) if isinstance(config, Mapping) else config.to_dict()
        kind = fields.get("peft_type")
        if getattr(kind, "value", kind) != "ADALORA":
            raise ValueError(f"AdaLoRASchedule.from_config: peft_type is {kind!r}; it must be 'ADALORA' (peft.AdaLoraConfig).")
        return cls(**{own: fields[theirs] for theirs, own in READS.items() if theirs in fields})

    def on_train_begin(self, ctx: Context) -> None:
        total = ctx.total_steps if self.total_steps is None else self.total_steps
        if total is None:
            raise ValueError(
                "AdaLoRASchedule: the steps of the whole run are not known; give total_steps, here or to fastpeft.train.attach."
            )
        if self.tinit >= total - self.tfinal:
            raise ValueError(
                f"AdaLoRASchedule: tinit={self.tinit} and tfinal={self.tfinal} leave none of {total} steps to give ranks away; tinit must "
                "be less than total_steps - tfinal."
            )
        layers = take_charge(ctx, AdaLoRA, "AdaLoRASchedule", "adalora")
        ctx.closing.callback(self._release)
        start = sum(len(m.E) for m in layers.values())
        target = max(1, start * 2 // 3) if self.target_rank is None else self.target_rank * len(layers)
        if target > start:
            raise ValueError(
                f"AdaLoRASchedule: target_rank={self.target_rank} at {len(layers)} layers is {target} ranks, and they have {start}; it "
                "must not be more than their rank, which falls to it."
            )
        self._layers, self._total, self._start, self._target = layers, total, start, target
        self._fit_state()
        self._note(ctx)

    def _release(self) -> None:
        self._layers = {}

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks in use by layer, while attached."""
        return count_each({n: m.E for n, m in self._layers.items()})

    def progress(self) -> dict[str, int]:
        """`ranks`; before the first step, where every E is zero and none was masked, all."""
        found = self.ranks
        return found if any(found.values()) else {n: len(m.E) for n, m in self._layers.items()}

    def budget(self, step: int) -> tuple[int, bool]:
        """(ranks that may stay in all layers together, whether the step masks), while attached."""
        if step >= self._last:
            return self._target, True
        if step <= self.tinit:
            return self._start, False
        left = 1 - (step - self.tinit) / (self._total - self.tfinal - self.tinit)
        return int((self._start - self._target) * left**3 + self._target), step % self.deltaT == 0

    @property
    def _last(self) -> int:
        """The step whose mask is the last that is chosen."""
        return min(self._total - self.tfinal, self._total - 1)

    def extra_loss(self, ctx: Context) -> Tensor | None:
        if not self.orth_reg_weight:
            return None
        norms = [m.orthogonality() for m in self._layers.values()]
        return torch.stack([n.to(norms[0].device) for n in norms]).mean() * (self.orth_reg_weight / 2)

    @torch.no_grad()
    def after_step(self, ctx: Context, skipped: bool) -> None:
        if skipped:
            return
        if not self._pattern:
            if ctx.step < self._total - self.tfinal or not self._sensitivity:
                self._average()
            budget, masks = self.budget(ctx.step)
            if not masks:
                return
            keep = self._choose(budget)
            if ctx.step >= self._last:
                self._pattern = keep
                self._sensitivity, self._uncertainty = {}, {}
                self._note(ctx)
        else:
            keep = self._pattern
        for name, m in self._layers.items():
            m.mask(keep[name])

    def _average(self) -> None:
        """Take one step into S and U. A parameter without a gradient had no part in the loss: its I is zero."""
        params = {f"{n}.{leaf}": p for n, m in self._layers.items() for leaf, p in (("A", m.A), ("E", m.E), ("B", m.B))}
        if all(p.grad is None for p in params.values()):
            raise RuntimeError(
                "AdaLoRASchedule: after optimizer.step() no adalora parameter has a gradient, so nothing can be scored; call zero_grad "
                "after the step."
            )
        for name, p in params.items():
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs_()
            if name not in self._sensitivity:
                self._sensitivity[name], self._uncertainty[name] = torch.zeros_like(p), torch.zeros_like(p)
            S = self._sensitivity[name].mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            self._uncertainty[name].mul_(self.beta2).add_((now - S).abs_(), alpha=1 - self.beta2)

    def _choose(self, budget: int) -> dict[str, Tensor]:
        """bool [rank] by layer: which ranks stay."""
        scores = {n: importance(*({x: t[f"{n}.{x}"] for x in "AEB"} for t in (self._sensitivity, self._uncertainty))) for n in self._layers}
        every = torch.cat([s.to(next(iter(scores.values())).device) for s in scores.values()])
        if not bool(every.isfinite().all()):
            raise ValueError("AdaLoRASchedule: the scores are not finite, so no rank can be chosen; look for NaN or overflow in the loss.")
        if budget >= self._start:
            return {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
        limit = every.kthvalue(self._start - budget).values
        return {n: s > limit.to(s.device) for n, s in scores.items()}

    def _note(self, ctx: Context) -> None:
        """Write the schedule, and the final pattern, down for the adapter folder: the fields of PEFT's config that adapt does not know."""
        for path, root in inner(ctx.model).named_modules():
            record: Adaptation | None = root.__dict__.get(RECORD)
            if record is not None:
                record.peft_fields = {theirs: getattr(self, own) for theirs, own in READS.items()}
                record.peft_fields |= {"target_r": max(1, self._target // len(self._layers)), "total_step": self._total}
                if self._pattern:
                    at = f"{path}." if path else ""
                    inside = {n.removeprefix(at): keep for n, keep in self._pattern.items() if n.startswith(at)}
                    record.peft_fields["rank_pattern"] = {f"{n}.lora_E": keep.tolist() for n, keep in inside.items()}

    def state_dict(self) -> dict[str, Any]:
        averages = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty, "pattern": self._pattern}
        copies = {key: {n: t.clone() for n, t in tensors.items()} for key, tensors in averages.items()}
        return {"settings": self._settings(), "total": self._total, **copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own, came = self._settings(), state.get("settings", {})
        wrong = {k: (came.get(k), v) for k, v in own.items() if came.get(k) != v}
        if wrong or not {"total", "sensitivity", "uncertainty", "pattern"} <= state.keys():
            raise ValueError(f"AdaLoRASchedule: the state is of another schedule (state, here): {wrong or 'parts are missing'}.")
        self._sensitivity, self._uncertainty, self._pattern = (
            {n: t.clone() for n, t in state[key].items()} for key in ("sensitivity", "uncertainty", "pattern")
        )
        self._resumed = int(state["total"])
        if self._layers:
            self._fit_state()

    def _fit_state(self) -> None:
        """The state's tensors where the layers are; ValueError if they are of other layers, or of a run of another length."""
        if self._resumed not in (0, self._total):
            raise ValueError(f"AdaLoRASchedule: the state is of a run of {self._resumed} steps, and this one has {self._total}.")
        params = {f"{n}.{leaf}": p for n, m in self._layers.items() for leaf, p in m.named_parameters()}
        masks = {n: m.E[:, 0] for n, m in self._layers.items()}
        for tensors, like in ((self._sensitivity, params), (self._uncertainty, params), (self._pattern, masks)):
            wrong = sorted({n for n in tensors if n not in like or tensors[n].shape != like[n].shape} | (like.keys() - tensors.keys()))
            if tensors and wrong:
                raise ValueError(f"AdaLoRASchedule: the state is of other layers than the model's: {', '.join(wrong[:4])}.")
            tensors.update({n: t.to(like[n].device) for n, t in tensors.items()})

    def _settings(self) -> dict[str, Any]:
        return {own: getattr(self, own) for own in READS.values()}
