"""Every operator on two ragged inputs and one step of a layer: small enough to run under compute-sanitizer.

python -m bench.gpu.tiny [--device cuda]
"""

from __future__ import annotations

import argparse

import torch

from bench.arms import arms, lowrank_variant
from bench.gpu.operators import OPERATORS, Case, make
from bench.harness import inputs, step
from fastpeft.job.layerbench import Shape


def run_operators(device: str, dtype: torch.dtype) -> int:
    """How many ran."""
    count = 0
    for case in (
        Case(70, 72, 75, 1, 20, dtype, torch.float32, 0.3),
        Case(33, 40, 35, 5, 3, dtype, torch.float32, 0.3, "sliced"),
    ):
        m = make(case, device)
        for name, operator in OPERATORS.items():
            if name != "row_sq_norm" or case.blocks == 1:
                operator(m)
                count += 1
    return count


def run_layer(device: str, dtype: torch.dtype) -> None:
    shape = Shape(33, 40, 36, dtype=dtype, device=device)
    arm = arms(shape, [lowrank_variant("dora", "dora", 5, 0.1)], peft_dtypes="same")["fastpeft dora"]
    arm.impl = "triton"
    with arm.using():
        step(arm, *inputs(shape))()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float16
    count = run_operators(args.device, dtype)
    print(f"{count} operators ran", flush=True)
    run_layer(args.device, dtype)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    print("layer ran")


if __name__ == "__main__":
    main()
