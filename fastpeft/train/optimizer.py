"""The optimiser's parameter groups, which procedures may rearrange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastpeft.registry import Holder, Method
from fastpeft.train.protocol import Procedure


def build_optimizer(
    model: nn.Module,
    procedures: Sequence[Procedure],
    cls: Callable[..., Optimizer],
    lr: float,
    **options: Any,
) -> Optimizer:
    """cls(groups, lr=lr, **options) over the model's trainable parameters, in groups as the procedures want them.

    Raises ValueError if nothing trains, or if a procedure leaves out a trainable parameter, repeats one or adds a frozen one.
    """
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    if not names:
        raise ValueError(f"build_optimizer: no parameter of this {type(model).__name__} trains; call fastpeft.adapt first.")
    groups: list[dict[str, Any]] = [{"params": list(names), "lr": lr}]
    for procedure in procedures:
        groups = [g for g in procedure.param_groups(model, groups) if g["params"]]
        held = [p for g in groups for p in g["params"]]
        wrong = [n for p, n in names.items() if sum(p is q for q in held) != 1] if len(held) != len(names) else []
        if wrong or set(held) != set(names):
            raise ValueError(
                f"build_optimizer: {type(procedure).__name__}.param_groups returned {len(held)} parameters for {len(names)} that "
                f"train; each belongs in exactly one group{': ' + ', '.join(wrong[:4]) if wrong else ''}."
            )
    return cls(groups, lr=lr, **options)


def check_groups(model: nn.Module, procedures: Sequence[Procedure], optimizer: Optimizer, who: str) -> None:
    """ValueError if a group of the optimiser holds parameters that the procedures keep apart."""
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = [{"params": list(names), "lr": 1.0}]
    for procedure in procedures:
        groups = procedure.param_groups(model, groups)
    place = {p: k for k, g in enumerate(groups) for p in g["params"]}
    for group in optimizer.param_groups:
        first: dict[int, str] = {}
        for p in group["params"]:
            if p in place:
                first.setdefault(place[p], names.get(p, "?"))
        if len(first) > 1:
            raise ValueError(
                f"{who}: the optimiser has {' and '.join(list(first.values())[:2])} in one group, which "
                f"{', '.join(type(p).__name__ for p in procedures)} gives settings of their own; make it with "
                "fastpeft.train.build_optimizer(model, procedures, ...)."
            )


def with_role(model: nn.Module, role: str) -> list[nn.Parameter]:
    """Every adapter parameter of that role (a method's ROLES), each once."""
    found: dict[nn.Parameter, None] = {}
    for module in model.modules():
        if isinstance(module, (Method, Holder)):
            found |= {p: None for n, p in module.named_parameters() if module.ROLES.get(n.split(".")[0]) == role}
    return list(found)


def split_each(groups: list[dict[str, Any]], chosen: Iterable[nn.Parameter], **settings: Any) -> list[dict[str, Any]]:
    """Each group in two: without the chosen parameters, and those of them that it held, with its settings and these."""
    out, found = set(chosen), []
    for g in groups:
        found.append(g | {"params": [p for p in g["params"] if p not in out]})
        found.append(g | {"params": [p for p in g["params"] if p in out], **settings})
    return [g for g in found if g["params"]]


def split_off(groups: list[dict[str, Any]], chosen: Iterable[nn.Parameter], **settings: Any) -> list[dict[str, Any]]:
    """The groups with the chosen parameters taken out into one of their own, which has these settings (lr, weight_decay, ...)."""
    out = set(chosen)
    rest = [g | {"params": [p for p in g["params"] if p not in out]} for g in groups]
    return [*rest, {"params": [p for g in groups for p in g["params"] if p in out], **settings}]
