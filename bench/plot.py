"""Draws what bench/results/*.jsonl hold, a PNG beside each file: python -m bench.plot [FILE ...].

Layers: the ratio to the frozen layer per shape and dtype, quartiles as whiskers, for every arm. Gradients of sparse values: time
over dense dW and a gather. LoHa's routes: low-rank over dense by rank. Of rows measured several times the last one counts.
Host costs and Random Masking have other forms (bench.host prints a table, bench.random_masking draws its own).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.arms import AGAIN, FROZEN
from bench.machine import RESULTS

Row = dict[str, Any]
Panels = dict[str, dict[str, dict[str, tuple[float, float, float]]]]


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def panels(rows: list[Row]) -> Panels:
    """Title -> series -> place on the axis -> lower quartile, median, upper quartile; the last of equal rows."""
    found: Panels = {}
    for r in rows:
        if "shape" not in r:
            continue
        where = f"{'x'.join(map(str, r['shape']))}\n{r['dtype']}"
        if r["bench"] == "sparse gradient":
            title, series, value = f"sparse gradient, density {r['density']:g}: fastpeft's time over the arm's", r["arm"], r["ours"]
            if series == "fastpeft":
                continue
        elif r["bench"] == "loha routes":
            title, series, where = "LoHa: low-rank over dense, by rank", where.replace("\n", " "), str(r["rank"])
            value = r["low_rank_over_dense"]
        elif "ratio" in r and r["arm"] not in (FROZEN, AGAIN):
            title = f"time over the frozen layer's, {r['device']}" + (f", dropout {r['dropout']:g}" if r["dropout"] else "")
            series, value = r["arm"], [r["iqr"][0], r["ratio"], r["iqr"][1]]
        else:
            continue
        found.setdefault(title, {}).setdefault(series, {})[where] = (value[0], value[1], value[2])
    return found


def draw(found: Panels, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(found), 1, figsize=(11, 4.2 * len(found)), layout="constrained", squeeze=False)
    for ax, (title, series) in zip(axes[:, 0], found.items(), strict=True):
        places = list(dict.fromkeys(p for points in series.values() for p in points))
        width = 0.8 / len(series)
        for k, (name, points) in enumerate(series.items()):
            at = [places.index(p) + (k - (len(series) - 1) / 2) * width for p in points]
            low, mid, high = zip(*points.values(), strict=True)
            spread = [[m - a for m, a in zip(mid, low, strict=True)], [b - m for m, b in zip(mid, high, strict=True)]]
            ax.bar(at, mid, width, yerr=spread, label=name, error_kw={"lw": 0.8})
        ax.axhline(1.0, color="black", lw=0.8)
        ax.set(title=title, xticks=range(len(places)), yscale="log" if "LoHa" in title else "linear")
        ax.set_xticklabels(places, fontsize=7)
        ax.legend(fontsize=7)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: every .jsonl in bench/results")
    args = parser.parse_args()
    for file in args.files or sorted(RESULTS.glob("*.jsonl")):
        found = panels(read(file))
        if found:
            draw(found, file.with_suffix(".png"))
            print(file.with_suffix(".png"))
        elif args.files:
            raise SystemExit(f"bench.plot: {file} holds no row of a layer, a sparse gradient or LoHa's routes.")


if __name__ == "__main__":
    main()
