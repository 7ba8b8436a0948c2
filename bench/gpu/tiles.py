"""Stage tiles: alternatives to what triton_kernels/tiles.py chooses, per launcher, on the real launchers.

First rows, columns and warps; then, from the quickest of these, stages and the number of programs per
processor that a sum is split for. Every alternative is checked against fp64 before it is timed. The table of
tiles.py is changed by hand.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.gpu.common import Row, Run, Task, ratios, shown, spoiled, summary, times
from bench.gpu.correctness import described
from bench.gpu.kernels import rotated
from bench.gpu.launches import launches
from bench.gpu.operators import DROPS, OPERATORS, Case, make, wrong
from fastpeft.ops.launch import kernels

# the function of tiles.py that a launcher asks
CHOOSER = {
    "down": "shrink", "du": "shrink", "up": "expand", "up_add": "expand", "up_add_gain": "expand", "dx": "expand",
    "dx_add": "expand", "du_db": "outer", "du_db_gain": "outer", "da": "outer", "row_sq_norm": "norm",
}  # fmt: skip
ROWS, COLS, WARPS, STAGES, PER_PROCESSOR = (32, 64, 128), (64, 128, 256), (4, 8), (1, 2, 4), (1, 2, 4)
DEFAULT, AGAIN = "default", "default again"
ROUNDS = 15


class Choice(NamedTuple):
    """tile: None for the default one.   split: programs per processor, None for the default."""

    tile: Any = None
    split: int | None = None

    def __str__(self) -> str:
        if self.tile is None:
            return DEFAULT
        t = self.tile
        text = f"{t.rows}x{t.cols}x{t.rank}, {t.warps} warps, {t.stages} stages"
        return text if self.split is None else f"{text}, {self.split} per processor"


def tasks(run: Run) -> Iterator[Task]:
    if run.dry:
        cases = [Case(33, 40, 24, 1, 5, run.dtype, torch.float32)]
    else:
        cases = [
            Case(8192, 4096, 4096, 1, 16, run.dtype, torch.float32),
            Case(2048, 4096, 4096, 1, 64, run.dtype, torch.float32),
        ]
    for case in cases:
        for name, p in [*((n, 0.0) for n in OPERATORS), *((n, 0.1) for n in DROPS)]:
            dropped = case._replace(p=p)
            head = {"launcher": name, "case": described(dropped)}
            yield head, lambda name=name, dropped=dropped: sweep(run, name, dropped)


def sweep(run: Run, name: str, case: Case) -> list[Row]:
    chosen = default_tile(run, name, case)
    grid = [chosen._replace(rows=r, cols=c, warps=w) for r, c, w in itertools.product(ROWS, COLS, WARPS)]
    first = [Choice(t) for t in grid if t != chosen]
    rows = timed(run, name, case, first[:2] if run.dry else first)
    quick = min((r for r in rows if "us" in r), key=lambda r: r["us"])
    tile = chosen if quick["tile"] is None else type(chosen)(*quick["tile"])
    second = [Choice(tile._replace(stages=s)) for s in STAGES if s != tile.stages]
    if CHOOSER[name] != "expand":
        second += [Choice(tile, n) for n in PER_PROCESSOR]
    return rows + [
        r for r in timed(run, name, case, second[:1] if run.dry else second) if r["choice"] != AGAIN
    ]


def default_tile(run: Run, name: str, case: Case) -> Any:
    """What the launcher asks for by itself."""
    tiles, seen = kernels("lowrank").tiles, []
    function = getattr(tiles, CHOOSER[name])
    with mock.patch.object(tiles, CHOOSER[name], lambda *a: seen.append(function(*a)) or seen[-1]):
        launches(make(case, run.device))[name].triton()
    return seen[0]


def timed(run: Run, name: str, case: Case, choices: list[Choice]) -> list[Row]:
    """A row per choice, the default and its control among them; ratios: to the default in the same round."""
    sets = [launches(m)[name].triton for m in rotated(run, case)]
    rows: dict[str, Row] = {}
    calls: dict[str, list[Callable[[], object]]] = {}
    for choice in [Choice(), *choices]:
        rows[str(choice)] = {"choice": str(choice), "tile": choice.tile, "split": choice.split}
        fault = _fault(run, name, case, choice)
        if fault:
            rows[str(choice)]["fault"] = fault
        else:
            calls[str(choice)] = [lambda call=call, choice=choice: _call(name, choice, call) for call in sets]
    calls[AGAIN] = calls[DEFAULT]
    rows[AGAIN] = {"choice": AGAIN, "tile": None, "split": None}
    seconds = times(calls, run, rounds=3 if run.dry else ROUNDS)
    return [
        row | (summary(seconds[k]) | ratios(seconds[k], seconds[DEFAULT]) if k in seconds else {})
        for k, row in rows.items()
    ]


def _fault(run: Run, name: str, case: Case, choice: Choice) -> str:
    """Why the choice cannot be had: it does not compile or fit, or its result is wrong."""
    m = make(case, run.device)
    try:
        got = _call(name, choice, lambda: OPERATORS[name](m))
    except Exception as error:
        if spoiled(str(error)):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "; ".join(wrong(name, m, got)[1])


def _call(name: str, choice: Choice, call: Callable[[], Any]) -> Any:
    with patched(name, choice):
        return call()


@contextlib.contextmanager
def patched(name: str, choice: Choice) -> Iterator[None]:
    tiles = kernels("lowrank").tiles
    with contextlib.ExitStack() as stack:
        if choice.tile is not None:
            stack.enter_context(mock.patch.object(tiles, CHOOSER[name], lambda *a: choice.tile))
        if choice.split is not None:
            stack.enter_context(mock.patch.object(tiles, "splits", lambda *a: split(choice.split, *a)))
        yield


def split(per_processor: int, count: int, programs: int, processors: int) -> tuple[int, int]:
    """tiles.splits, for another number of programs per processor."""
    wanted = max(1, min(count, -(-per_processor * processors // max(1, programs))))
    per_part = -(-count // wanted)
    return -(-count // per_part), per_part


def table(found: list[Row], dry: bool) -> str:
    """Per launcher and case the default, its control and the three quickest."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in found:
        groups.setdefault((r["launcher"], r["case"]), []).append(r)
    lines = []
    for (name, case), rows in groups.items():
        failed = [r for r in rows if "failed" in r]
        if failed:
            lines.append(f"{name} {case}: FAILED {failed[0]['failed'][:120]}")
            continue
        faults = sum("fault" in r for r in rows)
        base = next(r for r in rows if r["choice"] == DEFAULT)
        again = next(r for r in rows if r["choice"] == AGAIN)
        control = ", ".join(shown(v, dry, ".3f") for v in again["iqr"])
        lines.append(
            f"{name} {case}: default {shown(base['us'], dry)} us, control [{control}], {faults} with a fault"
        )
        known = [r for r in rows if "us" in r and r["choice"] not in (DEFAULT, AGAIN)]
        for r in sorted(known, key=lambda r: r["ratio"])[:3]:
            lines.append(f"    {shown(r['ratio'], dry, '.3f')}  {r['choice']}")
    return "\n".join(lines)
