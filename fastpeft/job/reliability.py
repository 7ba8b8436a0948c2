"""reliability.png: accuracy against confidence. Drawn as fastpeft.job.plots draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpeft.job.plots import _figure, _save
from fastpeft.laplace import Reliability

TITLES = {"map": "MAP", "probit": "Laplace, probit", "mc": "Laplace, MC", "temperature": "temperature scaling"}
_COLOUR, _OVER, _UNDER = "#1b5e9e", "#f0c9a0", "#7fb0dc"


def draw_reliability(
    bins: Mapping[str, Reliability], scores: Mapping[str, Mapping[str, float]], path: Path
) -> None:
    """A panel per kind: in each bin of confidence the accuracy, its distance from the mean confidence, and the share of samples."""
    kinds = ("map", "mc")
    figure, panels = _figure(len(kinds), width=4.5 * len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        draw_panel(axes, bins[kind], f"{TITLES[kind]}: ECE {scores[kind]['ece']:.3f}, accuracy {scores[kind]['accuracy']:.3f}")
    panels[0].set_ylabel("accuracy (bars), share of samples (line)")
    panels[0].legend(fontsize=8, loc="upper left")
    _save(figure, path)


def draw_panel(axes: Any, r: Reliability, title: str) -> None:
    """One reliability diagram on matplotlib axes."""
    n = len(r.share)
    middles, some = [(k + 0.5) / n for k in range(n)], [k for k in range(n) if r.share[k] > 0]
    accuracy, confidence = ([v[k].item() for k in some] for v in (r.accuracy, r.confidence))
    places = [middles[k] for k in some]
    axes.bar(places, accuracy, width=0.92 / n, color=_COLOUR, label="accuracy")
    over, under = ([max(0.0, sign * (c - a)) for a, c in zip(accuracy, confidence, strict=True)] for sign in (1, -1))
    axes.bar(places, over, bottom=accuracy, width=0.92 / n, color=_OVER, label="confidence above it")
    axes.bar(places, under, bottom=confidence, width=0.92 / n, color=_UNDER, label="confidence below it")
    axes.plot([0, 1], [0, 1], ":", color="#555555", linewidth=1)
    axes.step([k / n for k in range(n + 1)], [*r.share.tolist(), r.share[-1].item()], where="post", color="black", linewidth=1.2, label="share of samples")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=title)
