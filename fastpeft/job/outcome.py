"""The results of a run, and report.json made of them."""

from __future__ import annotations

import math
import platform
import statistics
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastpeft.job import measure
from fastpeft.job.arms import FASTPEFT, PEFT
from fastpeft.job.early_stopping import EarlyStopping
from fastpeft.job.evaluate import Score
from fastpeft.job.history import History
from fastpeft.job.settings import Settings

if TYPE_CHECKING:
    from fastpeft.job.loop import Trainee

_VERSIONS = ("torch", "transformers", "peft", "tokenizers", "datasets", "safetensors", "numpy")


@dataclass(frozen=True)
class Reload:
    """Largest |difference| of the logits of one evaluation batch between the trained and the reloaded model.

    fastpeft: loaded by fastpeft.load_adapter.   peft: by PeftModel.from_pretrained; None where PEFT has no
    such method, or with --no-compare.   scale: largest |logit|, to read the differences by.
    """

    fastpeft: float
    peft: float | None
    scale: float


@dataclass
class ArmResult:
    """One arm over all seeds. saved_bytes: kept for backward by one step.   memory: bytes, of
    fastpeft.job.memory.

    losses, seconds: [seed][step].   scores: [seed][epochs done].   starts: [seed], the steps that were the first of a
    process.   stopping: [seed], None without early stopping.   histories: [seed], what its procedures count, by
    Procedure.PROGRESS.   aside: [seed], the examples that a procedure had for itself, by its name.
    """

    name: str
    title: str
    note: str
    trainable: int
    parameters: int
    saved_bytes: int
    memory: dict[str, int] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    scores: list[list[Score]] = field(default_factory=list)
    starts: list[list[int]] = field(default_factory=list)
    stopping: list[EarlyStopping | None] = field(default_factory=list)
    histories: list[dict[str, History]] = field(default_factory=list)
    aside: list[dict[str, int]] = field(default_factory=list)

    def add(self, t: Trainee) -> None:
        """Add one seed."""
        self.losses.append(t.losses)
        self.seconds.append(t.seconds)
        self.scores.append(t.scores)
        self.starts.append(t.starts)
        self.stopping.append(t.stopping)
        self.histories.append(t.histories)
        self.aside.append(t.aside)

    @property
    def step_seconds(self) -> list[float]:
        """Step times of all seeds, each process's warm-up left out."""
        pairs = zip(self.seconds, self.starts, strict=True)
        return [s for seed, starts in pairs for s in measure.after_warm_up(seed, starts)]

    @property
    def resumed_at(self) -> list[list[int]]:
        """Of each seed the steps of this arm that were the first after a resume."""
        pairs = zip(self.losses, self.starts, strict=True)
        return [[k for k in starts[1:] if k < len(losses)] for losses, starts in pairs]

    @property
    def kept_epochs(self) -> list[int]:
        """Of each seed the epoch whose weights are the result: the best with early stopping, else the last."""
        pairs = zip(self.scores, self.stopping, strict=True)
        return [len(scores) - 1 if s is None else s.best_epoch for scores, s in pairs]

    def metric(self, epoch: int) -> list[float]:
        """Accuracy (perplexity for language modelling) of each seed; epoch 0 is before training, -1 the
        last that ran."""
        return [seed[epoch].metric for seed in self.scores]

    @property
    def result(self) -> list[float]:
        """The metric of each seed with the weights that were kept."""
        return [s[e].metric for s, e in zip(self.scores, self.kept_epochs, strict=True)]


