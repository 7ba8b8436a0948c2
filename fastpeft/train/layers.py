"""Which layers a procedure is for, and how it takes charge of them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpeft.registry import Method
from fastpeft.train.protocol import Context

M = TypeVar("M", bound=Method)


def inner(model: nn.Module) -> nn.Module:
    """What a DistributedDataParallel or compiled wrapper holds."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def parts_of(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """The parts of one method, by the name of their layer."""
    found = ((n, m) for n, m in inner(model).named_modules() if isinstance(m, kind))
    return {n.rpartition("adapter.")[0].removesuffix("."): m for n, m in found}


def take_charge(ctx: Context, kind: type[M], who: str, recipe: str) -> dict[str, M]:
    """The parts of one method, attached until the runner ends. ValueError without any, RuntimeError if they are attached already."""
    found = parts_of(ctx.model, kind)
    if not found:
        raise ValueError(f"{who}: attached to a {type(ctx.model).__name__} without a {recipe} layer; adapt it with {recipe!r}.")
    if any(m.attached for m in found.values()):
        raise RuntimeError(f"{who}: the model has this procedure already; attach one.")
    _attached(found, True)
    ctx.closing.callback(_attached, found, False)
    return found


def _attached(found: Mapping[str, Method], now: bool) -> None:
    for m in found.values():
        m.attached = now


def held(optimizer: Optimizer) -> set[nn.Parameter]:
    """The parameters that the optimiser holds."""
    return {p for g in optimizer.param_groups for p in g["params"]}


def seeded(*key: int | str) -> torch.Generator:
    """A generator on the CPU that is a function of `key`: the same on every rank and after a resume."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, key)).encode()))


def count_each(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many entries of each are true, or not zero; one transfer from the device."""
    if not masks:
        return {}
    device = next(iter(masks.values())).device
    found = torch.stack([torch.count_nonzero(m).to(device) for m in masks.values()])
    return dict(zip(masks, found.tolist(), strict=True))
