"""loss.png, memory.png, ranks.png and freezing.png. Drawn through the Agg canvas itself: no pyplot, no global state, no display."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT
from fastpeft.job.outcome import Outcome

MIB = 1 << 20
# told apart also in grey print: fastpeft is drawn last, dashed, so that an equal curve below it stays visible
_COLOURS = {FROZEN: "#9a9a9a", PEFT: "#d1741f", FASTPEFT: "#1b5e9e"}
_DASHES = {FROZEN: "-", PEFT: "-", FASTPEFT: "--"}

# by Procedure.PROGRESS
PROGRESS_LABELS = {"ranks": "ranks in use, mean of the layers", "freezing": "share of the matrices that trains"}


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values (fewer at the start) at each place."""
    return [sum(values[max(0, k + 1 - width) : k + 1]) / min(width, k + 1) for k in range(len(values))]


def draw_loss(outcome: Outcome, path: Path) -> None:
    """Training loss per step of each arm, first seed, as a running mean; evaluation loss per epoch as
    dots."""
    figure, [axes] = _figure(1, width=7)
    width = max(1, len(outcome.arms[0].losses[0]) // 20)
    for a in outcome.arms:
        losses, scores = a.losses[0], a.scores[0]
        colour = _COLOURS[a.name]
        axes.plot(running_mean(losses, width), _DASHES[a.name], color=colour, label=f"{a.title}: training")
        # an arm whose procedures have reached their end stops within an epoch
        places = [min(len(losses), outcome.steps_per_epoch * e) for e in range(len(scores))]
        axes.plot(
            places, [s.loss for s in scores], "o", color=colour, markersize=4, label=f"{a.title}: evaluation"
        )
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (training: mean of {width} steps)")
    axes.set_title(f"Loss, seed {outcome.settings.seeds[0]}")
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_memory(outcome: Outcome, path: Path) -> None:
    """Two bar charts: peak memory in a process of its own, and bytes saved for backward."""
    figure, both = _figure(2, width=9)
    peaks = [a.memory["peak"] / MIB for a in outcome.arms]
    saved = [a.saved_bytes / MIB for a in outcome.arms]
    titles = [a.title for a in outcome.arms]
    colours = [_COLOURS[a.name] for a in outcome.arms]
    names = ("Peak memory, own process", "Saved for backward")
    for axes, values, title in zip(both, (peaks, saved), names, strict=True):
        bars = axes.bar(titles, values, color=colours)
        axes.bar_label(bars, fmt="%.0f")
        axes.set_ylabel("MiB")
        axes.set_title(title)
    _save(figure, path)


def draw_progress(outcome: Outcome, kind: str, path: Path) -> None:
    """What fastpeft's procedure counts, as a mean by type of module over the steps; the first seed thick, the others thin."""
    from matplotlib import colormaps

    figure, [axes] = _figure(1, width=9)
    ours = outcome.arm(FASTPEFT)
    assert ours is not None
    palette, colours = colormaps["tab20"], dict[str, Any]()
    for losses, seed in zip(ours.losses, ours.histories, strict=True):
        lines = seed[kind].by_type(statistics.fmean)
        for name, points in lines.items():
            first = name not in colours
            colour = colours.setdefault(name, palette(len(colours) % 20))
            steps, values = zip(*points, (len(losses), points[-1][1]), strict=True)
            style: dict[str, Any] = {"linewidth": 2, "label": name} if first else {"linewidth": 0.8, "alpha": 0.6}
            axes.plot(steps, values, drawstyle="steps-post", color=colour, **style)
    axes.set_xlabel("step")
    axes.set_ylabel(PROGRESS_LABELS[kind])
    axes.set_ylim(bottom=0)
    axes.set_title(f"{ours.title}, by type of module")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(figure, path)


def _figure(columns: int, *, width: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
