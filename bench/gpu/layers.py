"""Stage layers: whole layers, forward and forward with backward, as ratios to the frozen layer in the same
round.

Arms: frozen twice; PEFT with adapters in the layer's dtype, in fp32, and in fp32 under autocast; a LoRA
written by hand with addmm; fastpeft in torch and in Triton. PEFT has no melora and no hydralora: its LoRA of
the same rank stands beside them. Two clocks: the device's time, and the wall time of a call that is waited
for, which holds the host's cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.arms import FROZEN, Arm, Variant, arms, lowrank_variant, peft_name
from bench.gpu.common import (
    DRY_SHAPE,
    SHAPES,
    Row,
    Run,
    Task,
    copies,
    nbytes,
    ratios,
    shown,
    spoiled,
    summary,
    times,
    wall_times,
)
from bench.gpu.hand import hand_arm
from bench.harness import inputs
from bench.machine import name_of
from bench.oracle import check
from fastpeft.job.arms import peft_counterpart
from fastpeft.job.layerbench import Shape

LARGE, SMALL = SHAPES[0], SHAPES[3]
IMPLS = ("torch", "triton")
WALL_ROUNDS = 20


def settings(run: Run) -> Iterator[tuple[str, tuple[int, int, int], list[Variant], float]]:
    """Title, shape, variants, dropout."""
    many = {"melora 8x8": ("melora", 8, {"n": 8}), "hydralora 8 heads": ("hydralora", 16, {"heads": 8})}
    for p in (0.0, 0.1):
        for shape in run.shapes:
            yield "lora r=16", shape, [lowrank_variant("lora", "lora", 16, p)], p
        # a rehearsal has one shape for everything
        large, small = (DRY_SHAPE, DRY_SHAPE) if run.dry else (LARGE, SMALL)
        yield "lora r=64", small, [lowrank_variant("lora", "lora", 20 if run.dry else 64, p)], p
        yield "dora r=16", large, [lowrank_variant("dora", "dora", 16, p)], p
        for name, (method, rank, more) in many.items():
            rank = 3 if run.dry else rank
            lora = lowrank_variant("lora", "lora", rank, p)
            yield name, large, [lora, lowrank_variant(name, method, rank, p, **more)], p


def tasks(run: Run) -> Iterator[Task]:
    for title, shape, variants, p in settings(run):
        head = {"setting": title, "shape": list(shape), "p": p}
        yield head, lambda shape=shape, variants=variants: compare(run, shape, variants)


def layer_dtype(run: Run) -> torch.dtype:
    """bf16, which the interpreter cannot multiply: a rehearsal has fp16."""
    return torch.float16 if run.dry else torch.bfloat16


def every_arm(run: Run, shape: tuple[int, int, int], variants: list[Variant]) -> dict[str, Arm]:
    dtype = layer_dtype(run)
    found: dict[str, Arm] = {}
    given = arms(Shape(*shape, dtype=dtype, device=run.device), variants)
    for name, arm in given.items():
        if arm.library != "fastpeft":
            found[name] = arm
            continue
        if arm.method is not None and peft_counterpart(arm.method):
            title = name.removeprefix("fastpeft ")
            wide = given[peft_name(title, "float32")]
            autocast = f"PEFT {title}, float32 adapters, {name_of(dtype)} autocast"
            found[autocast] = replace(wide, name=autocast, autocast=dtype)
        if arm.method == "lora":
            hand = hand_arm(arm, given[FROZEN])
            found[hand.name] = hand
        for impl in IMPLS:
            found[f"{name}, {impl}"] = replace(arm, name=f"{name}, {impl}", impl=impl)
    return found


def compare(run: Run, shape: tuple[int, int, int], variants: list[Variant]) -> list[Row]:
    return measured(run, Shape(*shape, dtype=layer_dtype(run), device=run.device), every_arm(run, shape, variants))


def measured(
    run: Run, size: Shape, found: dict[str, Arm], check: Callable[..., tuple[float, list[str]]] = check
) -> list[Row]:
    """A row per arm; what is wrong by `check`, or fails, is not timed."""
    first = inputs(size)
    rows = {name: _checked(arm, first, check) for name, arm in found.items()}
    timed = {name: found[name] for name, row in rows.items() if row.get("right")}
    sets = [first, *copies(lambda: inputs(size), nbytes(*first), run)[1:]]
    for measure, make in (("forward", forward), ("step", step)):
        calls = {name: [make(arm, x, dy) for x, dy in sets] for name, arm in timed.items()}
        device = times(calls, run)
        wall = wall_times(calls, run, rounds=3 if run.dry else WALL_ROUNDS)
        for name in calls:
            for clock, seconds in (("device", device), ("wall", wall)):
                value = summary(seconds[name]) | ratios(seconds[name], seconds[FROZEN])
                rows[name][f"{measure}, {clock}"] = value
    return list(rows.values())


def _checked(
    arm: Arm, first: tuple[torch.Tensor, torch.Tensor], check: Callable[..., tuple[float, list[str]]]
) -> Row:
    row: Row = {"arm": arm.name, "adapter_dtype": arm.adapter_dtype}
    try:
        error, wrong = check(arm, *first)
    except Exception as fault:
        if spoiled(str(fault)):
            raise
        return row | {"failed": f"{type(fault).__name__}: {str(fault)[:300]}"}
    return row | {"error": error, "right": not wrong, "wrong": ", ".join(wrong)}


def forward(arm: Arm, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with arm.using():
            return arm.forward(x)

    return call


def step(arm: Arm, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], Any]:
    wanted = [x, *arm.parameters.values()]

    def call() -> Any:
        with arm.using():
            return torch.autograd.grad(arm.forward(x), wanted, dy)

    return call


def table(found: list[Row], dry: bool) -> str:
    """Ratios to the frozen layer: forward and step on the device, then both by wall time."""
    lines, last = [], None
    for r in found:
        head = (r["setting"], tuple(r["shape"]), r["p"])
        if head != last:
            lines.append(
                f"{head[0]} {list(head[1])} dropout {head[2]}: forward, step on the device; the same by wall time"
            )
            last = head
        lines.append(f"  {r.get('arm', ''):<44} {_numbers(r, dry)}")
    return "\n".join(lines)


def _numbers(r: Row, dry: bool) -> str:
    if "failed" in r:
        return f"FAILED {r['failed'][:110]}"
    if not r["right"]:
        return f"WRONG in {r['wrong']}, not timed"
    keys = [f"{m}, {c}" for c in ("device", "wall") for m in ("forward", "step")]
    if r["arm"] == FROZEN:
        return "  ".join(f"{shown(r[k]['us'], dry)} us" for k in keys)
    return "  ".join(f"{shown(r[k]['ratio'], dry, '.3f')}" for k in keys)
