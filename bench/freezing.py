"""What AFLoRA's freezing does on the main job: python -m bench.freezing [--seeds 0 1 2] [--arms ...] [--plot].

AFLoRA with the authors' GLUE shares of the steps (5 % all trains, then the cubic fall, at 30 % and after nothing is left of A and B),
beside the same layers with A and B always frozen, always frozen at the rank that gives as many trained numbers as AFLoRA has on
average over the steps, and never frozen. train_square is off, as in that code: 24 matrices freeze, A and B of the feed-forward
linears, whose sides differ; those of the attention's square ones are frozen in every arm. Texts are cut at 24 tokens, half of the
job's own length, for time. --epochs: 3, or longer; runs of another length are other runs, in a table and a plot of their own.

Each arm is trained with all rates at the first seed, and with those of lowest evaluation loss at the others. The new head has the job's
rate; with --high-head it has the adapter's or a higher one, as in the authors' runs, and the rows are others again. One line per run to
bench/results/freezing.jsonl; a run that the file holds is not made again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from torch import nn

from bench.machine import RESULTS, emit, read_rows
from fastpeft.job.arms import FASTPEFT
from fastpeft.job.bench import Bench
from fastpeft.job.history import History
from fastpeft.job.loop import Trainee, is_own, train, trainee
from fastpeft.job.settings import Settings
from fastpeft.method.aflora import AFLoRA

FILE = RESULTS / "freezing.jsonl"
RANK = 4  # the authors'
START, TAIL = 0.05, 0.7  # one epoch and fourteen of twenty, at any length
LENGTH, EPOCHS = 24, 3
# of the adapter and of the new head. The adapter's: the published one, and a higher one, for this run is short
RATES = ((1e-2, 2e-3), (3e-2, 2e-3))
# the authors' classifier has 2e-2 to 8e-2 beside an adapter's 1e-2
HIGH_HEAD = ((1e-2, 1e-2), (3e-2, 3e-2), (1e-2, 3e-2))
ANY = RATES + HIGH_HEAD
Rates = tuple[tuple[float, float], ...]
ARMS = ADAPTIVE, FROZEN, FREE, EQUAL = "AFLoRA", "always frozen", "never frozen", "always frozen, equal numbers"


def run(bench: Bench, title: str, rank: int, lr: float, head: float, seed: int) -> None:
    options = {"rank": rank}
    schedule = {"start": START, "tail": TAIL, "deltaT": 5}
    fields = {"method": "aflora", "options": options, "procedure_options": schedule, "adapter_lr": lr, "lr": head, "seeds": (seed,)}
    settings = Settings(**(bench.base.as_dict() | fields))
    arm = bench.arm(FASTPEFT, settings, seed)
    if title != ADAPTIVE:
        arm.procedures.clear()
    for m in arm.model.modules():
        if isinstance(m, AFLoRA) and title in (FROZEN, EQUAL):
            m.A.requires_grad_(False), m.B.requires_grad_(False)
    sizes = {f"{n}.{leaf}": p.numel() for n, m in matrices(arm.model) for leaf, p in (("A", m.A), ("B", m.B)) if p.requires_grad}
    begins = sum(p.numel() for n, p in arm.model.named_parameters() if p.requires_grad and is_own(n))
    t = trainee(arm, settings)
    train([t], bench.data, bench.held, settings, seed=seed)
    row = {"bench": "freezing", "kind": "run", "title": title, "options": options, "lr": lr, "head_lr": head, "seed": seed, "epochs": settings.epochs, "steps": len(t.losses)}
    row |= {"procedure": schedule if title == ADAPTIVE else {}, "numbers": numbers(t, begins, sizes)}
    row |= {"accuracies": [s.accuracy for s in t.scores], "losses": [s.loss for s in t.scores]}
    row |= {"history": t.histories["freezing"].changes if title == ADAPTIVE else None, "examples": len(bench.held)}
    emit(row, None if settings.quick else FILE)


def matrices(model: nn.Module) -> Iterator[tuple[str, AFLoRA]]:
    for n, m in model.named_modules():
        if isinstance(m, AFLoRA):
            yield n.rpartition(".adapter.")[0], m


def numbers(t: Trainee, begins: int, sizes: dict[str, int]) -> dict[str, float]:
    """How many numbers of the adapter train: at first, in the last step, and on average over the steps."""
    if not t.histories:
        return {"first": begins, "last": begins, "mean": begins}
    states, steps, trains = dict(t.histories["freezing"].states()), len(t.losses), []
    now: dict[str, int] = {}
    for step in range(steps + 1):
        # what is frozen in a step does not move in it
        now = states.get(step, now)
        trains.append(begins - sum(n for name, n in sizes.items() if not now[name]))
    return {"first": begins, "last": trains[-1], "mean": statistics.fmean(trains[1:])}


def equal_rank(bench: Bench) -> int:
    """The rank at which the vectors alone have as many numbers as AFLoRA trained on average: d has one per rank and layer."""
    rows = [r for r in read(bench.base.epochs, ANY) if r["title"] == ADAPTIVE]
    if not rows:
        if bench.base.quick:
            return 8  # it keeps no rows; any rank shows that it runs
        raise SystemExit(f"bench.freezing: {FILE} holds no run of {ADAPTIVE} to take the rank from; run that arm first.")
    arm = bench.arm(FASTPEFT, bench.settings("aflora", {"rank": RANK}, None), 0)
    layers = [m for _, m in matrices(arm.model)]
    return round((statistics.fmean(r["numbers"]["mean"] for r in rows) - sum(m.db.numel() for m in layers)) / len(layers))


def rates_of(row: dict[str, Any]) -> tuple[float, float]:
    return row["lr"], row.get("head_lr", RATES[0][1])  # the oldest rows do not name the head's


def read(epochs: int, rates: Rates) -> list[dict[str, Any]]:
    return [r for r in read_rows(FILE) if r["epochs"] == epochs and rates_of(r) in rates]


def best_rates(title: str, epochs: int, rates: Rates) -> tuple[float, float]:
    """Those of the lowest loss at the end among the first seed's."""
    rows = [r for r in read(epochs, rates) if r["title"] == title]
    first = [r for r in rows if r["seed"] == rows[0]["seed"]]
    return rates_of(min(first, key=lambda r: r["losses"][-1]))


