"""Random Masking on the main job over densities and learning rates: python -m bench.random_masking [--quick] [--plot].

One line per run to bench/results/random_masking.jsonl, then the plot beside it. The learning rate that is varied is that of
the masked entries; the new head keeps the job's. The best rate is read off the loss on the evaluation examples, which is
finer than their accuracy; it is a maximum over five runs, so the accuracies are a little kind to every density alike.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.machine import RESULTS, emit, read_rows
from fastpeft.job.arms import FASTPEFT, FROZEN, build_arms
from fastpeft.job.data import encode, load_texts
from fastpeft.job.loop import train, trainee
from fastpeft.job.models import find_model, load_model, load_tokenizer
from fastpeft.job.settings import Settings
from fastpeft.method.random_masking import learning_rate

DENSITIES = (1e-1, 1e-2, 1e-3, 1e-4)
# times the rule of the method
FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0)
EPOCHS = 3
FILE = RESULTS / "random_masking.jsonl"


def runs(
    quick: bool, seeds: list[int], threads: int | None, epochs: int, densities: list[float], factors: list[float]
) -> None:
    """Every run that the file does not hold yet."""
    base = Settings(method="random_masking", compare=False, threads=threads, quick=quick, epochs=1 if quick else epochs)
    torch.set_num_threads(base.thread_count)
    source, texts = find_model(base), load_texts(base)
    tokenizer = load_tokenizer(source)
    data = encode(texts.train, texts.train_labels, tokenizer, base)
    held = encode(texts.evaluation, texts.evaluation_labels, tokenizer, base)
    done = {_key(r) for r in read()}
    plan: list[tuple[str, float | None, float | None, int]] = [(FROZEN, None, None, s) for s in seeds]
    plan += [(FASTPEFT, d, learning_rate(d) * f, s) for s in seeds for d in densities for f in factors]
    for arm_name, density, lr, seed in plan:
        row: dict[str, Any] = {"arm": arm_name, "density": density, "lr": lr, "seed": seed, "epochs": base.epochs}
        if _key(row) in done:
            continue
        settings = base if density is None else Settings(
            **(base.as_dict() | {"options": {"density": density}, "adapter_lr": lr})
        )  # fmt: skip
        model, new = load_model(source, settings, classes=texts.classes, pad=tokenizer.pad_token_id, seed=seed)
        [arm] = build_arms([arm_name], model, new, settings, seed=seed)
        t = trainee(arm, settings)
        train([t], data, held, settings, seed=seed)
        score = t.scores[-1]
        row |= {"trainable": arm.trainable, "loss": score.loss, "accuracy": score.accuracy, "examples": len(held)}
        row |= {"train_loss": statistics.fmean(t.losses[-20:]), "bench": "random_masking", "quick": quick}
        emit(row, None if quick else FILE)


def read() -> list[dict[str, Any]]:
    return read_rows(FILE)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    lr = row["lr"]
    return row["arm"], row["density"], None if lr is None else f"{lr:.4g}", row["seed"], row["epochs"]


def best(rows: list[dict[str, Any]], epochs: int) -> list[dict[str, Any]]:
    """Per density: the rate of the lowest mean loss over the seeds, its mean loss and accuracy; the densest first."""
    found = []
    for density in sorted({r["density"] for r in rows if r["density"] and r["epochs"] == epochs}, reverse=True):
        cells: dict[float, list[dict[str, Any]]] = {}
        for r in rows:
            if r["density"] == density and r["epochs"] == epochs:
                cells.setdefault(r["lr"], []).append(r)
        means = {lr: [statistics.fmean(r[k] for r in rs) for k in ("loss", "accuracy")] for lr, rs in cells.items()}
        lr = min(means, key=lambda k: means[k][0])
        found.append({"density": density, "lr": lr, "loss": means[lr][0], "accuracy": means[lr][1], "means": means})
    return found


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = best(rows, EPOCHS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for b in found:
        rates = sorted(b["means"])
        (line,) = left.plot(rates, [b["means"][r][0] for r in rates], marker="o", ms=4, label=f"density {b['density']:g}")
        left.plot(b["lr"], b["loss"], marker="*", ms=14, color=line.get_color())
    left.set(xscale="log", xlabel="learning rate of the masked entries", ylabel="evaluation loss", title=f"best rate: star ({EPOCHS} epochs)")
    left.legend()
    densities = [b["density"] for b in found]
    for epochs in sorted({r["epochs"] for r in rows}):
        (line,) = right.plot(
            [b["density"] for b in best(rows, epochs)],
            [b["accuracy"] for b in best(rows, epochs)],
            marker="o",
            label=f"accuracy at the best rate, {epochs} epochs",
        )
        frozen = [r["accuracy"] for r in rows if r["arm"] == FROZEN and r["epochs"] == epochs]
        if frozen:
            label = f"frozen + head, {epochs} epochs"
            right.axhline(statistics.fmean(frozen), color=line.get_color(), ls="--", label=label)
    right.set(xscale="log", xlabel="density of the mask", ylabel="accuracy", ylim=(0.5, 1.0))
    twin = right.twinx()
    twin.plot(densities, [b["lr"] for b in found], marker="*", color="tab:red")
    twin.plot(densities, [learning_rate(d) for d in densities], color="tab:red", ls=":")
    twin.set(yscale="log", ylabel="best rate (red); dotted: 1e-4 / sqrt(density)")
    right.legend(loc="lower left", fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch on few examples: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS), help="times the rule of the method")
    parser.add_argument("--plot", action="store_true", help="draw what the file holds, run nothing")
    args = parser.parse_args()
    if not args.plot:
        runs(args.quick, args.seeds, args.threads, args.epochs, args.densities, args.factors)
    rows = read()
    for b in best(rows, args.epochs):
        print(f"{args.epochs} epochs, density {b['density']:g}: best rate {b['lr']:.3g} (rule {learning_rate(b['density']):.3g}), loss {b['loss']:.4f}, "
              f"accuracy {b['accuracy']:.3f}")  # fmt: skip
    plot(rows, FILE.with_suffix(".png"))


if __name__ == "__main__":
    main()
