"""A trained adapter's folder, and the model and data that belong to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastpeft.folder import CheckpointError, read_folder
from fastpeft.job import identity, statefile
from fastpeft.job.calibrate import OF_THE_RUN, Calibration
from fastpeft.job.data import Examples, Texts, encode, load_texts
from fastpeft.job.errors import JobError
from fastpeft.job.models import check_length, find_model, load_model, load_tokenizer
from fastpeft.job.settings import CAUSAL_LM, CLASSIFICATION, Settings
from fastpeft.job.split import split
from fastpeft.job.validation import Validation, hold_out, together

_ADAPTER = "adapter"


@dataclass(frozen=True)
class Folder:
    """adapter: the folder that load_adapter takes.   settings: of the job that it belongs to.

    run: what its report says of data and weights (fastpeft.job.identity); None for an adapter without a report.
    """

    adapter: Path
    settings: Settings
    run: dict[str, Any] | None


@dataclass
class Trained:
    """The model with the adapter loaded, what it was trained on, and what it is judged on.

    unseen: examples that no epoch trained on, of a run with early stopping.   settings: of the job.
    """

    model: Any
    texts: Texts
    settings: Settings
    data: Examples
    held: Examples
    unseen: Examples | None
    source: str

    def divide(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """The training examples without a stratified share, and that share. JobError where that leaves nothing."""
        labels = self.data.labels
        assert labels is not None
        rest, held = split(together(self.texts, self.settings), labels, share=share, seed=seed)
        if not held or not rest:
            raise JobError(
                f"laplace: --prior validation: {len(self.data)} training examples leave none to hold out; give more, or use "
                "--prior evidence."
            )
        return self.data.part(rest), self.data.part(held)


def open_folder(asked: Calibration) -> Folder:
    """What the folder is, and the job that it belongs to. JobError for anything that is no trained classifier's."""
    folder = Path(asked.folder)
    if statefile.exists(folder):
        raise JobError(
            f"laplace: {folder} holds an unfinished run ({statefile.NAME}); finish it with `fastpeft finetune --resume` first."
        )
    if (folder / "report.json").is_file():
        found = _of_report(asked, folder)
    elif (folder / "adapter_config.json").is_file():
        found = _of_adapter(asked, folder)
    else:
        raise JobError(
            f"laplace: {folder} has neither report.json nor adapter_config.json; give the report folder of a finished "
            "`fastpeft finetune`, or an adapter folder."
        )
    try:
        config, _, _ = read_folder(found.adapter)
    except (FileNotFoundError, CheckpointError) as e:
        raise JobError(f"laplace: {e}") from None
    if CAUSAL_LM in (found.settings.task, str(config.get("task_type")).lower().replace("_", "-")):
        raise JobError(
            f"laplace: {folder} belongs to a causal language model, and this command is about classifiers. In Python, "
            "fastpeft.laplace.fit(..., logits=fastpeft.laplace.answers(token_ids)) takes a closed set of answers."
        )
    return found


