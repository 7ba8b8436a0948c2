"""The examples that early stopping looks at: a share of the training data, held out for this alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastpeft.job.data import Texts, taken
from fastpeft.job.errors import JobError
from fastpeft.job.settings import Settings
from fastpeft.job.split import near_copies, same_text, split


@dataclass(frozen=True)
class Validation:
    """texts, class numbers (None for language modelling) and domains (None without) that no arm trains on and no figure
    is reported for."""

    texts: list[str]
    labels: list[int] | None
    domains: list[int] | None = None


def together(texts: Texts, settings: Settings) -> list[int]:
    """A group number per training text: those that the job's own split keeps on one side share one."""
    return near_copies(texts.train) if settings.data is None else same_text(texts.train)


def hold_out(texts: Texts, settings: Settings) -> tuple[Texts, Validation | None]:
    """`texts` without the validation examples, and those; `texts` itself and None without early stopping.

    The split is stratified, drawn from settings.split_seed, and keeps together what the job's own split keeps
    together. Raises JobError where it would leave nothing to look at.
    """
    if settings.patience is None:
        return texts, None
    strata = texts.train_labels or [0] * len(texts.train)
    train, held = split(together(texts, settings), strata, share=settings.validation_share, seed=settings.split_seed)
    if not held or not train:
        raise JobError(
            f"finetune: --patience {settings.patience}: {len(texts.train)} training rows leave none to hold out for early "
            "stopping; give more rows, or train without --patience."
        )
    note = f", {len(held)} of the training examples held out for early stopping"
    labels, domains = texts.train_labels, texts.train_domains
    rest = replace(
        texts,
        train=[texts.train[k] for k in train],
        train_labels=taken(labels, train),
        train_domains=taken(domains, train),
        description=texts.description + note,
    )
    return rest, Validation([texts.train[k] for k in held], taken(labels, held), taken(domains, held))
