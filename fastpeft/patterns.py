"""Options that differ from layer to layer, said by patterns of their names, as PEFT's rank_pattern and alpha_pattern say them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def by_pattern(name: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    """The first value of rank_pattern / alpha_pattern whose key matches the end of `name` as PEFT matches it, or default."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default


def check_pattern(option: str, pattern: Any) -> None:
    """ValueError unless a rank_pattern or alpha_pattern is None, or an object whose names are regular expressions."""
    if pattern is None:
        return
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise ValueError(f"adapt: {option}={pattern!r}; it must map names or regular expressions of layers to values.")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as e:
            raise ValueError(f"adapt: {option} holds {key!r}, which is no valid regular expression ({e}).") from None


def per_layer(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The option `key` with the commonest value, and a pattern for the layers that have another."""
    ((common, _),) = Counter(values.values()).most_common(1)
    # anchored: a pattern would also hit the layers whose name it ends
    return {key: common, f"{key}_pattern": {f"^{re.escape(n)}$": v for n, v in values.items() if v != common}}


def exactly(names: Iterable[str]) -> str:
    """A regex of these names alone."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"
