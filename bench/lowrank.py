"""LoRA and DoRA on one layer: python -m bench.lowrank [--quick]."""

from __future__ import annotations

import argparse

import torch

from bench.harness import compare, emit
from fastpeft.job.layerbench import Shape

# tokens, in, out
SHAPES = [(2048, 1024, 1024), (1024, 2048, 5632), (4096, 384, 1536)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        for size in SHAPES:
            for method in ("lora", "dora"):
                shape = Shape(*size, dtype=dtype, device=args.device)
                for row in compare("lowrank", shape, method, rounds=5 if args.quick else 30):
                    emit(row)


if __name__ == "__main__":
    main()
