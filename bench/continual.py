"""Three tasks in a row: python -m bench.continual [--pilot] [--seeds 0 1 2] [--arms ...] [--quick] [--plot].

The tasks are docstrings, comments and code of the standard library (bench.forms). They share one head of three fixed answers, which mean
something else in each task, as the words of a language model's vocabulary do; which task a text is of has to be seen from the text. O-LoRA,
incremental LoRA (a LoRA per task, no penalty), one LoRA for all tasks, and one LoRA on all tasks at once, which forgets nothing. One line per
run to bench/results/continual.jsonl: the accuracy on every task after each task. A run that the file holds is not made again. --plot: draw what
the file holds and print it as Markdown, run nothing.

Every arm has rank 8 and scale 2 in every linear layer of the blocks, and the settings below. --pilot: O-LoRA with each of LAMBDAS on seed 100,
which is not among the seeds that are reported; the lambda1 of the highest average accuracy there is that of all other runs.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch

from bench.machine import RESULTS, emit, read_rows
from bench.mixture import ALL, DOMAINS, Bench
from fastpeft.job.evaluate import evaluate
from fastpeft.job.loop import train, trainee
from fastpeft.job.procedures import build_procedures
from fastpeft.job.settings import Settings
from fastpeft.train import next_task

FILE = RESULTS / "continual.jsonl"
O_LORA, INCREMENTAL, ONE, TOGETHER = "O-LoRA", "incremental LoRA", "one LoRA", "all tasks at once"
ARMS = (O_LORA, INCREMENTAL, ONE, TOGETHER)
LAMBDAS = (0.005, 0.05, 0.5)  # the last is the authors'
PILOT_SEED, SEEDS = 100, (0, 1, 2)
EPOCHS, MAX_LENGTH, LR = 3, 32, 2e-3
OPTIONS = {"rank": 8, "alpha": 16}
_NOW = (EPOCHS, MAX_LENGTH, LR)


def run(bench: Bench, name: str, lambda1: float, seed: int) -> None:
    """One arm on one seed, if the file does not hold it yet."""
    row: dict[str, Any] = {"bench": "continual", "arm": name, "seed": seed, "epochs": EPOCHS, "max_length": MAX_LENGTH, "lr": LR}
    row |= {"lambda1": lambda1} if name == O_LORA else {}
    if _key(row) in {_key(r) for r in read()}:
        return
    penalty = {"lambda1": lambda1 if name == O_LORA else 0.0}
    per_task = name in (O_LORA, INCREMENTAL)
    method, more = ("o_lora", {"procedure_options": penalty}) if per_task else ("lora", {})
    arm, settings = bench.arm(bench.with_fixed_head(seed), method, OPTIONS, LR, seed, bench.base.epochs, **more)
    accuracy: list[list[float]] = []
    for k, task in enumerate([ALL] if name == TOGETHER else DOMAINS):
        if k and per_task:
            torch.manual_seed(seed + 1000 * k)
            next_task(arm.model)
            arm.procedures = build_procedures(["OLoRAPenalty"], penalty)
        data, held = (replace(part[task], domains=None) for part in (bench.data, bench.held))
        train([trainee(arm, settings)], data, held, settings, seed=seed + k)
        accuracy.append([evaluate(arm.model, bench.held[d], settings).accuracy or 0.0 for d in DOMAINS])
    row |= {"accuracy": accuracy, "average": statistics.fmean(accuracy[-1]), "forgetting": forgetting(accuracy)}
    row |= {"tasks": list(DOMAINS), "examples": [len(bench.held[d]) for d in DOMAINS], "quick": bench.base.quick}
    emit(row, None if bench.base.quick else FILE)


def forgetting(accuracy: list[list[float]]) -> float | None:
    """Mean over all tasks but the last of: the best accuracy after it was learned and before the last task, less the final one (Chaudhry et
    al. 2018, arXiv 1801.10112). None where nothing was learned in turn."""
    earlier, final = accuracy[:-1], accuracy[-1]
    return statistics.fmean(max(r[k] for r in earlier[k:]) - final[k] for k in range(len(earlier))) if earlier else None


def read() -> list[dict[str, Any]]:
    return read_rows(FILE)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["arm"], row["seed"], *_settings(row), row.get("lambda1")


def _settings(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["epochs"], row["max_length"], row["lr"]


def chosen(rows: list[dict[str, Any]]) -> float:
    """The pilots' best lambda1, of equal ones the authors' end of LAMBDAS. SystemExit until all of them are in the file."""
    own = {r["lambda1"]: r["average"] for r in rows if r["arm"] == O_LORA and r["seed"] == PILOT_SEED and _settings(r) == _NOW}
    missing = [x for x in LAMBDAS if x not in own]
    if missing:
        raise SystemExit(f"bench.continual: no pilot with lambda1 {', '.join(map(str, missing))}; run --pilot first, or give --lambda1.")
    for lambda1 in LAMBDAS:
        print(f"pilot, seed {PILOT_SEED}, lambda1 {lambda1}: average accuracy {own[lambda1]:.3f}")
    return max(reversed(LAMBDAS), key=lambda x: own[x])


def results(rows: list[dict[str, Any]], lambda1: float) -> dict[str, list[dict[str, Any]]]:
    """Arm -> its rows, the seeds in order."""
    own = [r for r in rows if _settings(r) == _NOW and r.get("lambda1", lambda1) == lambda1 and r["seed"] in SEEDS]
    own.sort(key=lambda r: r["seed"])
    return {name: found for name in ARMS if (found := [r for r in own if r["arm"] == name])}


def markdown(arms: dict[str, list[dict[str, Any]]]) -> str:
    """Each arm's means: at the end on all tasks and on each, what was forgotten, and each task when it was just learned."""
    lines = [f"| arm | average at the end | by seed | forgetting | {' | '.join(DOMAINS)} | just learned |", "| --- | ---: | --- | ---: |" + " ---: |" * 4]
    for name, rows in arms.items():
        final = [statistics.fmean(r["accuracy"][-1][k] for r in rows) for k in range(len(DOMAINS))]
        lost = [r["forgetting"] for r in rows]
        just = [statistics.fmean(a[k] for k, a in enumerate(r["accuracy"])) for r in rows] if len(rows[0]["accuracy"]) > 1 else []
        cells = [f"{statistics.fmean(r['average'] for r in rows):.3f}", ", ".join(f"{r['average']:.3f}" for r in rows)]
        cells += ["" if lost[0] is None else f"{statistics.fmean(lost):.3f}", *(f"{a:.3f}" for a in final)]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{statistics.fmean(just):.3f}' if just else ''} |")
    return "\n".join(lines)


