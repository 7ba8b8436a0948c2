"""LISA's draw: which blocks train, and what becomes of the optimiser's state of those that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastpeft.method.lisa import LISA
from fastpeft.option_checks import check_int
from fastpeft.record import RECORD
from fastpeft.targets import output_head
from fastpeft.train.layers import held, inner, seeded, take_charge
from fastpeft.train.protocol import Context, Procedure

POLICIES = ("drop", "drop_all", "keep", "offload")


class LISASchedule(Procedure):
    """Every `interval` steps draw `active` blocks, without repetition; they train with all that lies outside of the blocks.

    Steps are those that the optimiser took, so accumulation shortens no interval. A frozen parameter has grad None, whatever
    zero_grad does, so no optimiser moves it.
    state_policy: of the optimiser's state at a draw. "drop": that of blocks which leave goes, so one that enters begins afresh.
        "drop_all": all of it goes, of embeddings and head too. "keep": nothing; it grows to that of all blocks. "offload": it waits
        on the CPU.
    seed: the draw of interval i is a function of (seed, i), the same on all ranks and after a resume.
    final_norm: False freezes what is outside of the blocks and neither embedding, output head nor one of modules_to_save.
    blocks: names of the blocks; None: the children of the outermost nn.ModuleList on the path of each adapted layer.

    The optimiser must hold every trainable parameter: make it after adapt and before attach. Under DDP it needs
    find_unused_parameters=True. torch.compile over the whole model makes a graph per draw; compile block by block. Raises ValueError
    on other arguments.
    """

    def __init__(
        self,
        active: int = 2,
        interval: int = 20,
        state_policy: str = "drop",
        *,
        seed: int = 0,
        final_norm: bool = True,
        blocks: Sequence[str] | None = None,
    ):
        self.active = check_int("LISASchedule", "active", active, 1, None, "active")
        self.interval = check_int("LISASchedule", "interval", interval, 1, None, "interval")
        if state_policy not in POLICIES:
            raise ValueError(f"LISASchedule: state_policy={state_policy!r}; it must be one of {', '.join(POLICIES)}.")
        self.state_policy, self.seed, self.final_norm = state_policy, seed, final_norm
        self.blocks = None if blocks is None else list(blocks)
        self._blocks: dict[str, list[nn.Parameter]] = {}
        self._settled: int | None = None  # the interval that the optimiser's state is as the policy wants it for
        self._applied: int | None = None

    def draw(self, i: int, count: int) -> list[int]:
        """Which of `count` blocks train in interval i."""
        return sorted(torch.randperm(count, generator=seeded("lisa", self.seed, i))[: self.active].tolist())

    def on_train_begin(self, ctx: Context) -> None:
        layers = take_charge(ctx, LISA, "LISASchedule", "lisa")
        root = inner(ctx.model)
        names = blocks_of(root, layers) if self.blocks is None else self.blocks
        self._blocks = {n: [p for p in root.get_submodule(n).parameters() if p.requires_grad] for n in names}
        if self.active > len(names):
            raise ValueError(f"LISASchedule: active={self.active} of {len(names)} blocks ({', '.join(names[:3])}, ...); lower it.")
        own = held(ctx.optimizer)
        for name, parameters in self._blocks.items():
            if not parameters or any(p not in own for p in parameters):
                what = "is frozen" if not parameters else "has parameters that the optimiser does not hold"
                raise ValueError(
                    f"LISASchedule: block {name!r} {what}, so it could never train; make the optimiser after adapt and before attach, "
                    "over all parameters of the model, none frozen by hand."
                )
        inside = {p for parameters in self._blocks.values() for p in parameters}
        outside = [] if self.final_norm else _beside_ends(root, inside)
        ctx.closing.callback(_set, [*inside, *outside], True)
        _set(outside, False)
        self._apply(ctx)

    def _apply(self, ctx: Context) -> None:
        """The flags of the interval that the next step is in."""
        self._applied = ctx.step // self.interval
        chosen = self.draw(self._applied, len(self._blocks))
        for k, parameters in enumerate(self._blocks.values()):
            _set(parameters, k in chosen)

    def on_step_begin(self, ctx: Context) -> None:
        now = ctx.step // self.interval
        if now != self._applied:
            self._apply(ctx)
        if now != self._settled:
            self._settle(ctx)
            self._settled = now

    def _settle(self, ctx: Context) -> None:
        state = ctx.optimizer.state
        if self.state_policy == "drop_all":
            state.clear()
        for p in (p for parameters in self._blocks.values() for p in parameters if p in state):
            if self.state_policy == "drop" and not p.requires_grad:
                del state[p]
            elif self.state_policy == "offload":
                device = p.device if p.requires_grad else torch.device("cpu")
                state[p] = {k: v.to(device) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in state[p].items()}

    def state_dict(self) -> dict[str, Any]:
        return self._settings() | {"settled": self._settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        wrong = {k: (state.get(k), v) for k, v in self._settings().items() if state.get(k) != v}
        if wrong or "settled" not in state:
            raise ValueError(f"LISASchedule: the state is of another schedule (state, here): {wrong or 'no settled'}.")
        self._settled = state["settled"]

    def _settings(self) -> dict[str, Any]:
        return {"active": self.active, "interval": self.interval, "state_policy": self.state_policy, "seed": self.seed}


def blocks_of(model: nn.Module, names: Mapping[str, Any]) -> list[str]:
    """Children of the outermost ModuleList on the path of each named layer. ValueError where none is in any."""
    lists: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[:k]) for k in range(1, len(parts)))
        lists[next((p for p in paths if isinstance(model.get_submodule(p), nn.ModuleList)), "")] = None
    if "" in lists and len(lists) == 1:
        raise ValueError(f"LISASchedule: this {type(model).__name__} has no ModuleList of blocks; name them in blocks=[...].")
    return [f"{path}.{child}" for path in lists if path for child, _ in model.get_submodule(path).named_children()]


def _beside_ends(root: nn.Module, inside: set[nn.Parameter]) -> list[nn.Parameter]:
    """Trainable parameters outside of the blocks that are neither embedding nor head nor one of modules_to_save."""
    record = root.__dict__.get(RECORD)
    ends = {output_head(root), *(record.originals if record is not None else ())}
    kept = {p for n, m in root.named_modules() if isinstance(m, nn.Embedding) or n in ends for p in m.parameters()}
    return [p for p in root.parameters() if p.requires_grad and p not in inside and p not in kept]


def _set(parameters: Sequence[nn.Parameter], trains: bool) -> None:
    for p in parameters:
        p.requires_grad_(trains)
        if not trains:
            p.grad = None
