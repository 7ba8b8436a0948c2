"""--heads auto: the number of HydraLoRA's heads, chosen from the training texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastpeft.job.errors import JobError, require
from fastpeft.job.settings import Settings

AUTO = "auto"


def with_heads(settings: Settings, texts: Sequence[str]) -> Settings:
    """The settings with the option heads="auto", if that is what they say, replaced by a number. JobError where none can be found."""
    if settings.options.get("heads") != AUTO:
        return settings
    from fastpeft.data import suggest_heads

    require("--heads auto", "sklearn")
    try:
        found = suggest_heads(texts, seed=settings.split_seed)
    except ValueError as e:
        raise JobError(f"finetune: --heads auto: {e}") from None
    print(f"heads: {found.heads} (mean silhouette {found.silhouette[found.heads]:.3f}; tried {min(found.silhouette)} to {max(found.silhouette)})", flush=True)
    return replace(settings, options=dict(settings.options) | {"heads": found.heads})
