"""Stage memory: what each arm of stage layers keeps for backward, seen by autograd's hooks, and its peak by
the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.arms import Arm, Variant, lowrank_variant
from bench.gpu.common import DRY_SHAPE, Row, Run, Task, spoiled
from bench.gpu.layers import LARGE, every_arm, layer_dtype, step
from bench.harness import inputs
from fastpeft.job.layerbench import Shape
from fastpeft.job.measure import bytes_saved

METHODS: dict[str, dict[str, int]] = {"lora": {}, "dora": {}, "melora": {"n": 8}, "hydralora": {"heads": 8}}


def tasks(run: Run) -> Iterator[Task]:
    for method, more in METHODS.items():
        for p in (0.0, 0.1):
            rank = 3 if run.dry else 8 if method == "melora" else 16
            variant = lowrank_variant(method, method, rank, p, **more)
            yield {"method": method, "rank": rank, "p": p}, lambda variant=variant: compare(run, variant)


def compare(run: Run, variant: Variant) -> list[Row]:
    shape = DRY_SHAPE if run.dry else LARGE
    x, dy = inputs(Shape(*shape, dtype=layer_dtype(run), device=run.device))
    rows = []
    for name, arm in every_arm(run, shape, [variant]).items():
        row: Row = {"arm": name, "shape": list(shape), "adapter_dtype": arm.adapter_dtype}
        try:
            row |= measured(run, arm, x, dy)
        except Exception as fault:
            if spoiled(str(fault)):
                raise
            row["failed"] = f"{type(fault).__name__}: {str(fault)[:300]}"
        rows.append(row)
    return rows


def measured(run: Run, arm: Arm, x: torch.Tensor, dy: torch.Tensor) -> Row:
    """saved_bytes: x and the layer's own parameters not counted.   peak_bytes: above what lay there before
    the step.
    """
    with arm.using():
        saved = bytes_saved(lambda: arm.forward(x), [x, *arm.layer.parameters()])
    row: Row = {"saved_bytes": saved, "per_token": saved / x.shape[0], "peak_bytes": None}
    if run.cuda:
        call = step(arm, x, dy)
        # the first call compiles and fills caches
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def table(found: list[Row], dry: bool) -> str:
    lines = [f"{'saved bytes per token':>22} {'peak MB':>9}  arm"]
    for r in found:
        if "failed" in r:
            lines.append(f"{r['method']} {r.get('arm', '')}: FAILED {r['failed'][:110]}")
            continue
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.1f}"
        lines.append(f"{r['per_token']:>22.1f} {peak:>9}  {r['arm']}, dropout {r['p']}")
    return "\n".join(lines)