@dataclass
class Outcome:
    """All that a report says. measured_batch: [rows, tokens] of the batch behind bytes saved and peak
    memory.

    sessions: wall seconds of each process that worked on the run, up to its last save (the last one: to the report).
    run: what a resume compares, of fastpeft.job.identity.
    """

    settings: Settings
    model: dict[str, Any]
    data: dict[str, Any]
    measured_batch: list[int]
    arms: list[ArmResult]
    reload: Reload
    sessions: list[float]
    run: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Measured wall seconds; of a resumed run the sum of its sessions, without what was lost in between."""
        return sum(self.sessions)

    @property
    def metric(self) -> str:
        return "perplexity" if self.data["classes"] is None else "accuracy"

    @property
    def aside(self) -> dict[str, int]:
        """Training examples that no arm trains on, by the name of the procedure that has them; the same number for each seed."""
        return {name: count for a in self.arms for seed in a.aside for name, count in seed.items()}

    @property
    def learned_from(self) -> int:
        """Training examples that the arms train on."""
        return self.data["train"] - max(self.aside.values(), default=0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.learned_from // self.settings.batch_size)

    @property
    def progress_kinds(self) -> list[str]:
        """What the procedures counted: "ranks", "freezing"."""
        ours = self.arm(FASTPEFT)
        return [] if ours is None else sorted({kind for seed in ours.histories for kind in seed})

    def training_loss(self, a: ArmResult) -> list[float]:
        """Of each seed the mean loss of the steps of the epoch whose weights are kept."""
        n = self.steps_per_epoch
        return [statistics.fmean(x[(e - 1) * n : e * n]) for x, e in zip(a.losses, a.kept_epochs, strict=True)]

    def loss_gap(self, a: ArmResult) -> list[float]:
        """Of each seed the evaluation loss of the kept weights minus `training_loss`."""
        held = [s[e].loss for s, e in zip(a.scores, a.kept_epochs, strict=True)]
        return [h - t for h, t in zip(held, self.training_loss(a), strict=True)]

    def arm(self, name: str) -> ArmResult | None:
        return next((a for a in self.arms if a.name == name), None)


def comparison(outcome: Outcome) -> list[float] | None:
    """fastpeft minus PEFT in the metric, seed by seed; None without PEFT."""
    ours, theirs = outcome.arm(FASTPEFT), outcome.arm(PEFT)
    if ours is None or theirs is None:
        return None
    return [a - b for a, b in zip(ours.result, theirs.result, strict=True)]


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The report as plain data; times in seconds, memory in bytes, a perplexity that is not finite as
    null."""
    peft = outcome.arm(PEFT)
    arms = []
    for a in outcome.arms:
        mean, spread = measure.mean_and_spread(a.result)
        before = measure.mean_and_spread(a.metric(0))[0]
        row = {
            "name": a.name,
            "title": a.title,
            "note": a.note,
            "trainable_parameters": a.trainable,
            "all_parameters": a.parameters,
            "step_seconds_median": statistics.median(a.step_seconds),
            "step_ratio_to_peft": ratio_to(a, peft),
            "saved_bytes": a.saved_bytes,
            "peak_bytes": a.memory["peak"],
            "loaded_bytes": a.memory["loaded"],
            "cuda_peak_bytes": a.memory["cuda_peak"],
            f"{outcome.metric}_before": _finite(before),
            f"{outcome.metric}_after": _finite(mean),
            f"{outcome.metric}_spread": spread if spread is None else _finite(spread),
            f"{outcome.metric}_per_seed": [[_finite(s.metric) for s in seed] for seed in a.scores],
            "evaluation_loss_per_seed": [[s.loss for s in seed] for seed in a.scores],
            "training_loss_per_seed": outcome.training_loss(a),
            "loss_gap_per_seed": [_finite(g) for g in outcome.loss_gap(a)],
            "losses": a.losses,
            "step_seconds": a.seconds,
            "resumed_at_steps": a.resumed_at,
            "kept_epochs": a.kept_epochs,
            "validation_loss_per_seed": [None if s is None else s.losses for s in a.stopping],
        }
        if any(s.routed is not None for seed in a.scores for s in seed):
            row["router_accuracy_per_seed"] = [[s.routed for s in seed] for seed in a.scores]
        if any(a.histories):
            row["progress_per_seed"] = [{kind: h.changes for kind, h in seed.items()} for seed in a.histories]
        arms.append(row)
    return {
        "settings": outcome.settings.as_dict(),
        "model": outcome.model,
        "data": outcome.data | ({"learned_from": outcome.learned_from, "aside": outcome.aside} if outcome.aside else {}),
        "metric": outcome.metric,
        "measured_batch": outcome.measured_batch,
        "arms": arms,
        "reload": asdict(outcome.reload),
        "wall_seconds": outcome.seconds,
        "session_seconds": outcome.sessions,
        "run": outcome.run,
        "versions": versions(),
        "machine": {
            "system": platform.platform(),
            "threads": outcome.settings.thread_count,
            "device": outcome.settings.torch_device,
        },
    }


def versions() -> dict[str, str]:
    from fastpeft import __version__

    found = {"python": platform.python_version(), "fastpeft": __version__}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def ratio_to(a: ArmResult, base: ArmResult | None) -> float | None:
    if base is None:
        return None
    seeds = zip(a.seconds, base.seconds, a.starts, strict=True)
    return measure.mean_and_spread([measure.median_ratio(s, b, starts) for s, b, starts in seeds])[0]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
