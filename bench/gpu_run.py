"""Everything that waits for a GPU, in stages that are skipped once their JSON is in $OUT.

python -m bench.gpu_run [--device cuda] ; rehearsal without a GPU: --device cpu --dry
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastpeft
from bench.harness import arms, compare, errors, formula, gradients, machine
from bench.lowrank import SHAPES
from fastpeft.env import environment
from fastpeft.job.arms import FASTPEFT
from fastpeft.job.layerbench import Shape


def build(device: str, dry: bool) -> list[dict[str, Any]]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return [{"device_name": name, **machine(), "environment": {k: str(v) for k, v in environment().items()}}]


def correctness(device: str, dry: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float16):
        for method in ("lora", "dora"):
            shape = Shape(33, 40, 35, dtype=dtype, device=device)
            layer = arms(shape, method)[FASTPEFT]
            x = torch.randn(33, 40, dtype=dtype, device=device, requires_grad=True)
            dy = torch.randn(33, 35, dtype=dtype, device=device)
            truth, plain = (formula(layer, method, x, dy, d) for d in (torch.float64, dtype))
            error, right = errors(gradients(layer, x, dy), truth, plain)
            rows.append({"check": f"{method} {dtype}", "error": error, "right": right})
    seed = torch.tensor(1234567)
    masks = [fastpeft.dropout_mask(seed.to(d), (257, 65), 0.3).cpu() for d in ("cpu", device)]
    rows.append({"check": "dropout bits", "right": torch.equal(*masks)})
    return rows


def _seconds(run: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    best = float("inf")
    for _ in range(10):
        wait()
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def ceilings(device: str, dry: bool) -> list[dict[str, Any]]:
    n, side = (1 << 20, 256) if dry else (1 << 30, 8192)
    src = torch.empty(n, dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    return [
        {"ceiling": "copy GB/s", "value": 2 * n / _seconds(lambda: dst.copy_(src), device) / 1e9},
        {"ceiling": "bf16 matmul TFLOP/s", "value": 2 * side**3 / _seconds(lambda: a @ a, device) / 1e12},
    ]


def layers(device: str, dry: bool) -> list[dict[str, Any]]:
    sizes = [(64, 32, 48)] if dry else SHAPES
    rows = []
    for size in sizes:
        for method in ("lora", "dora"):
            shape = Shape(*size, dtype=torch.bfloat16, device=device)
            rows += compare("lowrank", shape, method, rounds=3 if dry else 50)
    return rows


STAGES = [build, correctness, ceilings, layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes; proves that the script runs, measures nothing"
    )
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", "build/gpu_run"))
    out.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[dict[str, Any]]] = {}
    for stage in STAGES:
        name = f"{stage.__name__}-{args.device.replace(':', '_')}{'-dry' if args.dry else ''}"
        path = out / f"{name}.json"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_text(json.dumps(stage(args.device, args.dry), indent=1))
            part.replace(path)
        done[stage.__name__] = json.loads(path.read_text())
    for r in done["correctness"]:
        print(f"{r['check']:<24} {'right' if r['right'] else 'WRONG'}")
    for r in done["ceilings"]:
        print(f"{r['ceiling']:<24} {'-' if args.dry else format(r['value'], '.1f')}")
    for r in done["layers"]:
        ratio = "-" if args.dry or "ratio" not in r else format(r["ratio"], ".2f")
        print(
            f"{r['method']:<6} {r['arm']:<20} {r['shape']!s:<20} {'right' if r['right'] else 'WRONG':<6} {ratio}"
        )


if __name__ == "__main__":
    main()
