"""pareto.png, pareto_time.png, curves.png and rates.png: made to be read with forty recipes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT
from fastpeft.job.plots import _save, running_mean

COLOURS = {FASTPEFT: "#1b5e9e", PEFT: "#d1741f", FROZEN: "#8a8a8a"}
QUIET = "#9db7d2"
COLUMNS = 6


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other one beats: none has less or equal cost and more gain, or less cost and equal gain.
    By rising cost."""
    order = sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1]))
    found: list[int] = []
    for k in order:
        if not found or points[k][1] > points[found[-1]][1]:
            found.append(k)
    return found


def spread_out(places: Sequence[float], low: float, high: float) -> list[float]:
    """Places for labels, as near to the wanted ones as their order and an equal least gap between them allow (a 25th of the height, less with more labels); all within low and high."""
    n = len(places)
    gap = (high - low) / max(25, n)
    order = sorted(range(n), key=lambda k: places[k])
    at = low
    wanted = [0.0] * n
    for rank, k in enumerate(order):
        # what is left above must still hold the labels that come after
        wanted[k] = min(max(places[k], at), high - gap * (n - 1 - rank))
        at = wanted[k] + gap
    return wanted


def draw_pareto(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against bytes kept per token; labels in a column, with a line to each point."""
    _draw(rows, lambda r: r["saved_per_token"] / 1024, "kept for backward, KiB per token", path)


def draw_pareto_time(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The same against step time; rows: those with times."""
    _draw(rows, lambda r: r["ratio"], "time of a step / a frozen model's", path)


def _draw(rows: Sequence[dict[str, Any]], cost: Any, label: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, max(4.0, 0.19 * len(rows) + 1.2)), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, rows, cost)
    axes.set_xlabel(label)
    _save(figure, path)


