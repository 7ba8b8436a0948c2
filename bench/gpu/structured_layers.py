"""Whole layers of LoHa, LoKr and Random Masking as ratios to the frozen layer; the arms and clocks of stage layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.arms import FROZEN, Arm, Variant, lowrank_variant, share_weight
from bench.gpu.common import DRY_SHAPE, SHAPES, Row, Run
from bench.gpu.layers import IMPLS, every_arm, layer_dtype, measured
from bench.gpu.part_layers import check, layer_arm, shira_arms
from fastpeft.job.layerbench import Shape

DENSITIES = (0.001, 0.01)
# as many entries as numbers in a LoRA of that rank: on a square layer of 4096 a density of 0.004
SHIRA_RANK = 8
MASKS = "random_masking"


def settings(run: Run) -> Iterator[tuple[str, tuple[int, int, int]]]:
    for shape in [DRY_SHAPE] if run.dry else (SHAPES[0], SHAPES[3]):
        for title in ("loha r=8", "lokr factor 16", MASKS):
            yield title, shape


def arms(run: Run, title: str, shape: tuple[int, int, int]) -> dict[str, Arm]:
    """LoHa and LoKr beside PEFT's. Random Masking, and PEFT's SHiRA on as many entries as its rank= has, beside LoRA."""
    rank = 2 if run.dry else 8
    if title != MASKS:
        method = title.split()[0]
        options = {"rank": rank, "alpha": 2 * rank} | (
            {"factor": 4 if run.dry else 16} if method == "lokr" else {}
        )
        return every_arm(run, shape, [Variant(title, method, options)])
    found = every_arm(run, shape, [lowrank_variant(f"lora r={rank}", "lora", rank, 0.0)])
    size = Shape(*shape, dtype=layer_dtype(run), device=run.device)
    wanted: dict[str, dict[str, Any]] = {f"density {d}": {"density": d} for d in DENSITIES}
    wanted |= {
        f"density {DENSITIES[0]} {a}": {"density": DENSITIES[0], "apply": a} for a in ("window", "exact")
    }
    wanted["rank="] = {"rank": 1 if run.dry else SHIRA_RANK}
    if run.dry:
        # a mask of a thousand entries may be empty at 0.001
        wanted = {k: {n: 0.05 if n == "density" else v for n, v in o.items()} for k, o in wanted.items()}
    for name, options in wanted.items():
        ours = layer_arm(size, f"fastpeft {MASKS} {name}", MASKS, options)
        share_weight(ours.layer, found[FROZEN].layer)
        for impl in IMPLS:
            found[f"{ours.name}, {impl}"] = replace(ours, name=f"{ours.name}, {impl}", impl=impl)
    for arm in shira_arms(size, "SHiRA", wanted["rank="]["rank"]):
        share_weight(arm.layer, found[FROZEN].layer)
        found[arm.name] = arm
    return found


def compare(run: Run, title: str, shape: tuple[int, int, int]) -> list[Row]:
    size = Shape(*shape, dtype=layer_dtype(run), device=run.device)
    return measured(run, size, arms(run, title, shape), check)
