"""Every recipe on the main job: python -m bench.recipes [--methods a b] [--train] [--times] [--table].

--train: one line per run to bench/results/recipes.jsonl: accuracy, loss, numbers that train in the adapter, bytes kept for
backward. --times: one line per recipe: the time of a training step as a ratio to the frozen model with a trained head, both in
one interleaved run. --table: what the file holds, as Markdown. A run that the file holds is not made again.

Every run has the job's settings and the recipe's defaults, but where OPTIONS says otherwise and why; the adapter's learning rate
is the job's, the recipe's published rule, or what --lr says.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import statistics
from typing import Any

import torch

from bench.machine import RESULTS, emit, read_rows
from fastpeft.job import measure
from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT, Arm, build_arms
from fastpeft.job.data import encode, load_texts
from fastpeft.job.loop import is_own, train, train_step, trainee
from fastpeft.job.models import find_model, load_model, load_tokenizer
from fastpeft.job.procedures import without_source
from fastpeft.job.settings import Settings
from fastpeft.registry import every_recipe, get_recipe

FILE = RESULTS / "recipes.jsonl"
# name in the table -> (method, options); the yardsticks that no recipe's default is, and what a weak default needs to be told apart from a defect
YARDSTICKS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora rank 1": ("lora", {"rank": 1}),
    "lotr rank 32": ("lotr", {"rank": 32}),
    "lotr svd": ("lotr", {"left": "svd", "right": "svd"}),
}
# what a default made for billions of parameters needs on this encoder of 384 dimensions
OPTIONS: dict[str, dict[str, Any]] = {
    # the published density trains 443 numbers in a 384 x 384 layer, and the schedule's 64 steps are a third of this job's
    "rosa": {"density": 0.01},
}


def entries(methods: list[str] | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name in the table -> (method, options)."""
    every = YARDSTICKS | {r.name: (r.name, OPTIONS.get(r.name, {})) for r in every_recipe() if not r.cls.ROUTED}  # whose routers need the domains of the texts: bench.routed
    unknown = sorted(set(methods or ()) - every.keys())
    if unknown:
        raise SystemExit(f"bench.recipes: no such recipe: {', '.join(unknown)}; there are {', '.join(every)}.")
    return {k: v for k, v in every.items() if methods is None or k in methods}


class Bench:
    """The job's model and data, loaded once."""

    def __init__(self, base: Settings):
        torch.set_num_threads(base.thread_count)
        self.base, self.source, texts = base, find_model(base), load_texts(base)
        self.classes, self.tokenizer = texts.classes, load_tokenizer(self.source)
        self.data = encode(texts.train, texts.train_labels, self.tokenizer, base)
        self.held = encode(texts.evaluation, texts.evaluation_labels, self.tokenizer, base)

    def arm(self, name: str, settings: Settings, seed: int) -> Arm:
        pad = self.tokenizer.pad_token_id
        model, self.heads = load_model(self.source, settings, classes=self.classes, pad=pad, seed=seed)
        [arm] = build_arms([name], model, self.heads, settings, seed=seed)
        return arm

    def settings(self, method: str, options: dict[str, Any], lr: float | None) -> Settings:
        return Settings(**(self.base.as_dict() | {"method": method, "options": options, "adapter_lr": lr}))

    def longest(self) -> dict[str, torch.Tensor]:
        """A batch of the longest training texts."""
        order = sorted(range(len(self.data)), key=lambda k: -len(self.data.ids[k]))
        return self.data.batch(order[: self.base.batch_size])


def train_all(bench: Bench, found: dict[str, tuple[str, dict[str, Any]]], seeds: list[int], lr: float | None) -> None:
    """Train every entry that the file does not hold yet, and the frozen model with PEFT's LoRA beside it."""
    done = {_key(r) for r in read("train")}
    plan = [(FROZEN, FROZEN, "lora", {}), ("PEFT lora", PEFT, "lora", {})]
    plan += [(title, FASTPEFT, method, options) for title, (method, options) in found.items()]
    for seed in seeds:
        for title, name, method, options in plan:
            settings = bench.settings(method, options, lr if name == FASTPEFT else None)
            row: dict[str, Any] = {"bench": "recipes", "kind": "train", "title": title, "method": method, "options": options}
            row |= {"lr": settings.own_lr if name == FASTPEFT else settings.lr, "seed": seed, "epochs": settings.epochs}
            if _key(row) in done:
                continue
            arm = bench.arm(name, settings, seed)
            own = sum(p.numel() for n, p in arm.model.named_parameters() if p.requires_grad and _adapter(n, name))
            if name == FASTPEFT and get_recipe(method).cls.TRAINS_ALL:
                own = arm.trainable - sum(p.numel() for h in bench.heads for p in arm.model.get_submodule(h).parameters())
            row |= {"trainable": own, "saved_bytes": measure.step_bytes(arm.model, bench.longest(), arm.procedures)}
            t = trainee(arm, settings)
            train([t], bench.data, bench.held, settings, seed=seed)
            score = t.scores[-1]
            row |= {"loss": score.loss, "accuracy": score.accuracy, "examples": len(bench.held)}
            emit(row | {"quick": settings.quick}, None if settings.quick else FILE)


def _adapter(name: str, arm: str) -> bool:
    return is_own(name) or (arm == PEFT and "lora_" in name)


def time_all(bench: Bench, found: dict[str, tuple[str, dict[str, Any]]], rounds: int) -> None:
    """A step of each entry beside a step of the frozen model with a trained head and one of PEFT's LoRA."""
    batch = bench.longest()
    for title, (method, options) in found.items():
        settings = bench.settings(method, options, None)
        arms = {name: bench.arm(name, settings, 0) for name in (FROZEN, FASTPEFT)}
        arms[PEFT] = bench.arm(PEFT, bench.settings("lora", {}, None), 0)
        arms["frozen again"] = copy.deepcopy(arms[FROZEN])
        trainees = {name: trainee(arm, settings, total_steps=measure.LONG_RUN) for name, arm in arms.items()}
        for procedure in without_source([p for arm in arms.values() for p in arm.procedures]):
            procedure.source = [batch]
        steps = {name: functools.partial(train_step, t, batch, settings.lr, settings) for name, t in trainees.items()}
        with contextlib.ExitStack() as stack:
            for t in trainees.values():
                t.arm.model.train()
                stack.enter_context(contextlib.nullcontext() if t.runner is None else t.runner)
            seconds = measure.interleaved(steps, rounds=rounds)
        ratios = {k: statistics.median(a / b for a, b in zip(v, seconds[FROZEN], strict=True)) for k, v in seconds.items()}
        row = {"bench": "recipes", "kind": "times", "title": title, "method": method, "options": options, "rounds": rounds}
        emit(row | {"ratio": ratios[FASTPEFT], "peft_lora": ratios[PEFT], "again": ratios["frozen again"]}, None if bench.base.quick else FILE)


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
