"""A weight replaced by its best low-rank approximation ("r") or by a sparse one ("s"): the frozen bases of R- and S-LoDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_int
from fastpeft.registry import Site
from fastpeft.start.pissa import principal
from fastpeft.stored import DenseWeight, FactoredWeight


def check_base(who: str, site: Site, kind: Any, rank: Any, density: Any) -> tuple[str | None, Any]:
    """(kind, its rank or density); raises ValueError / TypeError, naming the site, for what does not fit."""
    if kind not in (None, "r", "s"):
        raise ValueError(f"{who}: base={kind!r}; it must be None, 'r' (low rank) or 's' (sparse).")
    for name, value, needs in (("base_rank", rank, "r"), ("base_density", density, "s")):
        if (value is None) == (kind == needs):
            what = "and only there" if kind != needs else "a size that has no default"
            raise ValueError(f"{who}: base={kind!r} with {name}={value!r}; base={needs!r} takes {name}, {what}.")
    if kind == "r":
        check_int(who, "base_rank", rank, 1, min(site.out_features, site.in_features), site.name, "the layer's smaller side")
        return kind, rank
    if density == "2:4":
        if site.in_features % 4:
            raise ValueError(f"{who}: base_density='2:4' at {site.name!r} with in={site.in_features}; four must divide it.")
    elif kind == "s" and (isinstance(density, (bool, str)) or not 0.0 < density <= 1.0):
        raise ValueError(f"{who}: base_density={density!r}; it must be a number above 0 and up to 1, or '2:4'.")
    return kind, density


def replaced(base: Any, kind: str | None, size: Any, weight: Callable[[], Tensor], blank: bool) -> nn.Module | None:
    """The module for a layer's base, as check_base gave kind and size; blank: room only."""
    if kind == "r":
        return FactoredWeight.room(base, size) if blank else FactoredWeight(*(f.to(base.dtype) for f in low_rank(weight(), size)))
    if kind == "s":
        return DenseWeight.room(base) if blank else DenseWeight(pruned(weight(), size).to(base.dtype))
    return None


def low_rank(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [out, rank] and V [rank, in], U V the best approximation of W; each holds the roots of the singular values."""
    V, U = principal(W, rank)
    return U, V


def pruned(W: Tensor, density: Any) -> Tensor:
    """W without its smallest entries in magnitude: a share `density` stays, or "2:4": two of any four neighbours in a row."""
    if density == "2:4":
        groups = W.abs().reshape(-1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)
    else:
        flat = W.abs().flatten()
        keep = torch.zeros_like(flat, dtype=torch.bool)
        keep[flat.topk(max(1, round(density * flat.numel()))).indices] = True
    return torch.where(keep.view_as(W), W, 0.0)
