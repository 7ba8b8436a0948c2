"""Saving a run while it goes on, and taking it up again after an interruption, to the bit.

The state of an unfinished run lies in its output folder, from its first training step until its report is
written. What it holds: the results of the seeds that are done, and of the seed in training every arm's weights,
optimiser, histories and early stopping, the random generators and the position. The model, the data and the
order of the batches are made again from the settings; digests show that they are the same.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastpeft.job import identity, rng, snapshot, statefile
from fastpeft.job.errors import Finished, JobError
from fastpeft.job.loop import Trainee
from fastpeft.job.outcome import ArmResult, Reload
from fastpeft.job.settings import Settings


class Run:
    """One run of a job, over all the processes that worked on it.

    identity: what a resume compares.   saved: the state that this process started from, or None.
    position: where a resume of what this process has saved would go on, in words; None before its first save.
    """

    def __init__(self, settings: Settings, saved: dict[str, Any] | None, began: float):
        self.settings, self.saved = settings, saved
        self.folder = Path(settings.output)
        self.identity: dict[str, Any] = identity.of_settings(settings) if saved is None else saved["identity"]
        self.position: str | None = None
        self._sessions: list[float] = saved["sessions"] if saved is not None else []
        self._began = began

    @property
    def sessions(self) -> list[float]:
        """Wall seconds of the processes before this one up to their last save, and of this one up to now."""
        return [*self._sessions, time.perf_counter() - self._began]

    def check(self, found: dict[str, Any]) -> None:
        """Add to the identity; JobError if the resumed run was about something else."""
        if self.saved is not None:
            _refuse_others(self.identity, found, self.folder)
        self.identity |= found

    def results(self) -> tuple[dict[str, ArmResult], Reload | None]:
        """Those of the seeds that were done when the state was saved."""
        if self.saved is None:
            return {}, None
        reload = self.saved["reload"]
        results = {name: snapshot.into_result(r) for name, r in self.saved["results"].items()}
        return results, None if reload is None else Reload(**reload)

    def restore_generators(self) -> None:
        """Set the random generators to where they were when the state was saved."""
        if self.saved is not None:
            rng.restore(self.saved["rng"])

    def restore(self, trainees: list[Trainee]) -> None:
        """Give fresh trainees, and the generators, the saved state of the seed in training, if there is one; later
        seeds start afresh."""
        if self.saved is None or self.saved["trainees"] is None:
            return
        for t in trainees:
            snapshot.into_trainee(t, self.saved["trainees"][t.arm.name])
        self.restore_generators()
        self.saved = self.saved | {"trainees": None}

    def save(
        self, results: dict[str, ArmResult], reload: Reload | None, trainees: list[Trainee] | None
    ) -> None:
        """Replace the state. results: of the seeds that are done.   trainees: of the seed in training, None
        between two seeds."""
        state = {
            "identity": self.identity,
            "sessions": self.sessions,
            "results": {name: snapshot.of_result(r) for name, r in results.items()},
            "reload": None if reload is None else asdict(reload),
            "trainees": None if trainees is None else {t.arm.name: snapshot.of_trainee(t) for t in trainees},
            "rng": rng.capture(),
        }
        statefile.write(self.folder, state)
        self.position = self._position(results, trainees)

    def _position(self, results: dict[str, ArmResult], trainees: list[Trainee] | None) -> str:
        done, seeds = max(len(r.losses) for r in results.values()), self.settings.seeds
        if done == len(seeds):
            return "with the report"
        steps = 0 if trainees is None else max(len(t.losses) for t in trainees)
        return f"seed {seeds[done]} after step {steps}"

    def finish(self) -> None:
        """Remove the state: the report is written."""
        statefile.remove(self.folder)


def open_run(settings: Settings, *, resume: bool, restart: bool, began: float) -> Run:
    """The run that these settings start or continue. began: when this process started, of time.perf_counter.

    JobError if the folder holds an unfinished run and neither was asked for, if there is none to resume or it has
    other settings, or if its state is damaged; Finished if it is done already. None of them changes a file.
    """
    folder = Path(settings.output)
    if not resume:
        if statefile.exists(folder) and not restart:
            raise JobError(
                f"finetune: --output {folder} holds an unfinished run ({statefile.NAME}). Continue it with --resume, discard "
                "it with --restart, or give another --output."
            )
        return Run(settings, None, began)
    saved = statefile.read(folder)
    if saved is None:
        _check_finished(settings, folder)
    else:
        _refuse_others(saved["identity"], identity.of_settings(settings), folder)
    return Run(settings, saved, began)


def _check_finished(settings: Settings, folder: Path) -> None:
    """Finished if the folder's report is of these settings, else JobError."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        done = report["run"]
    except (OSError, ValueError, KeyError, TypeError):
        raise JobError(
            f"finetune: --resume: {folder} holds no unfinished run ({statefile.NAME}) and no report of a finished one. Give "
            "the --output of the run to continue, or start one without --resume."
        ) from None
    _refuse_others(done, identity.of_settings(settings), folder)
    raise Finished(
        f"finetune: the run in {folder} is finished; there is nothing to resume and nothing was changed."
    )


def _refuse_others(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    found = identity.differences(saved, now)
    if found:
        raise JobError(
            f"finetune: --resume: the run in {folder} is another one: {'; '.join(found)}. Give what it was started with, or "
            "start a new run with another --output. Nothing was changed."
        )
