"""The procedures of a job: those that the method's recipe names, and those that --procedure adds."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastpeft.job.data import Examples
from fastpeft.job.errors import JobError
from fastpeft.job.measure import LONG_RUN


def known() -> dict[str, Any]:
    """Name -> class of every procedure in fastpeft.train."""
    from fastpeft import train

    found = {name: getattr(train, name) for name in train.__all__}
    return {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, train.Procedure) and c is not train.Procedure}


def build_procedures(names: Sequence[str], options: Mapping[str, Any]) -> list[Any]:
    """An instance of each; every option goes to those that have it.

    Raises JobError for a name that does not exist or comes twice, an option that none has, and a value that one refuses.
    """
    classes = known()
    for name in names:
        if name not in classes:
            raise JobError(f"finetune: --procedure {name}: there is no such procedure; choose from {', '.join(sorted(classes))}.")
        if names.count(name) > 1:
            raise JobError(f"finetune: --procedure {name}: it is attached already; leave it out.")
    takes = {name: list(inspect.signature(classes[name]).parameters) for name in names}
    for option in options:
        if not any(option in own for own in takes.values()):
            listing = "; ".join(f"{n}: {', '.join(own) or 'none'}" for n, own in takes.items())
            raise JobError(
                f"finetune: --procedure-option {option}: no procedure has it; options are: {listing or 'none, as no procedure runs'}."
            )
    return [_build(classes[n], {k: v for k, v in options.items() if k in takes[n]}) for n in names]


def _build(cls: Any, options: Mapping[str, Any]) -> Any:
    try:
        return cls(**options)
    except (ValueError, TypeError) as e:
        raise JobError(f"finetune: --procedure-option: {e}") from None


def without_source(procedures: Sequence[Any]) -> list[Any]:
    """Those that want data of their own and have none yet; they say what share of the training data in HOLDS_OUT."""
    return [p for p in procedures if getattr(p, "source", procedures) is None]


def hold_out(procedures: Sequence[Any], data: Examples, size: int, seed: int) -> Examples:
    """The examples that are left to train on where procedures want others for themselves, which they get in batches of `size`."""
    from fastpeft.train import Batches, divide

    wanting = without_source(procedures)
    if not wanting:
        return data
    share = max(p.HOLDS_OUT for p in wanting)
    try:
        rest, own = (data.part(index) for index in divide(len(data), 1 - share, seed))
    except ValueError as e:
        raise JobError(f"finetune: {type(wanting[0]).__name__} needs a share {share} of the training examples for itself: {e}") from None
    for p in wanting:
        p.source = Batches(range(len(own)), size, seed=seed, collate=own.batch)
    return rest


def check_fit(model: nn.Module, procedures: Sequence[Any]) -> None:
    """JobError if a procedure does not fit the model: copies of them begin a run, and end it at once."""
    from fastpeft.train import attach, build_optimizer

    own = copy.deepcopy(list(procedures))
    try:
        with attach(model, build_optimizer(model, own, torch.optim.SGD, lr=0.0), own, total_steps=LONG_RUN):
            pass
    except (ValueError, TypeError, RuntimeError) as e:
        raise JobError(f"finetune: {e}") from None
