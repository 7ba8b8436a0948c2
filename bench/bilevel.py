"""BiLoRA on 200 examples of the main job: python -m bench.bilevel [--search] [--seeds 0 1 2] [--table] [--plot].

The gap, the loss on held-out examples less that on the training examples, both in evaluation mode and without R1, of LoRA, of BiLoRA
and of what BiLoRA could owe it to: the same layer with A, B and E trained in one level on all 200 examples, without R1 and with it, and
BiLoRA without its second-order term. Rank 8 and STEPS steps of A and B everywhere; the two-level arms take theirs on 160
examples (D1) and steps of E on the other 40 (D2). The seed picks the examples too, and the head's start.

--search: each arm's learning rates on SEARCH_SEED, which is in no result; the one with the lowest held-out loss at the end is used.
One line per run to bench/results/bilevel.jsonl, and the plot beside it; a run that the file holds is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import RESULTS, emit, read_rows
from fastpeft.job.arms import FASTPEFT
from fastpeft.job.bench import Bench
from fastpeft.job.data import Examples
from fastpeft.job.evaluate import Score, evaluate
from fastpeft.job.loop import lr_at, train_step, trainee
from fastpeft.job.settings import Settings
from fastpeft.method.bilora import BiLoRA
from fastpeft.train import Batches, BiLoRABilevel, Procedure, divide
from fastpeft.train.layers import parts_of
from fastpeft.train.protocol import Context

FILE = RESULTS / "bilevel.jsonl"
EXAMPLES, BATCH, LENGTH, STEPS, SEARCH_SEED, GAMMA = 200, 8, 32, 100, 3, 0.1
EPOCH = EXAMPLES // BATCH  # steps between two evaluations, in every arm
LEVELS = (1.0, 0.5, 0.2)  # training losses at which arms are compared


class OneLevelR1(Procedure):
    """BiLoRA's R1 in the loss of a training without levels."""

    def __init__(self, gamma: float):
        self.gamma = gamma

    def extra_loss(self, ctx: Context) -> Tensor:
        return self.gamma * torch.stack([m.orthogonality() for m in parts_of(ctx.model, BiLoRA).values()]).sum()


# title -> (method, a procedure or None, learning rates of the adapter)
ARMS: dict[str, tuple[str, Callable[[], Procedure] | None, tuple[float, ...]]] = {
    "LoRA": ("lora", None, (2e-3, 6e-3)),
    "one level": ("bilora", None, (6e-3, 2e-2)),
    "one level, R1": ("bilora", functools.partial(OneLevelR1, GAMMA), (6e-3, 2e-2)),
    "BiLoRA, first order": ("bilora", functools.partial(BiLoRABilevel, hypergrad="first_order", gamma1=GAMMA), (6e-3, 2e-2)),
    "BiLoRA": ("bilora", functools.partial(BiLoRABilevel, gamma1=GAMMA), (6e-3, 2e-2)),
}


def by_length(data: Examples) -> Examples:
    """The same examples in an order that needs little padding."""
    return data.part(sorted(range(len(data)), key=lambda k: len(data.ids[k])))


