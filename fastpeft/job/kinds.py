"""How many kinds of text a method is made for: --heads auto, HydraLoRA's heads chosen from the training texts, and an expert per domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastpeft.job.errors import JobError, require
from fastpeft.job.settings import CAUSAL_LM, Settings

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


def with_experts(settings: Settings, domains: Sequence[str] | None) -> Settings:
    """The settings with an expert for each domain, in the order of the domains, where the method routes by them.

    Without the option `experts` they begin afresh; trained ones are a dict of domain -> folder. JobError where they are not these domains.
    """
    if domains is None:
        return settings
    given = settings.options.get("experts", len(domains))
    experts: object = given
    if isinstance(given, dict):
        if sorted(given) != sorted(domains):
            raise JobError(f"finetune: option 'experts' names {', '.join(map(str, given))}; the data's domains are {', '.join(domains)}: give one folder for each.")
        experts = {name: given[name] for name in domains}
    elif given != len(domains):
        raise JobError(
            f"finetune: option 'experts' is {given!r}; the data has {len(domains)} domains ({', '.join(domains)}): leave it out for fresh "
            "experts, or give a dict of domain -> folder of a trained LoRA."
        )
    # windows of running text have no prompt of their own to route by
    prompt = {"prompt": "all"} if settings.task == CAUSAL_LM else {}
    return replace(settings, options=prompt | dict(settings.options) | {"experts": experts})
