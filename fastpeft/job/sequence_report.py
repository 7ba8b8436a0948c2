"""The report of a sequence: report.json, report.md and accuracy.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.job.outcome import versions
from fastpeft.job.plots import _figure, _save
from fastpeft.job.report import _atomic
from fastpeft.job.sequence import (
    HEADS,
    INCREMENTAL,
    NOTES,
    O_LORA,
    ONE,
    TITLES,
    Outcome,
    Result,
    arm_settings,
)

COLOURS = {O_LORA: "#1b5e9e", INCREMENTAL: "#d1741f", ONE: "#3a8f4d", HEADS: "#9a9a9a"}
STYLES = {O_LORA: "-o", INCREMENTAL: "--s", ONE: "-.^", HEADS: ":d"}


def write_report(outcome: Outcome, folder: Path) -> None:
    """Write the three files into the folder; each is complete or absent."""
    body = json.dumps(as_json(outcome), indent=2, allow_nan=False) + "\n"
    arms = by_arm([r for run in outcome.runs for r in run])
    names = [t.labels.name for t in outcome.job.tasks]
    _atomic(folder / "report.json", lambda path: path.write_text(body, encoding="utf-8"))
    _atomic(folder / "accuracy.png", lambda path: draw(arms, names, path))
    _atomic(folder / "report.md", lambda path: path.write_text(as_markdown(outcome), encoding="utf-8"))


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Arm -> its results, one per seed."""
    found: dict[str, list[Result]] = {}
    for r in results:
        found.setdefault(r.name, []).append(r)
    return found


def mean_matrix(results: Sequence[Result]) -> list[list[float]]:
    """[task learned last][task tested]: the accuracies' mean over the seeds."""
    return [[statistics.fmean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*(r.accuracy for r in results), strict=True)]


def table(arms: dict[str, list[Result]]) -> list[list[str]]:
    """Header first: average accuracy after the last task, forgetting, accuracy of each task when it was just learned."""
    rows = [["arm", "average accuracy", "forgetting", "just learned", "trains per task"]]
    for name, results in arms.items():
        just = [statistics.fmean(row[-1] for row in r.accuracy) for r in results]
        numbers = [_spread(values) for values in ([r.average() for r in results], [r.forgetting for r in results], just)]
        rows.append([TITLES[name], *numbers, f"{results[0].trainable[-1]:,d}"])
    return rows


def _spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation of several."""
    more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{more}"


def as_text(outcome: Outcome) -> str:
    """The table with aligned columns, for a terminal."""
    rows = table(by_arm([r for run in outcome.runs for r in run]))
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The report as plain data: every accuracy and loss of every seed, and the figures made of them."""
    job, s = outcome.job, outcome.job.plan.settings
    arms = []
    for name, results in by_arm([r for run in outcome.runs for r in run]).items():
        arms.append(
            {
                "name": name,
                "title": TITLES[name],
                "note": NOTES[name],
                "trainable_parameters": results[0].trainable,
                "accuracy": [r.accuracy for r in results],
                "average_accuracy": [[r.average(k) for k in range(len(r.accuracy))] for r in results],
                "forgetting": [r.forgetting for r in results],
                "losses": [r.losses for r in results],
            }
        )
    tasks = [
        {
            "name": t.labels.name,
            "classes": t.labels.classes,
            "description": t.description,
            "train": len(t.data),
            "evaluation": len(t.held),
            "majority_accuracy": t.majority,
        }
        for t in job.tasks
    ]
    return {
        "settings": s.as_dict() | {"data": list(job.plan.data), "eval_data": list(job.plan.eval_data), "compare": job.plan.compare},
        "model": {"name": job.source.name, "sha256": job.source.sha256},
        "tasks": tasks,
        "arms": arms,
        "adapters": outcome.folders,
        "reload": [{"difference": d, "scale": scale} for d, scale in outcome.reload],
        "wall_seconds": outcome.seconds,
        "versions": versions(),
    }


def as_markdown(outcome: Outcome) -> str:
    """The whole report.md."""
    job, s = outcome.job, outcome.job.plan.settings
    arms = by_arm([r for run in outcome.runs for r in run])
    header, *body = table(arms)
    own = arm_settings(job.plan, job.plan.arms[0])
    options = ", ".join(f"{k}={v}" for k, v in (dict(own.options) | dict(own.procedure_options)).items())
    parts = [
        f"# {len(job.tasks)} tasks in a row on {job.source.name}",
        "\n".join(
            f"{k}. {t.labels.name}: {len(t.data)} texts to learn from, {len(t.held)} to be tested on, most frequent class {t.majority:.3f}. "
            f"Data: {t.description}."
            for k, t in enumerate(job.tasks, 1)
        ),
        f"Each task: {s.epochs} epochs, batch {s.batch_size}, at most {s.max_length} tokens, AdamW at {s.own_lr:g} with warm-up, {options}; "
        f"seeds {', '.join(map(str, s.seeds))}, {s.dtype}, {s.torch_device}, {s.thread_count} threads; {outcome.seconds:.0f} s in all.",
        _grid(header, body),
        "\n".join(f"- **{TITLES[name]}**: {NOTES[name]}." for name in arms),
        "![accuracy](accuracy.png)",
        "Average accuracy: the mean over all tasks after the last one. Forgetting: for each task but the last, the best accuracy that it had "
        "before the last task was learned, less its final one; the mean over these tasks. Just learned: the mean of each task's accuracy "
        "right after it. Numbers behind ± are standard deviations over the seeds. Every task has its own head, which is frozen after "
        "it, and the task of a text is known when it is tested.",
        *(_matrix(TITLES[name], results) for name, results in arms.items()),
        f"The final adapter with every head is in `{outcome.folders[-1]}`; `fastpeft.job.heads.load` makes the model of it, and `choose` goes "
        f"to a task. Loaded again, its logits differ by at most {max(d for d, _ in outcome.reload):.2g} (the largest is "
        f"{max(scale for _, scale in outcome.reload):.2g}).",
        "## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in [header, ["---"] * len(header), *rows])


def _matrix(title: str, results: Sequence[Result]) -> str:
    cells = mean_matrix(results)
    n = len(cells)
    rows = [[f"after task {k}", *(f"{a:.3f}" for a in row), *[""] * (n - len(row))] for k, row in enumerate(cells, 1)]
    return f"## {title}: accuracy on each task\n\n" + _grid(["", *(f"task {k}" for k in range(1, n + 1))], rows)


def draw(arms: dict[str, list[Result]], names: Sequence[str], path: Path) -> None:
    """Left the average accuracy on the tasks so far, right each task's accuracy from when it was learned; means over the seeds."""
    figure, axes = _figure(1 + len(names), width=3.2 * (1 + len(names)))
    steps = list(range(1, len(names) + 1))
    for other in axes[1:]:
        other.sharey(axes[0])  # before anything is drawn, so that all of it counts for the limits
    for name, results in arms.items():
        means = mean_matrix(results)
        style: dict[str, Any] = {"color": COLOURS[name], "markersize": 5}
        axes[0].plot(steps, [statistics.fmean(row) for row in means], STYLES[name], label=TITLES[name], **style)
        for k in range(len(names)):
            axes[k + 1].plot(steps[k:], [row[k] for row in means[k:]], STYLES[name], **style)
    for own, title in zip(axes, ("all tasks so far", *names), strict=True):
        own.set(title=title, xlabel="tasks learned", xticks=steps, xlim=(0.8, len(names) + 0.2))
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=8)
    _save(figure, path)
