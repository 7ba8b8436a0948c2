"""What the stages share: sizes, inputs that do not fit in L2, and a clock that sees the device and not the
host.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
# what stands in every row of it, and the work that fills them: one row or several
Task = tuple[Row, Callable[[], Row | list[Row]]]

# tokens, in, out
SHAPES = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 4096, 4096)]
DRY_SHAPE = (33, 40, 24)
# more than the 50 MB of an H100's L2
ROTATED_BYTES = 200_000_000
# long enough that the host has queued everything before the device begins
HEAD_START_CYCLES = 4_000_000
MIN_ROUNDS = 3


@dataclass
class Run:
    """One stage's surroundings.   out: where the JSON of every stage lies.   deadline: time.monotonic() to
    stop at.
    """

    device: str
    dry: bool
    out: Path
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def rounds(self) -> int:
        return MIN_ROUNDS if self.dry else 40

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The interpreter multiplies the bit patterns of bf16, so a rehearsal has none."""
        wide = [torch.float32, torch.float16]
        return wide if self.dry else [torch.bfloat16, *wide]

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return [DRY_SHAPE] if self.dry else SHAPES

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def rows(self, stage: str) -> list[Row]:
        """What another stage wrote; empty before it ran."""
        path = self.out / f"{file_stem(stage, self.device, self.dry)}.json"
        return json.loads(path.read_text())["rows"] if path.exists() else []


def file_stem(stage: str, device: str, dry: bool) -> str:
    return f"{stage}-{device.replace(':', '_')}{'-dry' if dry else ''}"


def finish(head: Row, work: Callable[[], Row | list[Row]]) -> list[Row]:
    """The rows of a task; what its work raised stands under "failed": one fault does not end a stage."""
    try:
        found = work()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:600]} ({at})"}
    return [head | row for row in (found if isinstance(found, list) else [found])]


def spoiled(text: str) -> bool:
    """Whether an error is one after which every later launch of the process fails too."""
    signs = (
        "illegal memory access",
        "misaligned address",
        "unspecified launch failure",
        "device-side assert",
    )
    return any(s in text for s in signs)


def copies(make: Callable[[], Any], size: int, run: Run) -> list[Any]:
    """As many sets of inputs as exceed L2 together: 4 to 16 of them, 2 in a rehearsal."""
    count = 2 if run.dry else min(16, max(4, -(-ROTATED_BYTES // max(1, size))))
    return [make() for _ in range(count)]


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def times(
    calls: dict[str, Sequence[Callable[[], object]]], run: Run, *, rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds on the device of each call in each round, in random order within a round; each name rotates
    over its inputs.

    The device first spins for a while, so that the events around a call hold no time of the host's. On the
    CPU: wall time.
    """
    return _interleaved(calls, run, _on_device if run.cuda else _wall, rounds or run.rounds)


def wall_times(
    calls: dict[str, Sequence[Callable[[], object]]], run: Run, *, rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds from the call to the end of its work: what an eager loop that waits would see."""
    return _interleaved(calls, run, _wall_cuda if run.cuda else _wall, rounds or run.rounds)


def _interleaved(
    calls: dict[str, Any], run: Run, clock: Callable[[Any], float], rounds: int
) -> dict[str, list[float]]:
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    turns: dict[str, Iterator[Any]] = {name: itertools.cycle(given) for name, given in calls.items()}
    for k in range(MIN_ROUNDS + rounds):
        for name in draw.sample(sorted(calls), len(calls)):
            taken = clock(next(turns[name]))
            if k >= MIN_ROUNDS:
                seconds[name].append(taken)
        if run.late() and k >= 2 * MIN_ROUNDS:
            break
    return seconds


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _wall_cuda(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _on_device(call: Callable[[], object]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def summary(seconds: Sequence[float], unit: float = 1e6, name: str = "us") -> Row:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {name: unit * middle, f"iqr_{name}": [unit * low, unit * high]}


def ratios(own: Sequence[float], base: Sequence[float]) -> Row:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(own, base, strict=True)], n=4)
    return {"ratio": middle, "iqr": [low, high]}


def shown(value: float | None, dry: bool, form: str = ".1f") -> str:
    """A number of a table; a rehearsal measures nothing."""
    return "-" if dry or value is None else format(value, form)


def verdict(row: Row) -> str:
    if "failed" in row:
        return f"FAILED {row['failed'][:150]}"
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    return "right" if row["right"] else f"WRONG {row.get('wrong', '')}"
