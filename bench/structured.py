"""LoHa, LoKr and KronA on one layer, forward and backward, and the gradient of sparse values: python -m bench.structured
[--quick] [--save] [--only layers|sparse|crossover].

Layers: as bench.lowrank, one interleaved run per shape and dtype with the frozen layer, stock PEFT and fastpeft; claims are
quotients of overheads over the frozen layer, and of what is kept for backward beyond x. Sparse: the values' gradient
against dense dW and a gather, and against torch.sparse.sampled_addmm, at two densities. Crossover: LoHa's two routes by rank.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.arms import Variant, peft_name
from bench.harness import compare, quartiles
from bench.lowrank import DTYPES, SHAPES
from bench.machine import RESULTS, emit, name_of
from bench.table import lowrank_table
from fastpeft.job.layerbench import Shape
from fastpeft.job.measure import interleaved
from fastpeft.ops import dense, khatri_rao, sparse

ROUNDS, QUICK = 30, 5
DENSITIES = (0.001, 0.01)
FILE = RESULTS / "structured-cpu.jsonl"
VARIANTS = [
    Variant("loha", "loha", {"rank": 8, "alpha": 16}),
    Variant("lokr", "lokr", {"rank": 8, "alpha": 16, "factor": 16}),
]
Row = dict[str, Any]


def layers(rounds: int) -> Iterator[Row]:
    for dtype in DTYPES.values():
        for t, i, o in SHAPES:
            yield from compare("structured", Shape(t, i, o, dtype=dtype), VARIANTS, rounds=rounds)


def support(out: int, size: int, density: float) -> Tensor:
    """int32 [2, nnz]: int(density * out * size) entries drawn at random, in row-major order."""
    flat = torch.randperm(out * size)[: int(density * out * size)].sort().values
    return torch.stack([flat // size, flat % size]).to(torch.int32)


def gradients(dz: Tensor, x: Tensor, index: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is compared, each giving [nnz] in fp32 (torch's dense product of 16-bit numbers gives 16 bits)."""
    rows, cols = index.long()
    pointers = torch.searchsorted(rows, torch.arange(dz.shape[1] + 1))
    zeros = torch.sparse_csr_tensor(pointers, cols, torch.zeros(len(rows)), (dz.shape[1], x.shape[1]))
    found: dict[str, Callable[[], Tensor]] = {
        "dense + gather": lambda: (dz.t() @ x)[rows, cols].float(),
        "fastpeft": lambda: sparse.grad(dz, x, index, torch.float32),
    }
    if dz.dtype is torch.float32:  # torch.sparse has no 16-bit one
        found["torch.sparse"] = lambda: torch.sparse.sampled_addmm(zeros, dz.t(), x).values()
    return found


def sparse_gradients(rounds: int) -> Iterator[Row]:
    for dtype in DTYPES.values():
        for t, i, o in SHAPES:
            for density in DENSITIES:
                torch.manual_seed(0)
                dz, x, index = torch.randn(t, o).to(dtype), torch.randn(t, i).to(dtype), support(o, i, density)
                exact = (dz.double().t() @ x.double())[tuple(index.long())]
                arms = gradients(dz, x, index)
                plain = (arms["dense + gather"]().double() - exact).abs().max().item()
                rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
                errors = {n: (f().double() - exact).abs().max().item() for n, f in arms.items()}
                seconds = interleaved(arms, rounds=rounds)
                for name, own in seconds.items():
                    yield {
                        "bench": "sparse gradient", "arm": name, "shape": [t, i, o], "dtype": name_of(dtype), "density": density,
                        "nnz": index.shape[1], "ms": 1e3 * statistics.median(own), "rounds": rounds, "device": "cpu",
                        "error": errors[name], "wrong": not errors[name] <= 2 * plain + rounding,
                        "ours": quartiles([a / b for a, b in zip(seconds["fastpeft"], own, strict=True)]),
                    }  # fmt: skip


