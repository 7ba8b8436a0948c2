"""`fastpeft compare`: recipes on the main job, each at its best learning rate of one grid, over seeds.

A recipe's rate is that of the lowest evaluation loss at the end of its pilot runs, one for every rate of the grid, on a seed that is not
reported. It is the rate of all that trains, the new head included; a method's own ratios (LoRA+, for one) multiply it. The frozen model
and PEFT's LoRA are chosen for and trained in the same way.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastpeft.job import identity, measure
from fastpeft.job.arms import FROZEN, PEFT, Arm
from fastpeft.job.bench import Bench
from fastpeft.job.compare_store import Store
from fastpeft.job.errors import JobError, said_by
from fastpeft.job.evaluate import Score
from fastpeft.job.loop import train, trainee
from fastpeft.job.models import check_length
from fastpeft.job.outcome import versions
from fastpeft.job.recipes import BESIDE, Entry, entries
from fastpeft.job.settings import Settings

GRID = (5e-4, 2e-3, 8e-3, 3.2e-2)
PILOT_SEED = 100
REPORT_EVERY = 600.0  # seconds
# of a second frozen model to the first: further from one, and the machine is too busy for a time to mean anything
NOISE = 0.1
# what a call may choose anew, or what is no setting of the job: the rest of the settings makes runs comparable
_FREE = ("method", "options", "lr", "adapter_lr", "seeds", "threads", "compare", "procedures", "procedure_options", "patience", "min_delta")


@dataclass(frozen=True)
class Plan:
    """base: the job's settings; its seeds are the reported ones and its output the folder.   recipes: titles, None for all."""

    base: Settings
    recipes: tuple[str, ...] | None = None
    grid: tuple[float, ...] = GRID
    pilot_seed: int = PILOT_SEED

    def check(self) -> None:
        """Raise JobError, before any long work."""
        if not self.grid or any(not (math.isfinite(r) and r > 0) for r in self.grid) or len(set(self.grid)) != len(self.grid):
            raise JobError(f"compare: --grid {list(self.grid)}; give different finite rates above 0.")
        if self.pilot_seed < 0:
            raise JobError(f"compare: --pilot-seed {self.pilot_seed}; it must be at least 0.")
        if self.pilot_seed in self.base.seeds:
            raise JobError(f"compare: --pilot-seed {self.pilot_seed} is one of --seeds; a seed that rates are chosen on is not reported.")
        try:
            self.base.check()
        except JobError as e:
            raise JobError(said_by("compare", e), code=e.code) from None

    @property
    def entries(self) -> list[Entry]:
        """Those asked for, after the two that every recipe is read beside."""
        return [*BESIDE, *entries(self.recipes).values()]

    @property
    def identity(self) -> dict[str, Any]:
        """What the runs of one folder have in common; plain JSON."""
        of = {k: v for k, v in identity.of_settings(self.base).items() if k not in _FREE and not k.endswith("(version)")}
        return of | {"pilot seed": self.pilot_seed}


class Comparison:
    """A plan and its folder. The model and the data are loaded when the first run needs them."""

    def __init__(self, plan: Plan):
        plan.check()
        self.plan, self.store = plan, Store(Path(plan.base.output))
        self.todo = [e for e in plan.entries if e.left_out is None]
        self._benches: dict[bool, Bench] = {}
        self.store.check(plan.identity)

    def train(self) -> Iterator[None]:
        """Make the runs that the folder lacks, seed by seed, the pilots before the first; yields now and then, for a report of what there is."""
        shown = time.monotonic()
        for seed in self.plan.base.seeds:
            for entry in self.todo:
                for rate in self.plan.grid:
                    self._run(entry, rate, self.plan.pilot_seed)
                best = chosen_rate(self.store.record(entry.title), self.plan.pilot_seed)
                if best is not None:
                    self._run(entry, best, seed)
                if time.monotonic() - shown > REPORT_EVERY:
                    yield
                    shown = time.monotonic()

    def time(self, rounds: int) -> list[str]:
        """Time the steps of the entries that were not timed yet; returns the titles of those that a busy machine kept from it."""
        from fastpeft.job.step_times import step_times

        busy = []
        for entry in self.todo:
            if self.store.timing(entry.title):
                continue
            found = step_times(self._bench(entry), entry, rounds)
            print(f"{entry.title}: {found['ratio']:.2f} of a frozen step; frozen beside itself {found['again']:.2f}", flush=True)
            if abs(found["again"] - 1) > NOISE:
                busy.append(entry.title)
                continue
            self.store.time(entry.title, found | {"threads": torch.get_num_threads(), "versions": versions()})
        return busy

    def _bench(self, entry: Entry) -> Bench:
        if entry.routed not in self._benches:
            bench = Bench(replace(self.plan.base, method=entry.method) if entry.routed else self.plan.base)
            if not entry.routed:
                arm = bench.arm(FROZEN, bench.base, 0)
                check_length(arm.model, bench.base)
                parts = {"training": bench.data, "evaluation": bench.held}
                own = identity.of_examples(parts, bench.classes) | identity.of_model(arm.model, bench.heads)
                about = {"model name": bench.source.name, "model sha256": bench.source.sha256, "data description": bench.texts.description, "majority": bench.texts.majority}
                self.store.check(own | about | {"examples": [len(bench.data), len(bench.held)]})
            self._benches[entry.routed] = bench
        return self._benches[entry.routed]

    def _run(self, entry: Entry, rate: float, seed: int) -> None:
        """Make one run, unless the folder holds it. What goes wrong in it is its result; where that may not be so again, it is no final one."""
        held = [r for r in self.store.record(entry.title)["runs"] if (r["seed"], r["rate"]) == (seed, rate)]
        if held and (not held[0].get("error") or held[0]["final"]):
            return
        if not entry.routed:
            self._bench(entry)  # what is wrong here is wrong for every recipe
        facts: dict[str, Any] = {"method": entry.method, "options": dict(entry.options), "arm": entry.arm, "system": _system()}
        run: dict[str, Any] = {"seed": seed, "rate": rate, "when": datetime.now(UTC).isoformat(timespec="seconds"), "threads": self.plan.base.thread_count}
        run |= {"versions": versions()}
        try:
            run |= _train(self._bench(entry), entry, rate, seed, facts, keep=seed != self.plan.pilot_seed)
        except JobError as e:
            run |= {"error": said_by("compare", e), "final": True}
        except Exception as e:  # one recipe's defect is a row of the report, and not the end of the others
            traceback.print_exc()
            run |= {"error": f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}", "final": False}
        self.store.add(entry.title, facts, run)
        gc.collect()  # a model and its hooks can be a cycle, and hundreds follow
        last = run.get("error") or f"loss {run['scores'][-1][0]:.4f}"
        print(f"{entry.title}, rate {rate:g}, seed {seed}: {last}", flush=True)


