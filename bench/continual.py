"""Four tasks in a row on the built-in text: python -m bench.continual [--pilot] [--seeds 0 1 2] [--arms ...] [--quick] [--plot].

O-LoRA, incremental LoRA (a LoRA per task, no penalty), one LoRA for all tasks, and the frozen model with a head per task, which
can forget nothing. One line per run to bench/results/continual.jsonl: the accuracy on every task after each task. A run that the
file holds is not made again. --plot: draw what the file holds and print it as Markdown, run nothing.

Every arm has O-LoRA's defaults (rank 8, alpha 32) and the settings below. --pilot: O-LoRA with each of LAMBDAS on seed 100, which
is not among the seeds that are reported; the lambda1 of the highest average accuracy there is that of all other runs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from bench.machine import RESULTS, emit, read_rows
from fastpeft.job.sequence import HEADS, INCREMENTAL, O_LORA, ONE, Job, Plan, Result, learn, prepare
from fastpeft.job.sequence_report import by_arm, draw, mean_matrix, table
from fastpeft.job.settings import Settings
from fastpeft.job.tasks import BUILTIN

FILE = RESULTS / "continual.jsonl"
ARMS = (O_LORA, INCREMENTAL, ONE, HEADS)
LAMBDAS = (0.005, 0.05, 0.5)  # the last is the authors'
PILOT_SEED = 100
# the paper's targets; as short as the texts can be cut and still be told apart, for the sake of the time
TARGETS = ("query", "value")
EPOCHS, MAX_LENGTH, LR = 2, 16, 4e-3
SEEDS = (0, 1, 2)
_NOW = (EPOCHS, MAX_LENGTH, LR, TARGETS)


def prepared(lambda1: float, threads: int | None, quick: bool) -> Job:
    """What every run shares, once per process."""
    settings = Settings(
        method=O_LORA,
        procedure_options={"lambda1": lambda1},
        target_modules=TARGETS,
        epochs=EPOCHS,
        max_length=MAX_LENGTH,
        lr=LR,
        threads=threads,
        quick=quick,
        compare=False,
        output=str(RESULTS),  # prepare checks that it can be written; nothing is
    )
    return prepare(Plan(settings, compare=True))


def run(job: Job, name: str, seed: int) -> None:
    """One arm on one seed, if the file does not hold it yet."""
    s = job.plan.settings
    row: dict[str, Any] = {"bench": "continual", "arm": name, "seed": seed, "epochs": s.epochs, "max_length": MAX_LENGTH, "lr": LR}
    row |= {"targets": list(TARGETS)} | (dict(s.procedure_options) if name == O_LORA else {})
    if _key(row) in {_key(r) for r in read()}:
        return
    [learner] = learn(replace(job, plan=replace(job.plan, only=(name,))), seed)
    r = learner.result
    row |= {"accuracy": r.accuracy, "average": r.average(), "forgetting": r.forgetting, "trainable": r.trainable}
    row |= {"tasks": [t.labels.name for t in job.tasks], "examples": [len(t.held) for t in job.tasks], "quick": s.quick}
    emit(row, None if s.quick else FILE)


def read() -> list[dict[str, Any]]:
    return read_rows(FILE)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["arm"], row["seed"], *_settings(row), row.get("lambda1")


def _settings(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["epochs"], row["max_length"], row["lr"], tuple(row["targets"])


def chosen(rows: list[dict[str, Any]]) -> float:
    """The pilots' best lambda1, of equal ones the authors' end of LAMBDAS. SystemExit until all of them are in the file."""
    own = {r["lambda1"]: r["average"] for r in rows if r["arm"] == O_LORA and r["seed"] == PILOT_SEED and _settings(r) == _NOW}
    missing = [x for x in LAMBDAS if x not in own]
    if missing:
        raise SystemExit(f"bench.continual: no pilot with lambda1 {', '.join(map(str, missing))}; run --pilot first, or give --lambda1.")
    for lambda1 in LAMBDAS:
        print(f"pilot, seed {PILOT_SEED}, lambda1 {lambda1}: average accuracy {own[lambda1]:.3f}")
    return max(reversed(LAMBDAS), key=lambda x: own[x])


def results(rows: list[dict[str, Any]], lambda1: float) -> dict[str, list[Result]]:
    """Arm -> its results, the seeds in order."""
    own = [r for r in rows if _settings(r) == _NOW and r.get("lambda1", lambda1) == lambda1]
    own.sort(key=lambda r: (ARMS.index(r["arm"]), r["seed"]))
    return by_arm([Result(r["arm"], r["trainable"], r["accuracy"]) for r in own if r["seed"] in SEEDS])


def markdown(arms: dict[str, list[Result]]) -> str:
    """The table of the report, and each arm's mean accuracies after the last task."""
    header, *body = table(arms)
    names = [" / ".join(classes) for classes in BUILTIN]
    lines = [[*header[:4], *names], ["---", *["---:"] * (3 + len(names))]]
    lines += [[*row[:4], *(f"{a:.3f}" for a in mean_matrix(rs)[-1])] for row, rs in zip(body, arms.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    if args.pilot:
        for lambda1 in LAMBDAS:
            run(prepared(lambda1, args.threads, args.quick), O_LORA, PILOT_SEED)
        return
    lambda1 = LAMBDAS[-1] if args.quick and args.lambda1 is None else args.lambda1
    if lambda1 is None and (args.plot or O_LORA in args.arms):
        lambda1 = chosen(read())
    if not args.plot:
        job = prepared(lambda1 or 0.0, args.threads, args.quick)  # the other arms have none
        for seed in args.seeds:
            for name in args.arms:
                run(job, name, seed)
    arms = {} if lambda1 is None else results(read(), lambda1)
    if arms and not args.quick:
        draw(arms, [" / ".join(classes) for classes in BUILTIN], FILE.with_suffix(".png"))
        print(markdown(arms))


if __name__ == "__main__":
    main()
