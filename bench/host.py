"""What one call costs the host: python -m bench.host [--quick] [--save]; [4, 64 -> 64], one thread, fp32, rank 8.

Three times per arm, in microseconds a call: *forward* under grad mode, its graph dropped; *forward in a
step*, the forward inside a training step; *step*, forward and backward (dx and the adapter's gradients). Arms
run in blocks of calls, in random order within each round; what counts is the mean of a block, and over the
rounds the median. Garbage collection rests inside a block.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bench.arms import Arm, arms, lowrank_variant, peft_name
from bench.harness import inputs, quartiles
from bench.machine import RESULTS, emit
from bench.oracle import check
from fastpeft.job.layerbench import Shape

SIZE, RANK, MELORA_BLOCKS = (4, 64, 64), 8, 4
CALLS, ROUNDS, QUICK = 200, 60, 6
WARM_UP_ROUNDS = 2
MEASURES = ("forward", "forward in a step", "step")
PEFT_LORA, PEFT_DORA = peft_name("lora", "float32"), peft_name("dora", "float32")
# whom an arm's time is divided by
RIVALS = {"dora": (PEFT_LORA, PEFT_DORA, "fastpeft lora"), "melora": (PEFT_LORA, "fastpeft lora")}


def host_arms(shape: Shape) -> dict[str, Arm]:
    chosen = [lowrank_variant(name, name, RANK, 0.0) for name in ("lora", "dora")]
    chosen.append(lowrank_variant(f"melora {MELORA_BLOCKS}x{RANK}", "melora", RANK, 0.0, n=MELORA_BLOCKS))
    return arms(shape, chosen)


def block(arm: Arm, x: Tensor, dy: Tensor, calls: int) -> dict[str, float]:
    """Mean microseconds of each measure over `calls` calls."""
    layer, wanted = arm.layer, [x, *arm.parameters.values()]
    clock, grad = time.perf_counter, torch.autograd.grad
    start = clock()
    for _ in range(calls):
        layer(x)
    forward = clock() - start
    inside, start = 0.0, clock()
    for _ in range(calls):
        before = clock()
        y = layer(x)
        inside += clock() - before
        grad(y, wanted, dy)
    step = clock() - start
    return dict(zip(MEASURES, (1e6 * s / calls for s in (forward, inside, step)), strict=True))


def measure(
    found: dict[str, Arm], x: Tensor, dy: Tensor, *, rounds: int, calls: int, seed: int = 0
) -> dict[str, Any]:
    """Arm -> measure -> means of its blocks, round by round."""
    draw = random.Random(seed)
    # the libraries' own objects are not looked through again before every block
    gc.collect()
    gc.freeze()
    means: dict[str, dict[str, list[float]]] = {name: {m: [] for m in MEASURES} for name in found}
    for k in range(WARM_UP_ROUNDS + rounds):
        for name in draw.sample(sorted(found), len(found)):
            gc.collect()
            gc.disable()
            try:
                got = block(found[name], x, dy, calls)
            finally:
                gc.enable()
            if k >= WARM_UP_ROUNDS:
                for m, value in got.items():
                    means[name][m].append(value)
    gc.unfreeze()
    return means


def rows(shape: Shape, *, rounds: int, calls: int) -> list[dict[str, Any]]:
    """One row per arm and measure; an arm that is not right is reported and not timed."""
    x, dy = inputs(shape)
    found = host_arms(shape)
    checked = {name: check(arm, x, dy) for name, arm in found.items()}
    means = measure({n: a for n, a in found.items() if not checked[n][1]}, x, dy, rounds=rounds, calls=calls)
    table = []
    for name, arm in found.items():
        for m in MEASURES if name in means else MEASURES[:1]:
            row: dict[str, Any] = {
                "bench": "host",
                "arm": name,
                "method": arm.method,
                "adapter_dtype": arm.adapter_dtype,
                "device": shape.device,
                "shape": [shape.tokens, shape.in_features, shape.out_features],
                "dtype": "float32",
                "error": checked[name][0],
                "wrong": checked[name][1],
                "rounds": rounds,
                "calls": calls,
                "measure": m,
            }
            table.append(row | (_times(name, arm, m, means) if name in means else {}))
    return table


def _times(name: str, arm: Arm, m: str, means: dict[str, Any]) -> dict[str, Any]:
    own = means[name][m]
    low, middle, high = quartiles(own)
    found: dict[str, Any] = {"us": middle, "iqr_us": [low, high]}
    rivals = RIVALS.get(arm.method or "", (PEFT_LORA,)) if arm.library == "fastpeft" else (PEFT_LORA,)
    found["against"] = {
        rival: statistics.median([a / b for a, b in zip(own, means[rival][m], strict=True)])
        for rival in rivals
        if rival != name and rival in means
    }
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = []
    for m in MEASURES:
        lines.append(f"{m}, microseconds a call")
        for r in found:
            if r["measure"] == m and "us" in r:
                low, high = r["iqr_us"]
                quotients = "   ".join(f"{q:.2f} x {rival}" for rival, q in r["against"].items())
                lines.append(f"  {r['arm']:<30} {r['us']:7.1f} [{low:.1f}, {high:.1f}]   {quotients}")
    lines += [f"WRONG and not timed: {r['arm']} in {', '.join(r['wrong'])}" for r in found if r["wrong"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--calls", type=int, default=CALLS, help="calls per block")
    parser.add_argument("--save", action="store_true", help="append the rows to bench/results/host-cpu.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(Shape(*SIZE), rounds=args.rounds or (QUICK if args.quick else ROUNDS), calls=args.calls)
    for row in found:
        emit(row, RESULTS / "host-cpu.jsonl" if args.save else None)
    print("\n" + table(found))


if __name__ == "__main__":
    main()