def _train(bench: Bench, entry: Entry, rate: float, seed: int, facts: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """One run: losses by step, scores before training and after each epoch; fills `facts`, what needs no training. keep: weigh the adapter's file."""
    settings = replace(bench.settings(entry.method, entry.options, rate), lr=rate)
    arm = bench.arm(entry.arm, settings, seed)
    batch = bench.longest()
    facts |= {"own": bench.own(arm, entry.method), "trainable": arm.trainable, "parameters": arm.parameters, "note": arm.note}
    facts |= {"saved_bytes": measure.step_bytes(arm.model, arm.inputs(batch), arm.procedures), "tokens": batch["input_ids"].numel()}
    t = trainee(arm, settings)
    cuda = settings.torch_device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    train([t], bench.data, bench.held, settings, seed=seed)
    found: dict[str, Any] = {"accelerator_bytes": torch.cuda.max_memory_reserved() if cuda else None}
    if not math.isfinite(t.scores[-1].loss):
        raise JobError(f"compare: the evaluation loss is {t.scores[-1].loss} after training", code=1)
    found |= {"losses": [float(f"{v:.5g}") for v in t.losses], "scores": [_numbers(s) for s in t.scores], "aside": t.aside, "stopped": t.stopped}
    return found | {"file_bytes": _file_bytes(arm) if keep else None}


def _numbers(s: Score) -> list[float | None]:
    return [s.loss if math.isfinite(s.loss) else None, s.accuracy]


def _file_bytes(arm: Arm) -> int | None:
    """Of the tensors that saving the adapter writes; None for the frozen model, which has none."""
    import fastpeft

    if arm.name == FROZEN:
        return None
    with tempfile.TemporaryDirectory() as folder:
        if arm.name == PEFT:
            arm.model.save_pretrained(folder, save_embedding_layers=False)
        else:
            fastpeft.save_adapter(arm.model, folder)
        return sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))


def _system() -> dict[str, Any]:
    u = platform.uname()
    found = {"system": u.system, "release": u.release, "version": u.version, "machine": u.machine, "processor": u.processor}
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return found | {"accelerator": accelerator, "pytorch": torch.__config__.show()}


def chosen_rate(record: dict[str, Any], pilot_seed: int) -> float | None:
    """The rate of the pilot run with the lowest evaluation loss at its end, the lower of equals; None where none came to one."""
    ends = [(r["scores"][-1][0], r["rate"]) for r in record["runs"] if r["seed"] == pilot_seed and not r.get("error")]
    return min(ends)[1] if ends else None


def compare(plan: Plan, *, timings: bool = False, rounds: int = 15, draw: bool = False) -> list[dict[str, Any]]:
    """Make what the folder lacks of the plan, then the report of all that it holds; returns its rows.

    timings: time steps instead of training.   draw: the report alone.

    Raises JobError for bad input, and with code 1, the report being written, for a recipe that went wrong.
    """
    from fastpeft.job.compare_page import gather
    from fastpeft.job.compare_report import write_report

    job = Comparison(plan)
    try:
        busy = job.time(rounds) if timings and not draw else []
        for _ in () if timings or draw else job.train():
            write_report(job.store, gather(job.store, plan))
        rows = gather(job.store, plan)
        write_report(job.store, rows)
    except KeyboardInterrupt:
        raise JobError(f"compare: interrupted; every finished run is in {plan.base.output}, and the same command continues.", code=130) from None
    except OSError as e:
        raise JobError(f"compare: {e}; every finished run is in {plan.base.output}, and the same command continues.", code=1) from None
    wrong = [r["title"] for r in rows if r["retry"]]
    if busy:
        print(f"not timed, the machine is too busy (frozen beside itself is more than {NOISE:g} off): {', '.join(busy)}; the same command tries again", file=sys.stderr)
    if wrong:
        raise JobError(f"compare: {', '.join(wrong)} went wrong, see {plan.base.output}/report.md; the same command tries again.", code=1)
    return rows


def as_json(rows: list[dict[str, Any]]) -> str:
    """The rows of the report without the curves."""
    return json.dumps([{k: v for k, v in r.items() if k not in ("runs", "pilots")} for r in rows], indent=2, allow_nan=False)
