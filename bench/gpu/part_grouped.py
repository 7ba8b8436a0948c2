"""Stage part_grouped: experts grouped by token in Triton, against the formula in fp64; then from which total rank they are quicker.

operators  y, dx and every gradient of a layer of experts, every buffer filled with NaN before, and equal bits of two runs
layer      the bits of an eager call by CUDA graph, which no host sync may disturb; compiled code, which computes all experts
switch     grouped / all experts, forward and backward, and grouped in torch beside it; the rows are for fastpeft/grouping.py
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from bench.experts import ALL, FROZEN, GROUPED, Problem, chosen, formula, over, step, terms
from bench.gpu.common import Row, Run, Task, shown, times, verdict
from bench.machine import name_of
from bench.oracle import distance
from fastpeft.linear import adapted_linear
from fastpeft.ops.launch import kernels

IMPL = "triton"
# tokens, in, out, rank, experts, k: ragged; a tile and its tail; many experts of few tokens; ranks of several tiles
SMALL = [(33, 40, 36, 3, 5, 2), (70, 130, 48, 16, 4, 1), (20, 64, 64, 16, 24, 3), (70, 48, 40, 40, 3, 2)]
LARGE = [(4096, 4096, 4096, 16, 32, 2), (2048, 4096, 14336, 64, 8, 1), (8192, 4096, 4096, 8, 256, 2)]
TIMED = [(8192, 4096, 4096), (2048, 4096, 4096), (8192, 4096, 14336)]
TOTALS = (128, 256, 512, 1024, 2048, 4096)
NAMES = ("y", "dx", "dA", "dB", "dV")


def tasks(run: Run) -> Iterator[Task]:
    yield from operator_tasks(run)
    yield from layer_tasks(run)
    yield from switch_tasks(run)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Launchers get memory full of NaN."""
    full = lambda shape, dtype, device: torch.full(shape, float("nan"), dtype=dtype, device=device)  # noqa: E731
    with mock.patch.object(kernels("lowrank").memory, "empty", full):
        yield


def operator_tasks(run: Run) -> Iterator[Task]:
    for case, dtype in itertools.product(SMALL[:2] if run.dry else [*SMALL, *LARGE], run.dtypes):
        head = {"check": "operators", "what": "grouped", "case": f"{list(case)} {name_of(dtype)}"}
        yield head, functools.partial(checked, run, case, dtype)


def checked(run: Run, case: tuple[int, ...], dtype: torch.dtype) -> Row:
    """No entry may be further from fp64 than twice the formula in `dtype`, plus one rounding of the largest."""
    t, i, o, rank, experts, k = case
    problem = Problem(t, (i, o), dtype, run.device, rank)
    own = problem.experts(experts * rank)
    with poisoned():
        index = chosen(problem, own, k, IMPL)
        runs = [step(problem, own, terms(own, k)[GROUPED], IMPL) for _ in range(2)]
    exact, plain = (formula(problem, own, index, d) for d in (torch.float64, dtype))
    error, wrong = distance(dict(zip(NAMES, runs[0], strict=True)), exact, plain)
    other = [n for n, a, b in zip(NAMES, *runs, strict=True) if not torch.equal(a, b)]
    said = [*(f"{n} is too far" for n in wrong), *(f"{n} has other bits the second time" for n in other)]
    return {"error": error, "right": not said, "wrong": ", ".join(said)}


def layer_tasks(run: Run) -> Iterator[Task]:
    for k, how in itertools.product((1, 2), ("CUDA graph", "torch.compile")):
        yield {"check": "layer", "what": how, "case": f"k={k}"}, functools.partial(ways, run, k, how)


def ways(run: Run, k: int, how: str) -> Row:
    if how == "CUDA graph" and not run.cuda:
        return {"skipped": "CUDA only"}
    problem = Problem(*((33, (64, 48)) if run.dry else (2048, (4096, 4096))), run.dtype, run.device)
    own = problem.experts(16 * (4 if run.dry else 32))
    call = functools.partial(step, problem, own, terms(own, k)[GROUPED], IMPL)
    want = call()
    if how == "CUDA graph":
        got = graphed(call)
        far = [n for n, a, b in zip(NAMES, got, want, strict=True) if not torch.equal(a, b)]
        return {"right": not far, "wrong": ", ".join(far)}
    torch._dynamo.reset()
    make = terms(own, k)[GROUPED]
    layer = torch.compile(
        lambda x: adapted_linear(x, problem.W, None, [make()], impl=IMPL), fullgraph=True, backend="aot_eager" if run.dry else "inductor"
    )
    y = layer(problem.x)
    got = (y, *torch.autograd.grad(y, [problem.x, *own.values()], problem.dy))
    limit = 4 * torch.finfo(run.dtype).eps
    far = [n for n, a, b in zip(NAMES, got, want, strict=True) if (a - b).abs().max() > limit * b.abs().max()]
    return {"right": not far, "wrong": ", ".join(far)}


def graphed(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    for h in held:
        h.detach().fill_(float("nan"))
    graph.replay()
    return held


def switch_tasks(run: Run) -> Iterator[Task]:
    shapes, totals = ([(33, 64, 48)], (64,)) if run.dry else (TIMED, TOTALS)
    dtypes = run.dtypes[:1] if run.dry else [torch.bfloat16, torch.float32]
    for shape, dtype, k, total in itertools.product(shapes, dtypes, (1, 2), totals):
        head = {"check": "switch", "what": f"k={k}, R={total}", "case": f"{list(shape)} {name_of(dtype)}"}
        yield head, functools.partial(timed, run, shape, dtype, k, total)


def timed(run: Run, shape: tuple[int, int, int], dtype: torch.dtype, k: int, total: int) -> Row:
    t, i, o = shape
    problem = Problem(t, (i, o), dtype, run.device)
    own = problem.experts(total)
    made = terms(own, k)
    calls = {name: [functools.partial(step, problem, own, made[name], IMPL)] for name in (ALL, GROUPED)}
    calls |= {"torch": [functools.partial(step, problem, own, made[GROUPED], "torch")]}
    calls |= {n: [functools.partial(step, problem, {}, None, IMPL)] for n in (FROZEN, "frozen again")}
    seconds = times(calls, run)
    low, middle, high = over(seconds, GROUPED, ALL)
    frozen = {f"{n} / frozen": over(seconds, n, FROZEN)[1] for n in (ALL, GROUPED, "torch", "frozen again")}
    return {"right": True, "active": k * problem.rank, "total": total, "ratio": middle, "iqr": [low, high], **frozen}


def table(found: list[Row], dry: bool) -> str:
    lines = []
    for check in ("operators", "layer"):
        members = [r for r in found if r["check"] == check and "skipped" not in r]
        lines.append(f"{check:<10} {sum(r.get('right', False) for r in members)} of {len(members)} right")
        lines += [f"  {r['what']} {r['case']}: {verdict(r)}" for r in members if not r.get("right")]
    for r in found:
        if r["check"] == "switch":
            said = shown(r["ratio"], dry, ".3f") if "ratio" in r else verdict(r)
            others = ", ".join(f"{k} {shown(v, dry, '.3f')}" for k, v in r.items() if k.endswith("frozen"))
            lines.append(f"{said:>7} grouped / all  {r['what']:<14} {r['case']}  {others}")
    return "\n".join(lines)
