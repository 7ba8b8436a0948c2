"""A trainee, and the results of whole seeds, as tensors and plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastpeft.job.early_stopping import EarlyStopping
from fastpeft.job.evaluate import Score
from fastpeft.job.history import History
from fastpeft.job.loop import Trainee
from fastpeft.job.outcome import ArmResult
from fastpeft.job.weights import copy_weights, set_weights


def of_trainee(t: Trainee) -> dict[str, Any]:
    """Weights, optimiser, histories and early stopping of one arm in training."""
    return {
        "weights": copy_weights(t.arm.model),
        "best": t.best,
        "optimizer": t.optimizer.state_dict() if t.optimizer is not None else None,
        "runner": t.runner.state_dict() if t.runner is not None else None,
        "losses": t.losses,
        "seconds": t.seconds,
        "starts": t.starts,
        "scores": [asdict(s) for s in t.scores],
        "stopping": asdict(t.stopping) if t.stopping is not None else None,
        "histories": _of_histories(t.histories),
    }


def into_trainee(t: Trainee, saved: Mapping[str, Any]) -> None:
    """Make a fresh trainee what `saved` was taken from; its next step is noted as the first of a process.

    Raises JobError, before anything is set, if the tensors are not this model's.
    """
    set_weights(t.arm.model, saved["weights"])
    t.best = saved["best"]
    if t.optimizer is not None:
        t.optimizer.load_state_dict(saved["optimizer"])
    if t.runner is not None:
        t.runner.load_state_dict(saved["runner"])
    t.losses, t.seconds = list(saved["losses"]), list(saved["seconds"])
    t.starts = [*saved["starts"], len(t.losses)]
    t.scores = [Score(**s) for s in saved["scores"]]
    t.stopping = EarlyStopping(**saved["stopping"]) if saved["stopping"] is not None else None
    t.histories = _into_histories(saved["histories"])


def of_result(result: ArmResult) -> dict[str, Any]:
    return asdict(result) | {"histories": [_of_histories(seed) for seed in result.histories]}


def into_result(saved: Mapping[str, Any]) -> ArmResult:
    scores = [[Score(**s) for s in seed] for seed in saved["scores"]]
    stopping = [EarlyStopping(**s) if s is not None else None for s in saved["stopping"]]
    histories = [_into_histories(seed) for seed in saved["histories"]]
    return ArmResult(**(dict(saved) | {"scores": scores, "stopping": stopping, "histories": histories}))


def _of_histories(found: Mapping[str, History]) -> dict[str, Any]:
    return {kind: h.changes for kind, h in found.items()}


def _into_histories(saved: Mapping[str, Any]) -> dict[str, History]:
    return {kind: History(changes) for kind, changes in saved.items()}