def crossover(rounds: int) -> Iterator[Row]:
    """LoHa's routes on one layer by rank: low-rank, and the update added to a copy of W (fp32) or a product of its own."""
    for dtype in DTYPES.values():
        for t, i, o in SHAPES:
            for rank in (4, 8, 12, 16, 24, 32):
                torch.manual_seed(0)
                x, dz = torch.randn(t, i).to(dtype), torch.randn(t, o).to(dtype)
                own = (torch.randn(rank, i), torch.randn(rank, i), torch.randn(o, rank), torch.randn(o, rank))
                W = torch.randn(o, i).to(dtype)
                seconds = interleaved(routes(x, dz, own, W), rounds=rounds)
                on_base = dtype is torch.float32
                yield {
                    "bench": "loha routes", "shape": [t, i, o], "dtype": name_of(dtype), "rank": rank, "rounds": rounds, "device": "cpu",
                    "chosen": "dense" if khatri_rao.materialises(o, i, rank, on_base) else "low-rank",
                    "low_rank_over_dense": quartiles([a / b for a, b in zip(seconds["low-rank"], seconds["dense"], strict=True)]),
                    "ms": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
                }  # fmt: skip


def routes(x: Tensor, dz: Tensor, own: tuple[Tensor, ...], W: Tensor) -> dict[str, Callable[[], object]]:
    """What each route adds to the frozen layer's two products, forward and backward."""
    every = (True,) * 4

    def low_rank() -> None:
        khatri_rao.fresh(x, own, 1.0, None)
        khatri_rao.back(dz, x, own, 1.0, None, True, every)

    def whole() -> None:
        if W.dtype is torch.float32:
            for _ in range(2):
                torch.add(W, khatri_rao.delta(own, 1.0, W.dtype))
            khatri_rao.back_dense(dense.grad(dz, x, torch.float32), own, 1.0, every)
        else:
            khatri_rao.Own.fresh(x, own, 1.0, None)
            khatri_rao.Own.back(dz, x, own, 1.0, None, True, every)

    return {"low-rank": low_rank, "dense": whole}


def report(rows: list[Row]) -> str:
    parts = []
    whole = [r for r in rows if r["bench"] == "structured"]
    if whole:
        parts += [lowrank_table(whole), memory(whole)]
    for r in rows:
        if r["bench"] == "sparse gradient":
            parts.append(
                f"{r['dtype']:<9} {r['shape']!s:<20} density {r['density']:<6g} {r['arm']:<15} {r['ms']:8.2f} ms, fastpeft takes "
                f"{r['ours'][1]:.2f} [{r['ours'][0]:.2f}, {r['ours'][2]:.2f}] of it{', WRONG' if r['wrong'] else ''}"
            )
        if r["bench"] == "loha routes":
            q = r["low_rank_over_dense"]
            parts.append(
                f"{r['dtype']:<9} {r['shape']!s:<20} rank {r['rank']:>2}: low-rank / dense {q[1]:.2f} [{q[0]:.2f}, {q[2]:.2f}], "
                f"chosen: {r['chosen']}"
            )
    return "\n".join(parts)


def memory(rows: list[Row]) -> str:
    """Bytes beyond x, fastpeft's as a share of PEFT's."""
    lines = ["Kept for backward beyond x, bytes"]
    for r in rows:
        if r["library"] == "fastpeft":
            theirs = [
                q["saved_bytes"] for q in rows
                if q["shape"] == r["shape"] and q["dtype"] == r["dtype"] and q["arm"] in [
                    peft_name(r["method"], d) for d in (r["dtype"], "float32")]
            ]  # fmt: skip
            shares = ", ".join(f"{r['saved_bytes'] / t:.3f}" for t in theirs)
            lines.append(f"  {r['shape']!s:<20} {r['dtype']:<9} {r['arm']:<16} {r['saved_bytes']:>10,d}; of PEFT's {theirs}: {shares}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", choices=["layers", "sparse", "crossover"], action="append", help="repeatable")
    parser.add_argument("--save", action="store_true", help=f"append the rows to bench/results/{FILE.name}")
    args = parser.parse_args()
    rounds = args.rounds or (QUICK if args.quick else ROUNDS)
    parts = {"layers": layers, "sparse": sparse_gradients, "crossover": crossover}
    rows = []
    for name in args.only or parts:
        for row in parts[name](rounds):
            emit(row, FILE if args.save else None)
            rows.append(row)
    print("\n" + report(rows))


if __name__ == "__main__":
    main()
