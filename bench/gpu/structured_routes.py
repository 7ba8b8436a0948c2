"""Where one route of a computation overtakes another: the gradient of sparse values by density, and LoHa by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu import part_sparse as entries
from bench.gpu.common import SHAPES, Row, Run, copies, nbytes, ratios, shown, spoiled, summary, times
from bench.gpu.part_operators import Case
from bench.machine import name_of
from bench.structured import routes
from fastpeft.ops import khatri_rao, khatri_rao_triton, sparse, sparse_triton

DENSITIES = (0.0005, 0.001, 0.003, 0.01, 0.02)
RANKS = (4, 8, 16, 32)
CHUNK = "torch, grad by chunk"
DENSE, LOW_TRITON = "dense", "low-rank, triton"
ROUNDS = 20


def sparse_routes(run: Run, density: float) -> list[Row]:
    """A row per route; what fails or is wrong is not timed. by chunk: the dense gradient in fp32 a few rows at a time, and
    the entries read off; it and `by entry` are what sparse.grad takes on CUDA in torch. dense + gather: one product in x's
    own dtype, which rounds the gradient: not an exact rival, but what the card can do.
    """
    t, i, o = (70, 72, 64) if run.dry else SHAPES[0]
    nnz = max(48, int(density * i * o))
    case = Case("sparse", t, (i, o, nnz), run.dtype, entries.F32)
    calls: dict[str, Any] = {f"triton, {k}": f for k, f in entries.TRITON.items() if k != "grad"}
    calls |= {f"torch, {k}": f for k, f in entries.TORCH.items()}
    first = entries.make(case, run.device)
    if first.x.is_cuda and entries.sparse_cuda.built():
        calls["CUDA C++"] = entries.CUDA["grad"]
    rows = {name: _checked(first, name, call) for name, call in calls.items()}
    sets = [first, *copies(lambda: entries.make(case, run.device), nbytes(first.x, first.dz), run)[1:]]
    calls = {name: call for name, call in calls.items() if rows[name].get("right")}
    calls["torch, dense + gather"] = lambda dz, x, index: (dz.T @ x)[tuple(index.long())]
    rows["torch, dense + gather"] = {"route": "torch, dense + gather"}
    rounds = 3 if run.dry else ROUNDS
    seconds = times(
        {n: [lambda c=c, m=m: c(m.dz, m.x, m.index) for m in sets] for n, c in calls.items()},
        run,
        rounds=rounds,
    )
    chosen = {
        f"triton, grad by {sparse_triton._route(first.dz, first.x, first.index)}",
        f"torch, grad by {'entry' if nnz * sparse.GATHERED < i * o else 'chunk'}",
    }
    for name, s in seconds.items():
        base = seconds.get(CHUNK, s)
        rows[name] |= {"nnz": nnz, "chosen": name in chosen} | summary(s) | ratios(s, base)
    return list(rows.values())


def _checked(m: entries.Inputs, name: str, call: entries.Gradient) -> Row:
    try:
        error, wrong = entries.gradient(m, call)
    except Exception as fault:
        if spoiled(str(fault)):
            raise
        return {"route": name, "failed": f"{type(fault).__name__}: {str(fault)[:300]}"}
    return {"route": name, "error": error, "right": not wrong, "wrong": "; ".join(wrong)}


def loha_routes(run: Run, rank: int, dtype: torch.dtype) -> list[Row]:
    """What each route adds to the frozen layer's two products, forward and backward: low-rank of rank^2 in Triton and in
    torch; dense: the update as a whole, added to W on an fp32 layer, a product of its own on a 16-bit one.
    """
    t, i, o = (33, 40, 24) if run.dry else SHAPES[0]
    kw: Any = {"device": run.device}
    torch.manual_seed(0)
    W = torch.randn(o, i, **kw).to(dtype)

    def made() -> dict[str, Callable[[], object]]:
        x, dz = torch.randn(t, i, **kw).to(dtype), torch.randn(t, o, **kw).to(dtype)
        own = tuple(torch.randn(*s, **kw) / rank**0.5 for s in ((rank, i), (rank, i), (o, rank), (o, rank)))

        def triton() -> None:
            khatri_rao_triton.fresh(x, own, 1.0, None)
            khatri_rao_triton.back(dz, x, own, 1.0, None, True, (True,) * 4)

        torch_routes = routes(x, dz, own, W)
        return {LOW_TRITON: triton, "low-rank, torch": torch_routes["low-rank"], DENSE: torch_routes["dense"]}

    sets = copies(made, t * (i + o) * dtype.itemsize, run)
    seconds = times({n: [s[n] for s in sets] for n in sets[0]}, run, rounds=3 if run.dry else ROUNDS)
    on_base = dtype is torch.float32
    dense = khatri_rao.materialises(o, i, rank, on_base)
    return [
        {"route": name, "chosen": (name == DENSE) == dense} | summary(s) | ratios(s, seconds[DENSE])
        for name, s in seconds.items()
    ]


def dtypes(run: Run) -> list[torch.dtype]:
    """Of the layer: 16 bits, where the update has a product of its own, and fp32, where it is added to W."""
    return [torch.float16 if run.dry else run.dtype, torch.float32]


def head(dtype: torch.dtype, rank: int) -> Row:
    return {"what": "loha routes", "rank": rank, "dtype": name_of(dtype)}


def line(r: Row, dry: bool) -> str:
    """*: what the package takes as it is, in Triton and in torch."""
    if r["what"] == "sparse routes":
        at, base = f"density {r['density']:<7g}", "by chunk"
    else:
        at, base = f"{r['dtype']} rank {r['rank']:<3}", DENSE
    name = f"{r['what']} {at} {r.get('route', ''):<22}"
    if "failed" in r:
        return f"{name} FAILED {r['failed'][:100]}"
    if not r.get("right", True):
        return f"{name} WRONG {r['wrong']}, not timed"
    ratio = f"{shown(r['ratio'], dry, '.3f')} of {base}"
    return f"{name} {shown(r['us'], dry):>9} us  {ratio}{' *' if r['chosen'] else ''}"
