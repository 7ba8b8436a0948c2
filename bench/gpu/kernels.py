"""Stage kernels: the time of each launcher, and what share that is of the card's own limits, measured by
stage ceilings.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from bench.gpu.ceilings import roofs
from bench.gpu.common import Row, Run, Task, copies, nbytes, shown, summary, times
from bench.gpu.correctness import described
from bench.gpu.launches import launches
from bench.gpu.operators import DROPS, OPERATORS, Case, Inputs, make


def cases(run: Run) -> list[Case]:
    """fp32 factors, as modules have, at every shape; then larger ranks, blocks and 16-bit factors; each with
    dropout too.
    """
    low, wide = run.dtype, torch.float32
    found = [Case(t, i, o, 1, 5 if run.dry else 16, low, wide) for t, i, o in run.shapes]
    if not run.dry:
        found += [Case(2048, 4096, 4096, 1, 64, low, wide), Case(8192, 4096, 4096, 8, 8, low, wide)]
        found += [Case(8192, 4096, 4096, 1, 16, low, low)]
    return [c._replace(p=p) for c in found for p in (0.0, 0.1)]


def tasks(run: Run) -> Iterator[Task]:
    known: dict[str, tuple[float, float]] = {}
    for case in cases(run):
        for name in DROPS if case.p else OPERATORS:
            if name == "row_sq_norm" and case.blocks > 1:
                continue
            head = {"launcher": name, "case": described(case)}
            yield head, lambda case=case, name=name: timed(run, case, name, known)


def timed(run: Run, case: Case, name: str, known: dict[str, tuple[float, float]]) -> Row:
    if "roofs" not in known:
        known["roofs"] = roofs(run)
    sets = [launches(m)[name] for m in rotated(run, case)]
    seconds = times({"triton": [s.triton for s in sets], "torch": [s.torch for s in sets]}, run)
    bandwidth, rate = known["roofs"]
    launch = sets[0]
    floor = max(launch.bytes / bandwidth, launch.flops / rate)
    own, other = (statistics.median(seconds[k]) for k in ("triton", "torch"))
    row: Row = {"bytes": launch.bytes, "flops": launch.flops, "roof_us": 1e6 * floor, "share": floor / own}
    return row | summary(seconds["triton"]) | {"torch_us": 1e6 * other, "to_torch": own / other}


def rotated(run: Run, case: Case) -> list[Inputs]:
    first = make(case, run.device)
    return [first, *copies(lambda: make(case, run.device), nbytes(first.x, first.z, first.dz), run)[1:]]


def table(found: list[Row], dry: bool) -> str:
    lines = [f"{'launcher':<12} {'us':>8} {'of roof':>8} {'torch us':>9}  case"]
    for r in found:
        if "failed" in r:
            lines.append(f"{r['launcher']:<12} FAILED {r['failed'][:100]}  {r['case']}")
            continue
        share = shown(100 * r["share"], dry, ".0f")
        lines.append(
            f"{r['launcher']:<12} {shown(r['us'], dry):>8} {share:>7}% {shown(r['torch_us'], dry):>9}  {r['case']}"
        )
    return "\n".join(lines)