def train_all(bench: Bench, seeds: list[int], arms: list[str], rates: Rates) -> None:
    epochs = bench.base.epochs
    for k, seed in enumerate(seeds):
        for title in arms:
            rank = RANK
            if title == EQUAL:
                held = [r["options"]["rank"] for r in read(epochs, ANY) if r["title"] == EQUAL]
                rank = held[0] if held else equal_rank(bench)
            for both in rates if k == 0 or bench.base.quick else [best_rates(title, epochs, rates)]:
                if bench.base.quick or (title, both, seed) not in {(r["title"], rates_of(r), r["seed"]) for r in read(epochs, rates)}:
                    run(bench, title, rank, *both, seed)


def chosen(epochs: int, rates: Rates, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Title -> the rows of its best rates, one per seed; of these seeds, or of all where none is given."""
    rows = read(epochs, rates)
    best = {t: best_rates(t, epochs, rates) for t in dict.fromkeys(r["title"] for r in rows)}
    return {t: [r for r in rows if r["title"] == t and rates_of(r) == both and (not seeds or r["seed"] in seeds)] for t, both in best.items()}


def table(epochs: int, rates: Rates, seeds: list[int]) -> str:
    lines = ["| arm | rank | rates of adapter, head (the others' loss) | trains at first | in the last step | mean over the steps | loss | accuracy | per seed |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for title, rows in chosen(epochs, rates, seeds).items():
        r, n = rows[0], {k: statistics.fmean(q["numbers"][k] for q in rows) for k in ("first", "last", "mean")}
        other = [q["losses"][-1] for q in read(epochs, rates) if q["title"] == title and rates_of(q) != rates_of(r)]
        rate = f"{', '.join(f'{v:g}' for v in rates_of(r))} ({', '.join(f'{v:.3f}' for v in other)})"
        accuracy = [q["accuracies"][-1] for q in rows]
        loss = statistics.fmean(q["losses"][-1] for q in rows)
        counts = " | ".join(f"{n[k]:,.0f}" for k in ("first", "last", "mean"))
        each = ", ".join(f"{a:.3f}" for a in accuracy)
        lines.append(f"| {title} | {r['options']['rank']} | {rate} | {counts} | {loss:.3f} | {statistics.fmean(accuracy):.3f} | {each} |")
    return "\n".join(lines)


def plot(epochs: int, rates: Rates, seeds: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows = chosen(epochs, rates, seeds)
    for r in rows[ADAPTIVE]:
        steps = r["steps"]
        found = History(r["history"]).by_type(statistics.fmean)
        for k, (name, points) in enumerate(found.items()):
            xs, ys = zip(*points, (steps, points[-1][1]), strict=True)
            style = {"lw": 2, "label": name} if r["seed"] == rows[ADAPTIVE][0]["seed"] else {"lw": 0.8, "alpha": 0.6}
            left.plot(xs, ys, drawstyle="steps-post", color=f"C{k}", **style)
    left.set(xlabel="step", ylabel="share of the matrices that trains (thin: the other seeds)", title=f"{ADAPTIVE}, by type of matrix")
    for k, (title, of) in enumerate(rows.items()):
        means = [statistics.fmean(a) for a in zip(*(r["accuracies"] for r in of), strict=True)]
        right.plot(means, marker="o", ms=4, color=f"C{k}", label=f"{title}, rank {of[0]['options']['rank']}")
        for r in of:
            right.plot(r["accuracies"], lw=0.7, alpha=0.5, color=f"C{k}")
    right.set(xlabel="epoch", ylabel="accuracy", title="mean and seeds")
    for axis in (left, right):
        axis.legend(fontsize=8)
    suffix = ("" if epochs == EPOCHS else f"-{epochs}") + ("-high-head" if rates == HIGH_HEAD else "")
    figure.savefig(FILE.with_name(f"{FILE.stem}{suffix}.png"), dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--high-head", action="store_true", help="the new head at the adapter's rate or above")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one epoch on few examples: does it run?")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    rates = HIGH_HEAD if args.high_head else RATES
    if args.seeds:
        train_all(Bench(Settings(compare=False, threads=args.threads, quick=args.quick, max_length=LENGTH, epochs=1 if args.quick else args.epochs)), args.seeds, args.arms, rates)
    if args.plot:
        plot(args.epochs, rates, args.seeds)
    print(table(args.epochs, rates, args.seeds))


if __name__ == "__main__":
    main()