def run(bench: Bench, title: str, lr: float, seed: int, due: set[int]) -> dict[str, Any]:
    """One training; scores after the steps that are due."""
    method, make, _ = ARMS[title]
    settings = bench.settings(method, {"rank": 8}, lr)
    data = bench.data.part(random.Random(f"bilevel {seed}").sample(range(len(bench.data)), min(EXAMPLES, len(bench.data))))
    arm = bench.arm(FASTPEFT, settings, seed)
    arm.procedures = [make()] if make else []
    parts = {"train": data}
    for p in arm.procedures:
        if isinstance(p, BiLoRABilevel):
            d1, d2 = (data.part(index) for index in divide(len(data), 1 - p.HOLDS_OUT, seed))
            p.source, data = Batches(range(len(d2)), BATCH, seed=seed, collate=d2.batch), d1
            parts = {"d1": d1, "d2": d2}
    judged = {n: by_length(part) for n, part in (parts | {"held": bench.held}).items()}
    t, steps, scores = trainee(arm, settings), max(due), list[dict[str, Any]]()
    per_epoch = len(data.order(BATCH, seed=seed, epoch=0))
    with contextlib.nullcontext() if t.runner is None else t.runner:
        for step in range(steps):
            arm.model.train()
            torch.manual_seed(seed * 1_000_003 + step)
            rows = data.order(BATCH, seed=seed, epoch=step // per_epoch)[step % per_epoch]
            train_step(t, data.batch(rows), lr_at(step, steps, settings), settings)
            if step + 1 in due:
                found = {n: evaluate(arm.model, part, settings) for n, part in judged.items()}
                found["train"] = together([(found[n], len(part)) for n, part in parts.items()])
                named = {f"{n}_loss": s.loss for n, s in found.items()} | {f"{n}_accuracy": s.accuracy for n, s in found.items()}
                scores.append({"step": step + 1} | named | shape(arm.model))
    numbers = {"trainable": arm.trainable, "examples": sum(map(len, parts.values())), "held": len(bench.held), "steps": steps}
    return numbers | {"scores": scores}


def together(parts: list[tuple[Score, int]]) -> Score:
    """The score of several sets of examples as one, from their scores and sizes."""
    count = sum(n for _, n in parts)
    return Score(sum(s.loss * n for s, n in parts) / count, sum((s.accuracy or 0.0) * n for s, n in parts) / count)


@torch.no_grad()
def shape(model: nn.Module) -> dict[str, float]:
    """Of BiLoRA layers, means over them: R1, and the largest value over the mean one (1 where all are alike)."""
    layers = list(parts_of(model, BiLoRA).values())
    if not layers:
        return {}
    return {
        "r1": statistics.fmean(float(m.orthogonality()) for m in layers),
        "largest": statistics.fmean(float(m.spectrum().max() / m.spectrum().mean()) for m in layers),
    }


def runs(base: Settings, titles: list[str], seeds: list[int], search: bool) -> None:
    """Every run that the file does not hold yet."""
    bench, done = Bench(base), {_key(r) for r in read()}
    steps = 2 if base.quick else STEPS
    due = {steps} if search else {*range(EPOCH, steps, EPOCH), steps}
    for seed in seeds:
        for title in titles:
            for lr in ARMS[title][2] if search else [best_rate(title)]:
                row = {"bench": "bilevel", "kind": "search" if search else "run", "arm": title, "lr": lr, "seed": seed}
                if base.quick or _key(row) not in done:
                    found = run(bench, title, lr, seed, due)
                    emit(row | found | {"quick": base.quick}, None if base.quick else FILE)


def read() -> list[dict[str, Any]]:
    return read_rows(FILE)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["arm"], f"{row['lr']:.4g}", row["seed"]


def best_rate(title: str) -> float:
    """Of the arm's searched rates the one of the lowest held-out loss. SystemExit where it has not been searched."""
    found = {r["lr"]: r["scores"][-1]["held_loss"] for r in read() if r["kind"] == "search" and r["arm"] == title}
    if not found:
        raise SystemExit(f"bench.bilevel: there is no learning rate for {title!r} yet; run with --search first.")
    return min(found, key=lambda lr: found[lr])


def at_level(scores: list[dict[str, Any]], level: float, part: str = "train") -> float | None:
    """Held-out loss where the loss on `part` first passes below the level, between two evaluations on a straight line; None if never."""
    for a, b in itertools.pairwise(scores):
        high, low = a[f"{part}_loss"], b[f"{part}_loss"]
        if high >= level > low:
            return a["held_loss"] + (b["held_loss"] - a["held_loss"]) * (high - level) / (high - low)
    return None


def fitted(row: dict[str, Any]) -> str:
    """The examples that A and B were trained on: d1 in two levels, else all."""
    return "d1" if "d1_loss" in row["scores"][-1] else "train"


def mean(values: list[float | None], digits: int = 2) -> str:
    """The mean and, in brackets, each; a dash where a run has none."""
    each = ", ".join("-" if v is None else f"{v:.{digits}f}" for v in values)
    have = [v for v in values if v is not None]
    return f"{statistics.fmean(have):.{digits}f} ({each})" if len(have) == len(values) else f"({each})"


def table(seeds: list[int]) -> str:
    """At the end of the runs, per arm: losses, gaps, accuracy; then the held-out loss at equal training loss."""
    kept = {t: [r for s in seeds for r in read() if r["kind"] == "run" and r["arm"] == t and r["seed"] == s] for t in ARMS}
    kept = {t: rows for t, rows in kept.items() if rows}
    lines = [
        "| arm | learning rate | loss on the 200 | held-out loss | gap | gap to what A and B saw | held-out accuracy |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, rows in kept.items():
        ends = [r["scores"][-1] for r in rows]
        loss, held, accuracy = (mean([e[k] for e in ends], d) for k, d in (("train_loss", 2), ("held_loss", 2), ("held_accuracy", 3)))
        gap, seen = (mean([e["held_loss"] - e[f"{p}_loss"] for e, p in zip(ends, ps, strict=True)])
                     for ps in (["train"] * len(rows), [fitted(r) for r in rows]))  # fmt: skip
        lines.append(f"| {title} | {rows[-1]['lr']:g} | {loss} | {held} | {gap} | {seen} | {accuracy} |")
    lines += ["", f"| arm | {' | '.join(f'held-out loss at {v:g}' for v in LEVELS)} |", "| --- |" + " ---: |" * len(LEVELS)]
    for title, rows in kept.items():
        lines.append(f"| {title} | {' | '.join(mean([at_level(r['scores'], v, fitted(r)) for r in rows]) for v in LEVELS)} |")
    return "\n".join(lines)


def plot(seeds: list[int], file: Path) -> None:
    """Gap over epochs (the mean over the seeds, and each), and held-out loss over training loss. SystemExit if there is no run."""
    if not any(r["kind"] == "run" and r["seed"] in seeds for r in read()):
        raise SystemExit(f"bench.bilevel: {FILE} holds no run of the seeds {seeds} to draw; run without --plot first.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for k, title in enumerate(ARMS):
        rows = [r for r in read() if r["kind"] == "run" and r["arm"] == title and r["seed"] in seeds]
        gaps = [[s["held_loss"] - s["train_loss"] for s in r["scores"]] for r in rows]
        for n, (r, gap) in enumerate(zip(rows, gaps, strict=True)):
            epochs = [s["step"] / EPOCH for s in r["scores"]]
            left.plot(epochs, gap, color=f"C{k}", lw=0.6, alpha=0.4)
            if n == 0:
                left.plot(epochs, [statistics.fmean(g) for g in zip(*gaps, strict=True)], color=f"C{k}", marker="o", ms=3, label=title)
            x = [s[f"{fitted(r)}_loss"] for s in r["scores"]]
            right.plot(x, [s["held_loss"] for s in r["scores"]], color=f"C{k}", marker=".", ms=4, lw=0.8, label=title if n == 0 else None)
    left.set(xlabel=f"steps of A and B / {EPOCH}", ylabel="held-out loss - loss on the 200 examples", title="gap")
    right.set(xscale="log", xlabel="loss on the examples that A and B saw", ylabel="held-out loss", title="training goes to the left")
    right.invert_xaxis()
    left.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help=f"the learning rates, on seed {SEARCH_SEED}; no other run")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="two steps on few examples: does it run?")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="print what the file holds, run nothing")
    parser.add_argument("--plot", action="store_true", help="draw what the file holds, run nothing")
    args = parser.parse_args()
    if SEARCH_SEED in args.seeds:
        parser.error(f"--seeds: {SEARCH_SEED} is the seed that the learning rates were chosen on; take others.")
    if not (args.table or args.plot):
        base = Settings(compare=False, threads=args.threads, quick=args.quick, batch_size=BATCH, max_length=LENGTH)
        runs(base, args.arms, [SEARCH_SEED] if args.search else args.seeds, args.search)
    if args.table:
        print(table(args.seeds))
    if args.plot:
        plot(args.seeds, FILE.with_suffix(".png"))


if __name__ == "__main__":
    main()
