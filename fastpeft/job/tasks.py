"""The tasks of a sequence: one classification data set after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastpeft.job.data import Examples, Texts, encode, load_texts
from fastpeft.job.errors import JobError
from fastpeft.job.heads import Labels
from fastpeft.job.settings import Settings

# Packages of one field in one task: what tells them apart is no single word, so the adapter has to learn it, and the
# fields have little in common, so what it learns for one is of no use to the next.
BUILTIN = (("asyncio", "multiprocessing"), ("email", "http"), ("importlib", "unittest"), ("logging", "xml"))


@dataclass(frozen=True)
class Task:
    """labels: name and classes.   data, held: what it trains on and is judged on.   majority: accuracy on `held` of always
    answering the most frequent class.   description: one sentence."""

    labels: Labels
    data: Examples
    held: Examples
    majority: float
    description: str


def load_tasks(settings: Settings, data: Sequence[str], eval_data: Sequence[str], tokenizer: Any) -> list[Task]:
    """A task per source, in order; without sources the built-in docstrings cut by BUILTIN.

    Every source is read before anything is made of one. JobError for fewer than two, one that comes twice, a number of eval_data
    that is not that of data, and whatever fastpeft.job.data refuses.
    """
    if data:
        _check(data, eval_data)
        held: Sequence[str | None] = eval_data or [None] * len(data)
        texts = [load_texts(replace(settings, data=d, eval_data=e)) for d, e in zip(data, held, strict=True)]
        names = _names(data)
    else:
        if eval_data:
            raise JobError("sequence: --eval-data without --data; the built-in tasks bring their own split.")
        whole = load_texts(settings)
        texts, names = [cut(whole, classes) for classes in BUILTIN], [" / ".join(classes) for classes in BUILTIN]
    return [_task(name, t, tokenizer, settings) for name, t in zip(names, texts, strict=True)]


def _check(data: Sequence[str], eval_data: Sequence[str]) -> None:
    if len(data) < 2:
        raise JobError(f"sequence: --data {data[0]}: one task is no sequence; give two sources or more, or use `fastpeft finetune`.")
    twice = sorted({d for d in data if list(data).count(d) > 1})
    if twice:
        raise JobError(f"sequence: --data {twice[0]} was given twice; each task is learned once.")
    if eval_data and len(eval_data) != len(data):
        raise JobError(f"sequence: {len(eval_data)} --eval-data for {len(data)} --data; give one for each, in the same order.")


def _names(data: Sequence[str]) -> list[str]:
    """File names without their endings where these differ, else the sources as given."""
    stems = [Path(d).stem for d in data]
    return stems if len(set(stems)) == len(stems) else list(data)


def cut(texts: Texts, classes: Sequence[str]) -> Texts:
    """The texts of these classes alone, numbered in their order."""
    assert texts.classes is not None and texts.train_labels is not None and texts.evaluation_labels is not None
    number = {texts.classes.index(c): k for k, c in enumerate(classes)}
    train, held = (
        [(t, number[y]) for t, y in zip(own, labels, strict=True) if y in number]
        for own, labels in ((texts.train, texts.train_labels), (texts.evaluation, texts.evaluation_labels))
    )
    return Texts(
        [t for t, _ in train],
        [t for t, _ in held],
        [y for _, y in train],
        [y for _, y in held],
        list(classes),
        f"those of {' and '.join(classes)} among {texts.description}",
    )


def _task(name: str, texts: Texts, tokenizer: Any, settings: Settings) -> Task:
    assert texts.classes is not None and texts.majority is not None
    return Task(
        Labels(name, texts.classes),
        encode(texts.train, texts.train_labels, tokenizer, settings),
        encode(texts.evaluation, texts.evaluation_labels, tokenizer, settings),
        texts.majority,
        texts.description,
    )
