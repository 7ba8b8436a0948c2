"""Stage parts: the operators of the families kron, hadamard and sparse, small ones under compute-sanitizer,
whole layers, CUDA graphs and torch.compile. Nothing is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.arms import Arm
from bench.gpu import part_operators as whole
from bench.gpu import part_sparse as entries
from bench.gpu.common import Row, Run, Task
from bench.gpu.correctness import Compiled, filled, table
from bench.gpu.graphs import graph_check
from bench.gpu.part_cases import LARGE, SMALL, cases
from bench.gpu.part_layers import LAYERS, NO_KERNEL, check, layer_arm
from bench.gpu.part_operators import Case
from bench.gpu.sanitizer import TOOLS
from bench.gpu.tiny_parts import sanitized
from bench.harness import inputs
from bench.machine import name_of
from fastpeft.job.layerbench import Shape
from fastpeft.ops import khatri_rao, khatri_rao_triton, kron, kron_triton, sparse, sparse_cuda, sparse_triton

__all__ = ["table", "tasks"]

NAN = float("nan")
CODES: dict[str, dict[str, Any]] = {
    "kron": {"triton": kron_triton, "torch": kron},
    "hadamard": {"triton": khatri_rao_triton, "torch": khatri_rao},
}


def tasks(run: Run) -> Iterator[Task]:
    # at first, while there is time: each may take minutes
    for tool in ("none", *TOOLS):
        row = {"check": "sanitizer", "what": tool, "case": "bench.gpu.tiny_parts"}
        yield row, lambda tool=tool: sanitized(run, tool)
    for case in cases(run):
        yield from sparse_tasks(run, case) if case.family == "sparse" else operator_tasks(run, case)
    yield from cuda_tasks(run)
    yield from bit_tasks(run)
    yield from layer_tasks(run)
    yield from graph_tasks(run)
    yield from compile_tasks(run)


def operator_tasks(run: Run, case: Case) -> Iterator[Task]:
    """Every buffer is filled with NaN before a kernel writes it."""
    for impl, code in CODES[case.family].items():
        for name, operator in whole.OPERATORS.items():
            # a fresh y has x's dtype; what is asked for alone takes kernels of its own, each to be compiled: one dtype will do
            if (case.x is not None and name == "fresh") or (name == "alone" and case.dtype is not run.dtype):
                continue
            if impl == "torch" and not _long(case):
                continue
            row = {"check": f"{case.family} {impl}", "what": name, "case": str(case)}

            def work(case=case, name=name, operator=operator, code=code) -> Row:
                m = whole.make(case, run.device)
                with filled(NAN):
                    got = operator(m, code)
                return verdict(*whole.wrong(name, m, got))

            yield row, work


def _long(case: Case) -> bool:
    """Whether torch's code can be held against PyTorch's products: it rounds scale * C where they round C, and over a few
    tokens it is chance which is the closer. It takes x in y's dtype only.
    """
    return case.tokens >= 33 and case.x is None


def verdict(error: float, found: list[str]) -> Row:
    return {"error": error, "right": not found, "wrong": "; ".join(found)}


def sparse_tasks(run: Run, case: Case) -> Iterator[Task]:
    if case.x is not None:
        # x is wider than dz, which only Triton's gradient takes
        yield from _gradients(run, case, "triton", entries.TRITON)
        return
    for impl, code, calls in (("triton", sparse_triton, entries.TRITON), ("torch", sparse, entries.TORCH)):
        yield from _gradients(run, case, impl, calls)
        yield from _scatters(run, case, impl, code)


def _gradients(run: Run, case: Case, impl: str, calls: dict[str, entries.Gradient]) -> Iterator[Task]:
    for name, call in calls.items():

        def work(call=call) -> Row:
            m = entries.make(case, run.device)
            m.x = m.x.to(case.x or case.dtype)
            with filled(NAN):
                return verdict(*entries.gradient(m, call))

        yield {"check": f"sparse {impl}", "what": name, "case": str(case)}, work


def _scatters(run: Run, case: Case, impl: str, code: Any) -> Iterator[Task]:
    for name, operator in entries.SCATTERS.items():

        def work(operator=operator) -> Row:
            with filled(NAN):
                return verdict(0.0, operator(entries.make(case, run.device), code))

        yield {"check": f"sparse {impl}", "what": name, "case": str(case)}, work


def cuda_tasks(run: Run) -> Iterator[Task]:
    """The compiled operators, which take fp32 values and columns of stride 1."""
    if not run.cuda or not sparse_cuda.built():
        said = "CUDA only" if not run.cuda else "this build has no CUDA operators"
        yield {"check": "sparse CUDA C++", "what": "all", "case": ""}, lambda: {"skipped": said}
        return
    shapes = [*SMALL["sparse"], *LARGE["sparse"]]
    for dtype, shape, layout in itertools.product(run.dtypes, shapes, ("plain", "padded")):
        case = Case("sparse", *shape, dtype, torch.float32, layout)
        yield from _gradients(run, case, "CUDA C++", entries.CUDA)
        yield from _scatters(run, case, "CUDA C++", sparse_cuda)
        row = {"check": "sparse CUDA C++", "what": "gather", "case": str(case)}
        yield row, lambda case=case: verdict(0.0, entries.gather(entries.make(case, run.device)))


def bit_tasks(run: Run) -> Iterator[Task]:
    """Two runs of Triton's operators give equal bits, whatever memory held before; so does the compiled gradient."""
    for family, shapes in (SMALL if run.dry else LARGE).items():
        case = Case(family, *shapes[-2], run.dtypes[-1] if run.dry else run.dtype, torch.float32)
        for name, call in _bit_calls(run, case).items():
            row = {"check": "equal bits", "what": f"{family} {name}", "case": str(case)}
            yield row, lambda call=call: _bits(call)


