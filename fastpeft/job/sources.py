"""Rows from a CSV or JSONL file, a folder written by `datasets`, or a data set's name."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.job.errors import JobError, require

_FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# "test" comes after "validation": that of a benchmark often carries no labels (-1 throughout)
_HELD_OUT = ("validation", "test", "dev", "eval")


@dataclass(frozen=True)
class Rows:
    """Texts, their labels and their domains (None where no such column was asked for); dropped: how many rows had an
    empty text."""

    texts: list[str]
    labels: list[str] | None
    dropped: int = 0
    domains: list[str] | None = None


@dataclass(frozen=True)
class Columns:
    """The names of those that are read; None: there is no such thing to read."""

    text: str
    label: str | None
    domain: str | None = None

    @property
    def classes(self) -> list[str]:
        """Those whose values are names of classes."""
        return [c for c in (self.label, self.domain) if c is not None]


def read(source: str, columns: Columns, *, which: str = "--data") -> tuple[Rows, Rows | None]:
    """The rows of a source, and its held-out rows where the source itself names a split for that.

    source: path of a .csv, .tsv, .jsonl, .json (list of objects) or .parquet file; folder of
        `Dataset.save_to_disk`; or a data set's name, "name" or "name:configuration".
    Raises JobError naming the file and row for a missing file or column, an empty source, a broken line, a
    missing label.
    """
    path = Path(source)
    if path.is_file():
        return _rows(_records(path, which), source, columns, which), None
    if path.is_dir():
        return _from_datasets(_load_folder(source, which), source, columns, which)
    if path.suffix.lower() in _FILES or source.startswith((".", os.sep, "~")) or source.count("/") > 1:
        raise JobError(f"finetune: {which} {source}: no such file or folder.")
    return _from_datasets(_load_name(source, which), source, columns, which)


def _records(path: Path, which: str) -> list[dict[str, Any]]:
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return _csv(path, "\t" if suffix == ".tsv" else ",", which)
        if suffix == ".jsonl":
            return _jsonl(path, which)
        if suffix == ".json":
            return _json(path, which)
        if suffix == ".parquet":
            require(f"{which} {path}", "pyarrow")
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
    except UnicodeDecodeError as e:
        raise JobError(
            f"finetune: {which} {path}: not UTF-8 text ({e.reason} at byte {e.start}); convert it first."
        ) from None
    except OSError as e:
        raise JobError(f"finetune: {which} {path}: cannot be read ({e}).") from None
    raise JobError(
        f"finetune: {which} {path}: unknown file type {suffix!r}; it must be one of {', '.join(_FILES)}."
    )


def _csv(path: Path, delimiter: str, which: str) -> list[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    records = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            for record in reader:
                if None in record or None in record.values():
                    wanted = len(reader.fieldnames or ())
                    raise JobError(
                        f"finetune: {which} {path}: the row that ends at line {reader.line_num} does not "
                        f"have the {wanted} "
                        "fields of the header; is a comma or a quote missing?"
                    )
                records.append(record)
        except csv.Error as e:
            raise JobError(f"finetune: {which} {path}: line {reader.line_num}: {e}.") from None
    return records


def _jsonl(path: Path, which: str) -> list[dict[str, Any]]:
    records = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as e:
                raise JobError(f"finetune: {which} {path}: line {number} is no JSON ({e.msg}).") from None
            if not isinstance(record, dict):
                raise JobError(
                    f"finetune: {which} {path}: line {number} is a {type(record).__name__}; it must be an "
                    "object."
                )
            records.append(record)
    return records


def _json(path: Path, which: str) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as e:
        raise JobError(f"finetune: {which} {path}: no JSON ({e.msg} at line {e.lineno}).") from None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise JobError(
            f"finetune: {which} {path}: it must hold one list of objects; use .jsonl for one object per line."
        )
    return records


def _load_folder(source: str, which: str) -> Any:
    require(f"{which} {source}", "datasets")
    import datasets

    try:
        return datasets.load_from_disk(source)
    except (FileNotFoundError, ValueError, OSError) as e:
        raise JobError(
            f"finetune: {which} {source}: no folder written by datasets' save_to_disk ({_first_line(e)})."
        ) from None


def _load_name(source: str, which: str) -> Any:
    require(f"{which} {source}", "datasets")
    import datasets

    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None)
    except Exception as e:  # load_dataset raises errors of the hub, of the network, of fsspec and its own
        raise JobError(
            f"finetune: {which} {source}: neither a file, nor a folder, nor a data set that `datasets` can "
            "load "
            f"({type(e).__name__}: {_first_line(e)})."
        ) from None


def _from_datasets(loaded: Any, source: str, columns: Columns, which: str) -> tuple[Rows, Rows | None]:
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    train = "train" if "train" in splits else next(iter(splits))
    held = next((s for s in _HELD_OUT if s in splits and s != train), None)
    found = [_rows(_records_of(splits[s], columns), source, columns, which) for s in (train, held) if s]
    return found[0], found[1] if len(found) > 1 else None


def _records_of(dataset: Any, columns: Columns) -> list[dict[str, Any]]:
    """Rows with class numbers replaced by the class names that the data set declares; -1 (unlabelled) becomes
    None."""
    records: list[dict[str, Any]] = dataset.to_list()
    for column in columns.classes:
        names: Sequence[str] | None = getattr(dataset.features.get(column), "names", None)
        for record in records if names is not None else ():
            value = record[column]
            record[column] = None if value is None or value < 0 else names[value]  # type: ignore[index]
    return records


def _rows(records: list[dict[str, Any]], source: str, columns: Columns, which: str) -> Rows:
    if not records:
        raise JobError(f"finetune: {which} {source}: it has no rows.")
    for column, option in ((columns.text, "--text-column"), (columns.label, "--label-column"), (columns.domain, "--domain-column")):
        if column is not None and column not in records[0]:
            raise JobError(
                f"finetune: {which} {source}: no column {column!r}; its columns are "
                f"{', '.join(map(str, records[0]))}. "
                f"Name one with {option}."
            )
    texts: list[str] = []
    found: dict[str, list[str]] = {column: [] for column in columns.classes}
    for number, record in enumerate(records, 1):
        text = record.get(columns.text)
        if text is not None and not isinstance(text, str):
            raise JobError(
                f"finetune: {which} {source}: row {number}: {columns.text!r} is a {type(text).__name__}; it "
                "must be text."
            )
        if not text or not text.strip():
            continue
        for column, own in found.items():
            own.append(_label(record.get(column), f"{which} {source}: row {number}: {column!r}"))
        texts.append(text)
    if not texts:
        raise JobError(f"finetune: {which} {source}: every row's {columns.text!r} is empty.")
    labels, domains = (None if c is None else found[c] for c in (columns.label, columns.domain))
    return Rows(texts, labels, len(records) - len(texts), domains)


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool) or isinstance(value, (str, int)):
        if str(value).strip():
            return str(value).strip()
    elif isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise JobError(f"finetune: {where} is {value!r}; a label must be a word or a whole number.")


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [""])[0].rstrip(".")
