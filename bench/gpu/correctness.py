"""Stage correctness: operators, masks, equal bits, whole layers, CUDA graphs and torch.compile. Nothing is
timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import fastpeft
from bench.arms import Arm, lowrank_variant
from bench.gpu import operators
from bench.gpu.common import Row, Run, Task, verdict
from bench.gpu.graphs import graph_check
from bench.gpu.operators import DROPS, OPERATORS, Case, make
from bench.harness import inputs
from bench.machine import name_of
from bench.oracle import check
from fastpeft.job.layerbench import Shape
from fastpeft.ops.launch import kernels

# method -> options; hydralora's heads make it wide
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {}, "melora": {"n": 4}, "hydralora": {"heads": 4}}


def tasks(run: Run) -> Iterator[Task]:
    yield from operator_tasks(run)
    yield from mask_tasks(run)
    yield from bit_tasks(run)
    yield from layer_tasks(run)
    for method, p in itertools.product(METHODS, (0.0, 0.1)):
        row = {"check": "CUDA graph", "what": method, "case": f"p {p}"}
        yield row, lambda method=method, p=p: graph_check(run, arm(run, method, p, run.dtype, run.dry))
    yield from compile_tasks(run)


def cases(run: Run) -> Iterator[Case]:
    """Ragged small shapes with every pair of dtypes, p and layout; ranks; large shapes, in the first dtype
    with every p.
    """
    pairs = [(d, f) for d in run.dtypes for f in dict.fromkeys((d, torch.float32))]
    small = [(33, 40, 35, 1), (33, 40, 35, 5), (9, 39, 36, 3)]
    for n, (shape, (x, f), p) in enumerate(itertools.product(small, pairs, (0.0, 0.3))):
        yield Case(*shape, 8, x, f, p, ("plain", "transposed", "sliced")[n % 3])
    for rank in (1, 3, 20, 130):
        yield Case(33, 40, 35, 1, rank, run.dtype, torch.float32, 0.3)
    if run.dry:
        return
    large = [(8192, 4096, 4096, 1), (4099, 4095, 4101, 1), (2048, 4096, 11008, 8)]
    for shape, p in itertools.product(large, (0.0, 0.1)):
        yield Case(*shape, 16, run.dtype, torch.float32, p)
    for x, f in pairs:
        yield Case(4099, 4096, 4104, 1, 16, x, f)
    for rank in (20, 64, 128, 256):
        yield Case(4099, 4096, 4096, 1, rank, run.dtype, torch.float32)
    for p in (0.0, 0.1):
        yield Case(3, 40, 35, 1, 8, run.dtype, torch.float32, p, "far")


def operator_tasks(run: Run) -> Iterator[Task]:
    """Every buffer is filled with NaN before a kernel writes it."""
    for case in cases(run):
        for name in OPERATORS:
            if (case.p and name not in DROPS) or (name == "row_sq_norm" and case.blocks > 1):
                continue
            row = {"check": "operator", "what": name, "case": described(case)}
            yield row, lambda name=name, case=case: _operator(run, name, case)


def described(case: Case) -> str:
    t, i, o, n, r, x, f, p, layout = case
    return f"[{t}, {i} -> {o}] blocks {n} rank {r} {name_of(x)}/{name_of(f)} p {p} {layout}"


def _operator(run: Run, name: str, case: Case) -> Row:
    m = make(case, run.device)
    with filled(float("nan")):
        got = OPERATORS[name](m)
    worst, found = operators.wrong(name, m, got)
    return {"error": worst, "right": not found, "wrong": "; ".join(found)}


def filled(value: float) -> Any:
    """Launchers get memory that holds `value`."""
    fill = lambda shape, dtype, device: torch.full(shape, value, dtype=dtype, device=device)  # noqa: E731
    return mock.patch.object(kernels("lowrank").memory, "empty", side_effect=fill)


def mask_tasks(run: Run) -> Iterator[Task]:
    """The CPU's mask, from torch on the device and from each kernel that drops: with ones, its result is the
    mask.
    """
    tall = (70, 65) if run.dry else (4097, 4104)
    for shape, p in itertools.product(((48, 48), tall), (0.1, 0.5)):
        for name, call in _masks(run, shape, p).items():
            row = {"check": "dropout bits", "what": name, "case": f"{list(shape)} p {p}"}
            yield row, lambda call=call, shape=shape, p=p: _same_mask(call(), shape, p)


def _masks(run: Run, shape: tuple[int, int], p: float) -> dict[str, Callable[[], torch.Tensor]]:
    t, i = shape
    seed, kw = torch.tensor(operators.SEED, device=run.device), {"dtype": torch.float32, "device": run.device}
    how: dict[str, Any] = {"seed": seed, "p": p, "blocks": 1}
    ones, column, row = torch.ones(t, i, **kw), torch.ones(t, 1, **kw), torch.ones(1, i, **kw)
    found: dict[str, Callable[[], torch.Tensor]] = {
        "torch": lambda: fastpeft.dropout_mask(seed, shape, p),
        "dx": lambda: operators.ops.dx(column, row, **how),
    }
    if t <= 48:
        found["down"] = lambda: operators.ops.down(ones, torch.eye(i, **kw), torch.float32, **how)
        found["da"] = lambda: operators.ops.da(ones, torch.eye(t, **kw), torch.empty(t, i, **kw), **how)
    return found


def _same_mask(got: torch.Tensor, shape: tuple[int, int], p: float) -> Row:
    want = fastpeft.dropout_mask(operators.SEED, shape, p)
    return {"right": torch.equal(got.cpu() != 0, want != 0)}


def bit_tasks(run: Run) -> Iterator[Task]:
    """Two runs give equal bits, whatever memory held before."""
    shapes = [(70, 40, 35, 1), (33, 40, 35, 5)] if run.dry else [(4099, 4095, 4101, 1), (8192, 4096, 4096, 8)]
    for shape in shapes:
        case = Case(*shape, 16 if shape[3] == 1 else 3, run.dtype, torch.float32, 0.1)
        for name in OPERATORS:
            if name == "row_sq_norm" and case.blocks > 1:
                continue
            row = {"check": "equal bits", "what": name, "case": described(case)}
            yield row, lambda name=name, case=case: _bits(run, name, case)


def _bits(run: Run, name: str, case: Case) -> Row:
    results = []
    for value in (float("nan"), 1e4):
        m = make(case, run.device)
        with filled(value):
            results.append(OPERATORS[name](m))
    first, second = results
    found = [k for k in first if not torch.equal(first[k], second[k])]
    return {"right": not found, "wrong": ", ".join(found)}


def arm(run: Run, method: str, p: float, dtype: torch.dtype, small: bool, impl: str = "triton") -> Arm:
    """One fastpeft layer, [33, 40 -> 36] or [2048, 4096 -> 4096]."""
    from bench.arms import arms

    size, rank = ((33, 40, 36), 5) if small else ((2048, 4096, 4096), 16)
    variant = lowrank_variant(method, method, rank, p, **METHODS[method])
    found = arms(Shape(*size, dtype=dtype, device=run.device), [variant])[f"fastpeft {method}"]
    found.impl = impl
    return found


def _inputs(run: Run, a: Arm, dtype: torch.dtype, small: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs(Shape(33 if small else 2048, a.layer.in_features, a.layer.out_features, dtype, run.device))


def layer_tasks(run: Run) -> Iterator[Task]:
    """y and every gradient of a whole layer, through autograd."""
    sizes = (True,) if run.dry else (True, False)
    for small, method, p, dtype, impl in itertools.product(
        sizes, METHODS, (0.0, 0.1), run.dtypes, ("triton", "torch")
    ):
        row = {
            "check": "layer",
            "what": method,
            "case": f"{impl} {name_of(dtype)} p {p}{' small' if small else ''}",
        }

        def work(small=small, method=method, p=p, dtype=dtype, impl=impl) -> Row:
            a = arm(run, method, p, dtype, small, impl)
            with filled(float("nan")) as empty:
                found = _checked(a, *_inputs(run, a, dtype, small))
            # what asks for memory is a launcher
            if empty.called != (impl == "triton"):
                found |= {"right": False, "wrong": f"{impl} was asked for and did not run"}
            return found

        yield row, work


def compile_tasks(run: Run) -> Iterator[Task]:
    """torch.compile(fullgraph=True) of a layer, with eager's random numbers so that its mask is known."""
    for method, p in itertools.product(METHODS, (0.0, 0.1)):
        row = {"check": "torch.compile", "what": method, "case": f"p {p}"}

        def work(method=method, p=p) -> Row:
            import torch._inductor.config as inductor

            torch._dynamo.reset()
            a = arm(run, method, p, run.dtype, run.dry)
            with mock.patch.object(inductor, "fallback_random", True), a.using():
                a.layer = Compiled(a.layer, "aot_eager" if run.dry else "inductor")
                return _checked(a, *_inputs(run, a, run.dtype, run.dry))

        yield row, work


def _checked(a: Arm, x: torch.Tensor, dy: torch.Tensor) -> Row:
    error, found = check(a, x, dy)
    return {"error": error, "right": not found, "wrong": ", ".join(found)}


class Compiled(torch.nn.Module):
    """A compiled layer that still shows its weight and bias."""

    def __init__(self, layer: Any, backend: str):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.run = torch.compile(layer, fullgraph=True, backend=backend)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def table(found: list[Row], dry: bool) -> str:
    """A line per kind of check and name, then every one that is not right."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in found:
        groups.setdefault((r["check"], r["what"]), []).append(r)
    lines = []
    for (kind, what), members in groups.items():
        right = sum(r.get("right", False) for r in members)
        skipped = sum("skipped" in r for r in members)
        lines.append(
            f"{kind:<14} {what:<12} {right} of {len(members)} right"
            + (f", {skipped} skipped" if skipped else "")
        )
    bad = [r for r in found if "skipped" not in r and not r.get("right")]
    lines += [f"{r['check']} {r['what']} {r.get('case', '')}: {verdict(r)}" for r in bad[:40]]
    return "\n".join(lines)
