"""A sweep of which `make test` runs enough to see every combination of few values, and `make accept` all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest


def thinned(cases: Iterable[Sequence[Hashable]], together: int = 2, name: Callable[[Any], str] | None = None) -> list[Any]:
    """A pytest.param of each case (whole, if there is a name for it; else spread); those marked accept hold no new combination.

    In order, a case is kept unmarked where any `together` of its values, at their places, occur together in no case before it.
    """
    seen: set[tuple[tuple[int, Hashable], ...]] = set()
    params = []
    for case in cases:
        new = set(itertools.combinations(enumerate(case), together)) - seen
        seen |= new
        marks = () if new else (pytest.mark.accept,)
        params.append(pytest.param(*case, marks=marks) if name is None else pytest.param(case, marks=marks, id=name(case)))
    return params