def _bit_calls(run: Run, case: Case) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    if case.family != "sparse":
        code = CODES[case.family]["triton"]
        return {
            name: lambda operator=operator: operator(whole.make(case, run.device), code)
            for name, operator in whole.OPERATORS.items()
        }
    calls = dict(entries.TRITON)
    if run.cuda and sparse_cuda.built():
        calls["grad, CUDA C++"] = sparse_cuda.grad

    def ran(call: entries.Gradient) -> dict[str, torch.Tensor]:
        m = entries.make(case, run.device)
        return {"dvalues": call(m.dz, m.x, m.index)}

    return {name: lambda call=call: ran(call) for name, call in calls.items()}


def _bits(call: Callable[[], dict[str, torch.Tensor]]) -> Row:
    results = []
    for value in (NAN, 1e4):
        with filled(value):
            results.append(call())
    first, second = results
    return verdict(0.0, [k for k in first if not torch.equal(first[k], second[k])])


def shape_of(run: Run, small: bool, dtype: torch.dtype) -> Shape:
    size = (33, 40, 36) if small else (2048, 4096, 4096)
    return Shape(*size, dtype=dtype, device=run.device)


def arm(run: Run, name: str, small: bool, dtype: torch.dtype, impl: str = "triton") -> Arm:
    method, *options = LAYERS[name]
    return replace(layer_arm(shape_of(run, small, dtype), name, method, options[not small]), impl=impl)


def layer_tasks(run: Run) -> Iterator[Task]:
    """y and every gradient of a whole layer, through autograd."""
    sizes = (True,) if run.dry else (True, False)
    for small, name, dtype, impl in itertools.product(sizes, LAYERS, run.dtypes, ("triton", "torch")):

        def work(small=small, name=name, dtype=dtype, impl=impl) -> Row:
            a = arm(run, name, small, dtype, impl)
            with filled(NAN) as empty:
                found = verdict(*check(a, *inputs(shape_of(run, small, dtype))))
            # what asks for memory is a launcher
            if empty.called != (impl == "triton" and name not in NO_KERNEL):
                found |= {"right": False, "wrong": f"{impl} was asked for and another ran"}
            return found

        case = f"{impl} {name_of(dtype)}{' small' if small else ''}"
        yield {"check": "layer", "what": name, "case": case}, work


def graph_tasks(run: Run) -> Iterator[Task]:
    for name in LAYERS:
        row = {"check": "CUDA graph", "what": name, "case": ""}
        yield row, lambda name=name: graph_check(run, arm(run, name, run.dry, run.dtype))


def compile_tasks(run: Run) -> Iterator[Task]:
    """torch.compile(fullgraph=True); a window is then a copy, whose bits are the same."""
    for name in LAYERS:

        def work(name=name) -> Row:
            torch._dynamo.reset()
            a = arm(run, name, run.dry, run.dtype)
            with a.using():
                a.layer = Compiled(a.layer, "aot_eager" if run.dry else "inductor")
                return verdict(*check(a, *inputs(shape_of(run, run.dry, run.dtype))))

        yield {"check": "torch.compile", "what": name, "case": ""}, work
