"""One head per task in one model: a module that holds them all, and stands where the model's own head stood.

The encoder and its adapter are shared; which task a text belongs to is known, in training and afterwards. A head trains in its
task and is frozen from then on; those of tasks to come have the values they start from.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.folder import replace_file
from fastpeft.job.errors import JobError
from fastpeft.job.models import Source, find_model, load_model, load_tokenizer
from fastpeft.job.settings import Settings

FILE = "tasks.json"


@dataclass(frozen=True)
class Labels:
    """name: of the task.   classes: in the order of the head's outputs."""

    name: str
    classes: list[str]


class TaskHeads(nn.Module):
    """heads: one per task.   task: the number of the one that computes."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads, self.task = nn.ModuleList(heads), 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.heads[self.task](*args, **kwargs)


def load_with_heads(
    source: Source, settings: Settings, tasks: Sequence[Labels], *, pad: int, seed: int
) -> tuple[Any, list[str]]:
    """A classifier with a head for each task, the first one chosen, and the names of the modules that are TaskHeads now.

    Whatever the checkpoint does not hold exists once per task; all of it starts from `seed`. The model is loaded once for each
    different number of classes.
    """
    model: Any = None
    fresh: dict[int, dict[str, nn.Module]] = {}
    for labels in tasks:
        if len(labels.classes) not in fresh:
            found, names = load_model(source, settings, classes=labels.classes, pad=pad, seed=seed)
            fresh[len(labels.classes)] = {n: found.get_submodule(n) for n in names}
            model = found if model is None else model
    names = list(fresh[len(tasks[0].classes)])
    for name in names:
        # deep copies: two tasks with as many classes begin alike and share nothing
        heads = [copy.deepcopy(fresh[len(labels.classes)][name]) for labels in tasks]
        model.set_submodule(name, TaskHeads(heads))
    choose(model, tasks, 0)
    return model, names


def choose(model: nn.Module, tasks: Sequence[Labels], number: int) -> None:
    """Make the head of task `number` the one that computes."""
    config, classes = model.config, tasks[number].classes
    config.id2label = dict(enumerate(classes))
    config.label2id = {c: k for k, c in enumerate(classes)}
    if hasattr(model, "num_labels"):
        model.num_labels = len(classes)  # BERT and its kin keep a copy of the config's
    for module in model.modules():
        if isinstance(module, TaskHeads):
            module.task = number


def train_only(model: nn.Module, number: int) -> None:
    """Of the heads that of task `number` trains; the others are frozen, and hold no gradient."""
    for module in model.modules():
        if isinstance(module, TaskHeads):
            for k, head in enumerate(module.heads):
                head.requires_grad_(k == number)
                for parameter in head.parameters():
                    parameter.grad = None


def save(model: nn.Module, folder: Path, source: Source, settings: Settings, tasks: Sequence[Labels], learned: int) -> None:
    """The adapter with every head (fastpeft.save_adapter), then tasks.json: what `load` needs; each file whole or not at all.

    learned: how many of the tasks have been trained.
    """
    import fastpeft

    fastpeft.save_adapter(model, folder)
    notes = {
        "model": settings.model,
        "model_name": source.name,
        "dtype": settings.dtype,
        "learned": learned,
        "tasks": [asdict(t) for t in tasks],
    }
    replace_file(folder / FILE, (json.dumps(notes, indent=2) + "\n").encode())


def load(folder: str | Path, *, model: str | None = None, device: str | None = None, seed: int = 0) -> tuple[Any, list[Labels]]:
    """The model of a folder that `fastpeft sequence` wrote, in eval mode with the first task's head chosen, and its tasks.

    model: name or folder of the base model, if it is not where it was.   device: None for CUDA where there is one.
    seed: of what is overwritten at once.
    `choose(model, tasks, k)` goes to another task. A folder of `lora` is in PEFT's layout, but PEFT has no such heads. Raises JobError on a folder without a usable tasks.json, CheckpointError on
    an adapter that does not fit.
    """
    import fastpeft

    file = Path(folder) / FILE
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
        tasks = [Labels(t["name"], list(t["classes"])) for t in notes["tasks"]]
        settings = Settings(model=model or notes["model"], dtype=notes["dtype"], device=device)
    except OSError as e:
        raise JobError(f"sequence: {file}: cannot be read ({e.strerror or e}); give a folder that `fastpeft sequence` wrote.") from None
    except (ValueError, KeyError, TypeError) as e:
        raise JobError(f"sequence: {file}: not as `fastpeft sequence` writes it ({type(e).__name__}: {e}).") from None
    source = find_model(settings)
    found, _ = load_with_heads(source, settings, tasks, pad=load_tokenizer(source).pad_token_id, seed=seed)
    fastpeft.load_adapter(found, folder)
    return found.eval(), tasks
