"""Stage ceilings: what the card can do, and what cuBLAS alone takes for the shapes that layers are timed at.

Per shape, interleaved: the frozen product T0 (twice, the control), with a bias, its backward, the same with
the result accumulated onto a given one (beta=1), and with K widened by 16 and 64 columns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu.build import clocks
from bench.gpu.common import Row, Run, Task, copies, nbytes, ratios, shown, summary, times

GIB = 1 << 30
WIDER = (16, 64)


def tasks(run: Run) -> Iterator[Task]:
    yield {"what": "clocks before"}, lambda: {"value": clocks()}
    yield {"what": "copy"}, lambda: copy(run)
    yield {"what": "read"}, lambda: read(run)
    yield {"what": "matmul 8192^3"}, lambda: large_matmul(run)
    for t, i, o in run.shapes:
        yield {"what": "products", "shape": [t, i, o]}, lambda t=t, i=i, o=o: products(run, t, i, o)
    yield {"what": "clocks after"}, lambda: {"value": clocks()}


def copy(run: Run) -> Row:
    """Bytes read and written, per second."""
    size = GIB // 1024 if run.dry else 2 * GIB
    source = torch.randint(255, (size,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = statistics.median(times({"copy": [lambda: target.copy_(source)]}, run)["copy"])
    return {"bytes_per_s": 2 * size / seconds}


def read(run: Run) -> Row:
    """Bytes read by a sum, per second."""
    size = GIB // 4096 if run.dry else GIB // 2
    source = torch.randn(size, device=run.device)
    seconds = statistics.median(times({"sum": [lambda: source.sum()]}, run)["sum"])
    return {"bytes_per_s": 4 * size / seconds}


def large_matmul(run: Run) -> Row:
    side = 64 if run.dry else 8192
    pairs = copies(lambda: (normal(run, side, side), normal(run, side, side)), 4 * side * side, run)
    calls = [lambda a=a, b=b: a @ b for a, b in pairs]
    seconds = statistics.median(times({"matmul": calls}, run)["matmul"])
    return {"flops_per_s": 2 * side**3 / seconds}


def normal(run: Run, *shape: int) -> torch.Tensor:
    """Random: products of zeros draw less power and run faster."""
    return torch.randn(*shape, dtype=run.dtype, device=run.device)


def products(run: Run, t: int, i: int, o: int) -> list[Row]:
    sets = copies(lambda: (normal(run, t, i), normal(run, t, o)), nbytes_of(run, t, i, o), run)
    W, bias, onto = normal(run, o, i), normal(run, o), [normal(run, t, o) for _ in sets]
    calls: dict[str, list[Callable[[], Any]]] = {
        "T0": [lambda x=x: torch.mm(x, W.T) for x, _ in sets],
        "T0 again": [lambda x=x: torch.mm(x, W.T) for x, _ in sets],
        "bias": [lambda x=x: torch.addmm(bias, x, W.T) for x, _ in sets],
        "backward": [lambda dy=dy: torch.mm(dy, W) for _, dy in sets],
        "beta=1": [
            lambda x=x, c=c: c.addmm_(x, W.T, alpha=1e-3) for (x, _), c in zip(sets, onto, strict=True)
        ],
    }
    for more in WIDER:
        wide, xs = normal(run, o, i + more), [normal(run, t, i + more) for _ in sets]
        calls[f"K+{more}"] = [lambda x=x, wide=wide: torch.mm(x, wide.T) for x in xs]
    seconds = times(calls, run)
    flops = 2 * t * i * o
    return [
        {
            "variant": name,
            **summary(s),
            **ratios(s, seconds["T0"]),
            "flops_per_s": flops / statistics.median(s),
        }
        for name, s in seconds.items()
    ]


def nbytes_of(run: Run, t: int, i: int, o: int) -> int:
    return nbytes(torch.empty(t, i + o, dtype=run.dtype, device="meta"))


def table(found: list[Row], dry: bool) -> str:
    lines = []
    for r in found:
        if "failed" in r:
            lines.append(f"{r['what']} {r.get('shape', '')}: FAILED {r['failed'][:150]}")
        elif "bytes_per_s" in r:
            lines.append(f"{r['what']:<14} {shown(r['bytes_per_s'] / 1e9, dry, '.0f')} GB/s")
        elif r["what"] == "products":
            times = f"{shown(r['us'], dry):>9} us  {shown(r['ratio'], dry, '.3f')} of T0"
            rate = shown(r["flops_per_s"] / 1e12, dry, ".0f")
            lines.append(f"{r['shape']!s:<22} {r['variant']:<9} {times}   {rate} TFLOP/s")
        elif "flops_per_s" in r:
            lines.append(f"{r['what']:<14} {shown(r['flops_per_s'] / 1e12, dry, '.0f')} TFLOP/s")
        else:
            lines.append(f"{r['what']:<14} {r['value']}")
    return "\n".join(lines)


def roofs(run: Run) -> tuple[float, float]:
    """Bytes and flops per second of this card: as this stage measured them, else measured now."""
    rows = {r["what"]: r for r in run.rows("ceilings")}
    bandwidth = rows.get("copy", {}).get("bytes_per_s") or copy(run)["bytes_per_s"]
    rate = rows.get("matmul 8192^3", {}).get("flops_per_s") or large_matmul(run)["flops_per_s"]
    return bandwidth, rate
