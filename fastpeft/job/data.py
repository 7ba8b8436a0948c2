"""Examples for one job: texts, split and labelled, and then token ids."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft.job import sources, stdlib
from fastpeft.job.errors import JobError
from fastpeft.job.settings import CLASSIFICATION, Settings
from fastpeft.job.split import NEAR_COPY, near_copies, same_text, split

QUICK_PER_CLASS = 24


@dataclass(frozen=True)
class Texts:
    """What a job learns from and is judged on. classes is None for language modelling, and then so are the
    labels.

    description: one sentence for the report.
    """

    train: list[str]
    evaluation: list[str]
    train_labels: list[int] | None
    evaluation_labels: list[int] | None
    classes: list[str] | None
    description: str

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
    rows, held = sources.read(settings.data, settings.text_column, label_column)
    dropped = rows.dropped
    if settings.eval_data is not None:
        held, _ = sources.read(settings.eval_data, settings.text_column, label_column, which="--eval-data")
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
    own = labels if settings.task == CLASSIFICATION else None
    return _labelled(
        _take(texts, own, train),
        _take(texts, own, held),
        f"docstrings of this Python's standard library by package ({', '.join(stdlib.PACKAGES)}), at most "
        f"{per_class} of "
        "each, the package's name masked, no text twice, near-copies (Jaccard index of three-word shingles "
        ">= "
        f"{NEAR_COPY}) on one side, split with seed {settings.split_seed}",
    )


def _take(texts: list[str], labels: list[str] | None, index: list[int]) -> sources.Rows:
    return sources.Rows([texts[k] for k in index], None if labels is None else [labels[k] for k in index])


def _divide(rows: sources.Rows, settings: Settings) -> tuple[sources.Rows, sources.Rows]:
    strata = rows.labels if rows.labels is not None else [""] * len(rows.texts)
    train, held = split(same_text(rows.texts), strata, share=settings.eval_share, seed=settings.split_seed)
    if not held:
        raise JobError(
            f"finetune: --data {settings.data}: {len(rows.texts)} rows, "
            f"{len(set(rows.texts))} different texts, leave none to evaluate on; "
            "give more rows, or --eval-data."
        )
    return _take(rows.texts, rows.labels, train), _take(rows.texts, rows.labels, held)


def _labelled(rows: sources.Rows, held: sources.Rows, description: str) -> Texts:
    if rows.labels is None or held.labels is None:
        return Texts(rows.texts, held.texts, None, None, None, description)
    classes = sorted(set(rows.labels))
    if len(classes) < 2:
        raise JobError(
            f"finetune: every training row has the label {classes[0]!r}; classification needs two classes or "
            "more."
        )
    unknown = sorted(set(held.labels) - set(classes))
    if unknown:
        raise JobError(
            f"finetune: the evaluation rows have labels that no training row has: {', '.join(unknown[:8])}."
        )
    number = {c: k for k, c in enumerate(classes)}
    return Texts(
        rows.texts,
        held.texts,
        [number[c] for c in rows.labels],
        [number[c] for c in held.labels],
        classes,
        description,
    )


@dataclass(frozen=True)
class Examples:
    """Token ids per example, and a class number per example (None: the tokens themselves are predicted)."""

    ids: list[list[int]]
    labels: list[int] | None
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: list[int]) -> dict[str, Tensor]:
        """input_ids and attention_mask [n, longest] int64; labels [n], or [n, longest] with -100 where
        nothing is to learn."""
        rows = [self.ids[k] for k in index]
        width = max(len(r) for r in rows)
        ids = torch.tensor([r + [self.pad] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        if self.labels is not None:
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": torch.tensor([self.labels[k] for k in index]),
            }
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def part(self, index: list[int]) -> Examples:
        """The examples at these indices."""
        labels = None if self.labels is None else [self.labels[k] for k in index]
        return Examples([self.ids[k] for k in index], labels, self.pad)

    def in_order(self, size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self), size):
            yield self.batch(list(range(start, min(start + size, len(self)))))

    def order(self, size: int, *, seed: int, epoch: int) -> list[list[int]]:
        """The batches of one epoch: a function of seed and epoch alone, so that a stopped run can be taken up
        again."""
        index = list(range(len(self)))
        random.Random(f"{seed} {epoch}").shuffle(index)
        return [index[start : start + size] for start in range(0, len(index), size)]


def encode(texts: list[str], labels: list[int] | None, tokenizer: Any, settings: Settings) -> Examples:
    """Token ids of the texts. Classification cuts a text at max_length; language modelling cuts it into
    windows of that.

    Raises JobError if no text leaves anything to learn.
    """
    if labels is not None:
        ids = tokenizer(texts, truncation=True, max_length=settings.max_length)["input_ids"]
        return Examples(ids, labels, tokenizer.pad_token_id)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    windows = []
    # verbose=False: texts longer than the model's context are cut into windows here, so the tokenizer's
    # warning misleads
    for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        row = row + end
        windows += [row[k : k + settings.max_length] for k in range(0, len(row), settings.max_length)]
    # one token has no next token to predict
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise JobError("finetune: no text is longer than one token; there is nothing to predict.")
    return Examples(windows, None, tokenizer.pad_token_id)
