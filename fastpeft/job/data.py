"""Examples for one job: texts, split and labelled, and then token ids."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastpeft.job import sources, stdlib
from fastpeft.job.errors import JobError
from fastpeft.job.settings import CLASSIFICATION, Settings
from fastpeft.job.split import NEAR_COPY, near_copies, same_text, split

QUICK_PER_CLASS = 24
# what a batch calls the domain of each of its examples
DOMAIN = "domain"
T = TypeVar("T")


@dataclass(frozen=True)
class Texts:
    """What a job learns from and is judged on. classes is None for language modelling, and then so are the
    labels.

    description: one sentence for the report.   domains: their names, and of each text the number of its own; None but for
    a method whose routers learn them.
    """

    train: list[str]
    evaluation: list[str]
    train_labels: list[int] | None
    evaluation_labels: list[int] | None
    classes: list[str] | None
    description: str
    domains: list[str] | None = None
    train_domains: list[int] | None = None
    evaluation_domains: list[int] | None = None

    @property
    def majority(self) -> float | None:
        """Accuracy on the evaluation side of always answering the class that is most frequent in training."""
        if self.train_labels is None or self.evaluation_labels is None:
            return None
        top = Counter(self.train_labels).most_common(1)[0][0]
        return self.evaluation_labels.count(top) / len(self.evaluation_labels)


def load_texts(settings: Settings) -> Texts:
    """The texts that the settings name. Raises JobError on anything that cannot be trained on."""
    if settings.data is None:
        return _builtin(settings)
    label_column = settings.label_column if settings.task == CLASSIFICATION else None
    columns = sources.Columns(settings.text_column, label_column, settings.domain_column if settings.routed else None)
    rows, held = sources.read(settings.data, columns)
    dropped = rows.dropped
    if settings.eval_data is not None:
        held, _ = sources.read(settings.eval_data, columns, which="--eval-data")
        how = f"evaluated on {settings.eval_data}"
    elif held is not None:
        how = "evaluated on its own held-out split"
    else:
        rows, held = _divide(rows, settings)
        how = f"split with seed {settings.split_seed}, identical texts on one side"
    note = f", {dropped} rows with an empty text left out" if dropped else ""
    return _labelled(rows, held, f"{settings.data}, {how}{note}")


def _builtin(settings: Settings) -> Texts:
    per_class = QUICK_PER_CLASS if settings.quick else stdlib.MAX_PER_CLASS
    texts, labels = stdlib.harvest(per_class=per_class, seed=settings.split_seed)
    groups = near_copies(texts)
    train, held = split(groups, labels, share=settings.eval_share, seed=settings.split_seed)
    about = {package: domain for domain, packages in stdlib.DOMAINS.items() for package in packages}
    domains = [about[y] for y in labels] if settings.routed else None
    rows = sources.Rows(texts, labels if settings.task == CLASSIFICATION else None, domains=domains)
    return _labelled(
        _take(rows, train),
        _take(rows, held),
        f"docstrings of this Python's standard library by package ({', '.join(stdlib.PACKAGES)}), at most "
        f"{per_class} of "
        "each, the package's name masked, no text twice, near-copies (Jaccard index of three-word shingles "
        ">= "
        f"{NEAR_COPY}) on one side, split with seed {settings.split_seed}",
    )


def _take(rows: sources.Rows, index: list[int]) -> sources.Rows:
    return sources.Rows(taken(rows.texts, index), taken(rows.labels, index), domains=taken(rows.domains, index))


def taken(values: list[T] | None, index: Sequence[int]) -> list[T] | None:
    """The values at these indices; None where there are none."""
    return None if values is None else [values[k] for k in index]


def _divide(rows: sources.Rows, settings: Settings) -> tuple[sources.Rows, sources.Rows]:
    strata = rows.labels if rows.labels is not None else [""] * len(rows.texts)
    train, held = split(same_text(rows.texts), strata, share=settings.eval_share, seed=settings.split_seed)
    if not held:
        raise JobError(
            f"finetune: --data {settings.data}: {len(rows.texts)} rows, "
            f"{len(set(rows.texts))} different texts, leave none to evaluate on; "
            "give more rows, or --eval-data."
        )
    return _take(rows, train), _take(rows, held)


def _labelled(rows: sources.Rows, held: sources.Rows, description: str) -> Texts:
    classes, labels, held_labels = _numbered(rows.labels, held.labels, "label", "classification needs two classes or more")
    domains, of, held_of = _numbered(rows.domains, held.domains, "domain", "a router needs two or more to choose among")
    return Texts(rows.texts, held.texts, labels, held_labels, classes, description, domains, of, held_of)


def _numbered(
    train: list[str] | None, held: list[str] | None, what: str, why: str
) -> tuple[list[str] | None, list[int] | None, list[int] | None]:
    """The names in order, and of each row the number of its own; three times None where there are none."""
    if train is None or held is None:
        return None, None, None
    names = sorted(set(train))
    if len(names) < 2:
        raise JobError(f"finetune: every training row has the {what} {names[0]!r}; {why}.")
    unknown = sorted(set(held) - set(names))
    if unknown:
        raise JobError(f"finetune: the evaluation rows have {what}s that no training row has: {', '.join(unknown[:8])}.")
    number = {name: k for k, name in enumerate(names)}
    return names, [number[c] for c in train], [number[c] for c in held]


@dataclass(frozen=True)
class Examples:
    """Token ids per example, and a class number per example (None: the tokens themselves are predicted).

    domains: a number per example, for a method whose routers learn them.
    """

    ids: list[list[int]]
    labels: list[int] | None
    pad: int
    domains: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        """input_ids and attention_mask [n, longest] int64; labels [n], or [n, longest] with -100 where
        nothing is to learn; domain [n] where the examples have one."""
        rows = [self.ids[k] for k in index]
        width = max(len(r) for r in rows)
        ids = torch.tensor([r + [self.pad] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        labels = ids.masked_fill(mask == 0, -100) if self.labels is None else torch.tensor(taken(self.labels, index))
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return found if self.domains is None else found | {DOMAIN: torch.tensor(taken(self.domains, index))}

    def part(self, index: list[int]) -> Examples:
        """The examples at these indices."""
        return Examples([self.ids[k] for k in index], taken(self.labels, index), self.pad, taken(self.domains, index))

    def in_order(self, size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self), size):
            yield self.batch(list(range(start, min(start + size, len(self)))))

    def order(self, size: int, *, seed: int, epoch: int) -> list[list[int]]:
        """The batches of one epoch: a function of seed and epoch alone, so that a stopped run can be taken up
        again."""
        index = list(range(len(self)))
        random.Random(f"{seed} {epoch}").shuffle(index)
        return [index[start : start + size] for start in range(0, len(index), size)]


def encode(
    texts: list[str], labels: list[int] | None, tokenizer: Any, settings: Settings, domains: list[int] | None = None
) -> Examples:
    """Token ids of the texts. Classification cuts a text at max_length; language modelling cuts it into
    windows of that, each of its text's domain.

    Raises JobError if no text leaves anything to learn.
    """
    if labels is not None:
        ids = tokenizer(texts, truncation=True, max_length=settings.max_length)["input_ids"]
        return Examples(ids, labels, tokenizer.pad_token_id, domains)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    windows, of = [], []
    # verbose=False: texts longer than the model's context are cut into windows here, so the tokenizer's
    # warning misleads
    for number, row in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
        row = row + end
        own = [row[k : k + settings.max_length] for k in range(0, len(row), settings.max_length)]
        # one token has no next token to predict
        own = [w for w in own if len(w) > 1]
        windows += own
        of += [number] * len(own)
    if not windows:
        raise JobError("finetune: no text is longer than one token; there is nothing to predict.")
    return Examples(windows, None, tokenizer.pad_token_id, taken(domains, of))