def draw(arms: dict[str, list[dict[str, Any]]]) -> None:
    """The accuracy on each task after each task: means, and thin each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(DOMAINS), figsize=(4 * len(DOMAINS), 3.6), sharey=True, layout="constrained")
    steps = range(1, len(DOMAINS) + 1)
    for c, (name, rows) in enumerate(arms.items()):
        for k, axis in enumerate(axes):
            curves = [[a[k] for a in r["accuracy"]] * (len(DOMAINS) if name == TOGETHER else 1) for r in rows]
            style = {"color": f"C{c}", "ls": "--" if name == TOGETHER else "-"}
            for curve in curves:
                axis.plot(steps, curve, lw=0.5, **style)
            axis.plot(steps, [statistics.fmean(v) for v in zip(*curves, strict=True)], lw=2, marker="o", label=name, **style)
            axis.axvline(k + 1, color="0.8", lw=0.8, zorder=0)
            axis.set(title=f"accuracy on {DOMAINS[k]}", xticks=steps, xticklabels=[f"after\n{d}" for d in DOMAINS])
    axes[0].legend(fontsize=8)
    figure.savefig(FILE.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--lambda1", type=float, help="of O-LoRA (default: the best pilot's)")
    parser.add_argument("--pilot", action="store_true", help="only the runs that choose lambda1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="few examples, kept nowhere: does it run?")
    parser.add_argument("--plot", action="store_true", help="draw what the file holds and print it, run nothing")
    args = parser.parse_args()
    lambda1 = LAMBDAS[-1] if args.quick and args.lambda1 is None else args.lambda1
    if lambda1 is None and not args.pilot:
        lambda1 = chosen(read())
    if not args.plot:
        bench = Bench(Settings(compare=False, threads=args.threads, quick=args.quick, epochs=1 if args.quick else EPOCHS, max_length=MAX_LENGTH))
        pilots = [(O_LORA, x, PILOT_SEED) for x in LAMBDAS]
        for name, x, seed in pilots if args.pilot else [(n, lambda1, s) for s in args.seeds for n in args.arms]:
            run(bench, name, x, seed)
    if not args.pilot and not args.quick:
        arms = results(read(), lambda1)
        draw(arms)
        print(markdown(arms))


if __name__ == "__main__":
    main()
