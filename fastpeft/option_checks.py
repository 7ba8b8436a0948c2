"""What options are held against where a method is built: each raises with who asked, what came and what is needed."""

from __future__ import annotations

import math
from typing import Any

from fastpeft.registry import Site


def check_rank(who: str, rank: Any, site: Site) -> None:
    """Raise unless rank is an int between 1 and the smaller side of the layer."""
    limit = min(site.out_features, site.in_features)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{who}: rank={rank!r} at {site.name!r}; it must be an int.")
    if not 1 <= rank <= limit:
        raise ValueError(
            f"{who}: rank={rank} at {site.name!r} ({site.in_features} -> {site.out_features}); it must be 1 to {limit}, "
            "the smaller side of the layer. Lower it there with rank_pattern, or exclude the layer."
        )


def check_int(who: str, name: str, value: Any, low: int, high: int | None, where: str, limit: str = "") -> int:
    """Raise TypeError unless value is an int, ValueError unless low <= value <= high; `limit` says what `high` is."""
    span = f"at least {low}" if high is None else f"{low} to {high}{', ' + limit if limit else ''}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{who}: {name}={value!r} at {where!r}; it must be an int, {span}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{who}: {name}={value} at {where!r}; it must be {span}.")
    return value


def check_probability(who: str, name: str, p: Any) -> float:
    """Raise unless p is a number in [0, 1); returns it as a float."""
    if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0.0 <= p < 1.0:
        raise ValueError(f"{who}: {name}={p!r}; it must be a number of at least 0 and less than 1.")
    return float(p)


def check_finite(who: str, name: str, value: Any) -> float:
    """Raise unless value is a finite number; returns it as a float."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int of more digits than a float has room for
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{who}: {name}={str(value)[:40] if number == math.inf else repr(value)}; it must be a finite number.")
    return number
