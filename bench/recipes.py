"""Every recipe on the main job: python -m bench.recipes [--methods a b] [--train] [--times] [--table].

--train: one line per run to bench/results/recipes.jsonl: accuracy, loss, numbers that train in the adapter, bytes kept for
backward. --times: one line per recipe: the time of a training step as a ratio to the frozen model with a trained head, both in
one interleaved run. --table: what the file holds, as Markdown. A run that the file holds is not made again.

Every run has the job's settings and the recipe's defaults, but where fastpeft.job.recipes says otherwise and why; the adapter's learning rate
is the job's, the recipe's published rule, or what --lr says.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from bench.machine import RESULTS, emit, read_rows
from fastpeft.job import measure
from fastpeft.job.arms import FASTPEFT
from fastpeft.job.bench import Bench
from fastpeft.job.errors import JobError
from fastpeft.job.loop import train, trainee
from fastpeft.job.recipes import BESIDE, Entry
from fastpeft.job.recipes import entries as every_entry
from fastpeft.job.settings import Settings
from fastpeft.job.step_times import step_times

FILE = RESULTS / "recipes.jsonl"


def entries(methods: list[str] | None) -> dict[str, Entry]:
    """Title -> entry, without those whose routers need the domains of the texts (bench.routed) or that one run cannot do."""
    try:
        return {t: e for t, e in every_entry(methods).items() if not e.routed and e.left_out is None}
    except JobError as e:
        raise SystemExit(str(e)) from None


def train_all(bench: Bench, found: dict[str, Entry], seeds: list[int], lr: float | None) -> None:
    """Train every entry that the file does not hold yet, and the frozen model with PEFT's LoRA beside it."""
    done = {_key(r) for r in read("train")}
    for seed in seeds:
        for entry in (*BESIDE, *found.values()):
            settings = bench.settings(entry.method, entry.options, lr if entry.arm == FASTPEFT else None)
            row: dict[str, Any] = {"bench": "recipes", "kind": "train", "title": entry.title, "method": entry.method, "options": dict(entry.options)}
            row |= {"lr": settings.own_lr if entry.arm == FASTPEFT else settings.lr, "seed": seed, "epochs": settings.epochs}
            if _key(row) in done:
                continue
            arm = bench.arm(entry.arm, settings, seed)
            row |= {"trainable": bench.own(arm, entry.method), "saved_bytes": measure.step_bytes(arm.model, bench.longest(), arm.procedures)}
            t = trainee(arm, settings)
            train([t], bench.data, bench.held, settings, seed=seed)
            score = t.scores[-1]
            row |= {"loss": score.loss, "accuracy": score.accuracy, "examples": len(bench.held)}
            emit(row | {"quick": settings.quick}, None if settings.quick else FILE)


def time_all(bench: Bench, found: dict[str, Entry], rounds: int) -> None:
    """A step of each entry beside a step of the frozen model with a trained head and one of PEFT's LoRA."""
    for entry in found.values():
        row = {"bench": "recipes", "kind": "times", "title": entry.title, "method": entry.method, "options": dict(entry.options)}
        emit(row | step_times(bench, entry, rounds), None if bench.base.quick else FILE)


def read(kind: str) -> list[dict[str, Any]]:
    return [r for r in read_rows(FILE) if r["kind"] == kind]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["title"], json.dumps(row["options"], sort_keys=True), f"{row['lr']:.4g}", row["seed"], row["epochs"]


def table() -> str:
    """Per recipe its best learning rate's accuracy over the seeds, and the last times."""
    lines = [
        "| recipe | trains | accuracy | runs | learning rate | kept for backward, MiB | step / frozen | PEFT LoRA's step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    times = {r["title"]: r for r in read("times")}
    trained: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for r in read("train"):
        trained.setdefault(r["title"], {}).setdefault(r["lr"], []).append(r)
    best = {title: min(by.values(), key=lambda rs: statistics.fmean(r["loss"] for r in rs)) for title, by in trained.items()}
    for title, rows in sorted(best.items(), key=lambda item: -statistics.fmean(r["accuracy"] for r in item[1])):
        r, t = rows[-1], times.get(title)
        step = f"{t['ratio']:.2f} | {t['peft_lora']:.2f}" if t else " | "
        accuracy = statistics.fmean(q["accuracy"] for q in rows)
        lines.append(
            f"| {title} | {r['trainable']:,d} | {accuracy:.3f} | {len(rows)} | {r['lr']:.2g} | {r['saved_bytes'] / 2**20:.1f} | {step} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one epoch on few examples: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, help="of the adapters' own parameters")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if args.train or args.times:
        base = Settings(compare=False, threads=args.threads, quick=args.quick, epochs=1 if args.quick else 3)
        bench, found = Bench(base), entries(args.methods)
        if args.train:
            train_all(bench, found, args.seeds, args.lr)
        if args.times:
            time_all(bench, found, args.rounds)
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