def _of_report(asked: Calibration, folder: Path) -> Folder:
    given = [name for name in OF_THE_RUN if getattr(asked, name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise JobError(
            f"laplace: {flags}: the report in {folder} says what the run was made of. To say otherwise, give the adapter "
            f"alone: {folder / _ADAPTER}."
        )
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        saved, run = dict(report["settings"]), dict(report["run"])
        unknown = sorted(saved.keys() - {f.name for f in fields(Settings)})
        if unknown:
            raise ValueError(f"its settings hold {', '.join(unknown)}, which this version does not know")
        saved |= {name: tuple(saved[name]) for name in ("seeds", "procedures") if name in saved}
        settings = Settings(**saved)
        if not settings.seeds:
            raise ValueError("its settings hold no seed")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise JobError(f"laplace: {folder / 'report.json'} is no report of this version of `fastpeft finetune` ({e}).") from None
    return Folder(folder / _ADAPTER, _ours(settings, asked), run)


def _of_adapter(asked: Calibration, folder: Path) -> Folder:
    missing = [f"--{name}" for name in ("model", "data") if getattr(asked, name) is None]
    if missing:
        raise JobError(f"laplace: {folder} is an adapter without a report; give {' and '.join(missing)} too.")
    names = [name for name in OF_THE_RUN if name != "classes" and getattr(asked, name) is not None]
    return Folder(folder, _ours(Settings(**{name: getattr(asked, name) for name in names}), asked), None)


def _ours(settings: Settings, asked: Calibration) -> Settings:
    """This command's own threads, device and batches; the run's machine may have been another one."""
    return replace(settings, threads=asked.threads, device=asked.device, batch_size=asked.batch_size)


def load_trained(folder: Folder, classes: Sequence[str] | None = None) -> Trained:
    """Model, adapter and data. JobError where data or weights are not those of the run, or the adapter does not fit."""
    settings = folder.settings
    assert settings.task == CLASSIFICATION
    source = find_model(settings)
    texts, validation = hold_out(load_texts(settings), settings)
    if classes is not None:
        texts, validation = _in_order(texts, validation, classes)
    tokenizer = load_tokenizer(source)
    data = encode(texts.train, texts.train_labels, tokenizer, settings, texts.train_domains)
    held = encode(texts.evaluation, texts.evaluation_labels, tokenizer, settings, texts.evaluation_domains)
    unseen = encode(validation.texts, validation.labels, tokenizer, settings, validation.domains) if validation else None
    _same(folder, identity.of_examples({"training": data, "evaluation": held, "validation": unseen}, texts.classes))
    pad, seed = tokenizer.pad_token_id, settings.seeds[0]
    model, new = load_model(source, settings, classes=texts.classes, pad=pad, seed=seed)
    check_length(model, settings)
    _same(folder, identity.of_model(model, new))
    heads = _load_adapter(model, folder, new)
    if heads:
        # a head that the checkpoint brings is the same from every seed
        other, _ = load_model(source, settings, classes=texts.classes, pad=pad, seed=seed + 1)
        own = dict(model.named_parameters())
        if any(not own[n].equal(p) for n, p in other.named_parameters() if n.startswith(tuple(f"{h}." for h in heads))):
            raise JobError(
                f"laplace: {folder.adapter} does not hold {', '.join(heads)}, which {source.name} does not bring for "
                f"{len(texts.classes or ())} classes: the model would answer at random. Save the adapter with its trained head "
                "(modules_to_save), or give the --model that has it."
            )
    return Trained(model, texts, settings, data, held, unseen, source.name)


def _load_adapter(model: Any, folder: Folder, new: list[str]) -> list[str]:
    """Load it; returns those of the modules `new` that it does not hold."""
    import fastpeft
    from fastpeft.record import adaptation

    try:
        fastpeft.load_adapter(model, folder.adapter)
    except (FileNotFoundError, CheckpointError) as e:
        raise JobError(f"laplace: {e}") from None
    held = adaptation(model, "laplace").originals
    return [name for name in new if not any(name == h or name.startswith(f"{h}.") for h in held)]


def _same(folder: Folder, now: dict[str, Any]) -> None:
    found = identity.differences(folder.run, now) if folder.run is not None else []
    if found:
        raise JobError(
            f"laplace: what the run in {folder.adapter.parent} was made of has changed: {'; '.join(found)}. Give the adapter alone, "
            f"{folder.adapter}, with --model and --data, if that is meant."
        )


def _in_order(texts: Texts, validation: Validation | None, classes: Sequence[str]) -> tuple[Texts, Validation | None]:
    """The same with class numbers that count in `classes`; JobError unless these are the data's classes."""
    old = texts.classes or []
    if sorted(classes) != old:
        raise JobError(f"laplace: --classes {' '.join(classes)}; the data's classes are {', '.join(old)}: name each of them once.")
    place = [list(classes).index(c) for c in old]

    def moved(labels: list[int] | None) -> list[int] | None:
        return None if labels is None else [place[y] for y in labels]

    texts = replace(
        texts, train_labels=moved(texts.train_labels), evaluation_labels=moved(texts.evaluation_labels), classes=list(classes)
    )
    return texts, validation and replace(validation, labels=moved(validation.labels))
