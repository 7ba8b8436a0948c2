"""LoRA, DoRA and MELoRA on one layer, forward and backward: python -m bench.lowrank [--quick] [--save].

Per shape and dtype one interleaved run holds all arms: the frozen layer twice (the A/A control), stock PEFT
with adapters in the layer's dtype and in fp32, and fastpeft. JSON lines, then a table; the claims are
quotients of overheads over the frozen layer. With --dropout the same is reported, and no claim rests on it.
"""

from __future__ import annotations

import argparse

import torch

from bench.arms import Variant, lowrank_variant
from bench.harness import compare
from bench.machine import RESULTS, emit
from bench.table import lowrank_table
from fastpeft.job.layerbench import Shape

# tokens, in, out
SHAPES = [(2048, 1024, 1024), (1024, 2048, 5632), (4096, 384, 1536)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK, ROUNDS, QUICK = 16, 30, 5
MELORA_BLOCKS = 4


def variants(methods: list[str], dropout: float) -> list[Variant]:
    """melora twice, at LoRA's parameter count and at its total rank; lora is there whenever melora is."""
    found = []
    if "lora" in methods or "melora" in methods:
        found.append(lowrank_variant("lora", "lora", RANK, dropout))
    if "dora" in methods:
        found.append(lowrank_variant("dora", "dora", RANK, dropout))
    if "melora" in methods:
        for rank in (RANK, RANK // MELORA_BLOCKS):
            found.append(
                lowrank_variant(f"melora {MELORA_BLOCKS}x{rank}", "melora", rank, dropout, n=MELORA_BLOCKS)
            )
    return found


def size(text: str) -> tuple[int, int, int]:
    t, i, o = map(int, text.split(","))
    return t, i, o


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--shape", type=size, action="append", metavar="T,I,O", help="tokens, in, out; repeatable"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of the layer; repeatable")
    parser.add_argument("--method", choices=["lora", "dora", "melora"], action="append", help="repeatable")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--save", action="store_true", help="append the rows to bench/results/lowrank-cpu.jsonl"
    )
    args = parser.parse_args()
    rounds = args.rounds or (QUICK if args.quick else ROUNDS)
    chosen = variants(args.method or ["lora", "dora", "melora"], args.dropout)
    save = RESULTS / "lowrank-cpu.jsonl" if args.save else None
    rows = []
    for dtype in args.dtype or DTYPES:
        for t, i, o in args.shape or SHAPES:
            for row in compare(
                "lowrank", Shape(t, i, o, dtype=DTYPES[dtype]), chosen, rounds=rounds, dropout=args.dropout
            ):
                emit(row, save)
                rows.append(row)
    print("\n" + lowrank_table(rows))


if __name__ == "__main__":
    main()