def _scatter(axes: Any, rows: Sequence[dict[str, Any]], cost: Any) -> None:
    # the frozen model trains no adapter and keeps next to nothing: a line, so that the others have the width
    frozen = [r for r in rows if r["arm"] == FROZEN]
    adapters = [r for r in rows if r["arm"] != FROZEN]
    for r in frozen:
        axes.axhline(r["accuracy"], color=COLOURS[FROZEN], linestyle=":", linewidth=1.2)
    points = [(cost(r), r["accuracy"]) for r in adapters]
    best = front(points)
    if best:
        edge = [points[k] for k in best]
        axes.step([x for x, _ in edge], [y for _, y in edge], where="post", color=COLOURS[FASTPEFT], linewidth=1.2, zorder=2, label="Pareto front")
    for k, r in enumerate(adapters):
        colour = COLOURS[PEFT] if r["arm"] == PEFT else COLOURS[FASTPEFT] if k in best else QUIET
        axes.plot(*points[k], "o", color=colour, markersize=6, zorder=3)
        if r["spread"] is not None:
            axes.plot([points[k][0]] * 2, [points[k][1] - r["spread"], points[k][1] + r["spread"]], color=colour, linewidth=0.6, alpha=0.6, zorder=1)
    labelled = [(cost(r), r["accuracy"], r) for r in adapters] + [(None, r["accuracy"], r) for r in frozen]
    if not labelled:
        return
    ys = [y for _, y, _ in labelled]
    pad = 0.05 * (max(ys) - min(ys) or 0.1)
    low, high = min(ys) - pad, max(ys) + pad
    axes.set_ylim(low, high)
    for place, (x, y, r) in zip(spread_out(ys, low, high), labelled, strict=True):
        bold = r["arm"] != FASTPEFT or any(r is adapters[k] for k in best)
        colour = COLOURS[r["arm"]] if bold else "#444444"
        title = "frozen + head" if r["arm"] == FROZEN else r["title"]
        axes.annotate(
            f"{title}  {y:.3f}", xy=(1.0, y) if x is None else (x, y), xycoords=axes.get_yaxis_transform() if x is None else "data",
            xytext=(1.06, place), textcoords=axes.get_yaxis_transform(), fontsize=9, va="center", annotation_clip=False,
            color=colour, weight="bold" if bold else "normal",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.set_ylabel("accuracy, mean over the seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right", frameon=False)


def draw_rates(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A line per recipe: the pilot's evaluation loss at each rate, the chosen one ringed; a run that did not come to an end stands at the right."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rates = sorted({q["rate"] for r in rows for q in r["pilots"]})
    palette = colormaps["viridis"]
    colours = {rate: palette(k / max(1, len(rates) - 1) * 0.9) for k, rate in enumerate(rates)}

    def ends(r: dict[str, Any]) -> list[tuple[float, float]]:
        return [(q["rate"], q["scores"][-1][0]) for q in r["pilots"] if not q.get("error")]

    order = sorted(rows, key=lambda r: min((v for _, v in ends(r)), default=math.inf), reverse=True)
    top = max((v for r in rows for _, v in ends(r)), default=1.0)
    figure = Figure(figsize=(8, max(3.0, 0.22 * len(rows) + 1.2)), layout="constrained")
    axes = figure.subplots()
    for y, r in enumerate(order):
        values = dict(ends(r))
        if values:
            axes.plot([min(values.values()), max(values.values())], [y, y], color="#cccccc", linewidth=2, zorder=1)
        for q in r["pilots"]:
            failed = bool(q.get("error"))
            axes.plot(top * 1.05 if failed else values[q["rate"]], y, "x" if failed else "o", color=colours[q["rate"]], markersize=6, zorder=2)
        if r["rate"] in values:
            axes.plot(values[r["rate"]], y, "o", markersize=11, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1, zorder=3)
    for rate in rates:
        axes.plot([], [], "o", color=colours[rate], label=f"{rate:g}")
    axes.plot([], [], "o", markersize=11, markerfacecolor="none", markeredgecolor="black", label="chosen")
    if any(q.get("error") for r in rows for q in r["pilots"]):
        axes.plot([], [], "x", color="black", label="diverged")
    axes.set_yticks(range(len(order)), [r["title"] for r in order], fontsize=8)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlabel("evaluation loss after the pilot run")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="learning rate", fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(figure, path)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A small picture per recipe, by falling accuracy: training loss of each seed (thin) and their mean, evaluation loss as dots, the first
    row's mean in grey for reference."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.0 * columns + 0.6, 1.55 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    reference = next((r for r in rows if r["title"] == "lora"), rows[0])
    for k, axes in enumerate(grid.flat):
        if k >= len(rows):
            axes.set_visible(False)
            continue
        r = rows[k]
        axes.plot(_mean(reference), color="#bbbbbb", linewidth=1.5)
        for run in r["runs"]:
            axes.plot(_smooth(run["losses"]), color=COLOURS[r["arm"]], linewidth=0.5, alpha=0.5)
        axes.plot(_mean(r), color=COLOURS[r["arm"]], linewidth=1.3)
        losses = [[s[0] for s in run["scores"]] for run in r["runs"]]
        means = [statistics.fmean(v) if None not in v else math.nan for v in zip(*losses, strict=False)]
        per = len(r["runs"][0]["losses"]) / max(1, len(means) - 1)
        axes.plot([per * e for e in range(len(means))], means, "o", color="black", markersize=3)
        axes.set_title(f"{r['title']}  {r['accuracy']:.3f}", fontsize=8, pad=3)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    # from the lowest curve to what an untrained head has: a diverged one must not flatten the others
    curves = [_mean(r) for r in rows]
    low, high = min(min(c) for c in curves), statistics.median(c[0] for c in curves)
    grid[0][0].set_ylim(low - 0.15 * (high - low), high + 0.25 * (high - low) + 1e-3)
    figure.suptitle(f"Training loss (thin: each seed; penalties of the method included) and evaluation loss (dots); grey: {reference['title']}", fontsize=10)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    _save(figure, path)


def _smooth(losses: Sequence[float]) -> list[float]:
    return running_mean(losses, max(1, len(losses) // 12))


def _mean(row: dict[str, Any]) -> list[float]:
    return _smooth([statistics.fmean(v) for v in zip(*(run["losses"] for run in row["runs"]), strict=False)])
