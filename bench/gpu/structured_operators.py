"""Per operator of the families kron, hadamard and sparse one call in Triton, in torch and where there is one in CUDA C++,
with the bytes and flops that it cannot do without; and their times beside the card's own limits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.gpu import part_operators as whole
from bench.gpu import part_sparse as entries
from bench.gpu.ceilings import roofs
from bench.gpu.common import Row, Run, copies, nbytes, shown, summary, times
from bench.gpu.operators import SCALE
from bench.gpu.part_operators import Case
from bench.gpu.parts import CODES
from fastpeft.ops import sparse, sparse_cuda, sparse_triton

TRITON, TORCH, CUDA = "triton", "torch", "CUDA C++"
# the names of the operators of each family
OPERATORS = {
    "kron": ("fresh", "add", "dx_add", "grads", "back"),
    "hadamard": ("fresh", "add", "dx_add", "grads", "back"),
    "sparse": ("copy", "put, restore", "grad"),
}


class Launch(NamedTuple):
    """calls: by implementation; they change nothing but what an operator writes in place.   bytes: each tensor once."""

    calls: dict[str, Callable[[], Any]]
    bytes: int
    flops: int


def launches(m: Any) -> dict[str, Launch]:
    return _sparse(m) if m.case.family == "sparse" else _whole(m)


def _whole(m: whole.Inputs) -> dict[str, Launch]:
    """The flops are the products' of the factored form, with the middle made again in backward."""
    low, high = _halves(m.case)
    x, z, own = nbytes(m.x), nbytes(m.z), nbytes(*m.tensors)
    none = (False,) * len(m.tensors)
    calls: dict[str, tuple[Callable[[Any], Any], int, int]] = {
        "fresh": (lambda k: k.fresh(m.x, m.tensors, SCALE, m.bias), x + z + own, low + high),
        "add": (lambda k: k.add(m.z, m.x, m.tensors, SCALE), x + 2 * z + own, low + high),
        "dx_add": (
            lambda k: k.back(m.dz, None, m.tensors, SCALE, m.x, True, none),
            z + 2 * x + own,
            low + high,
        ),
        "grads": (
            lambda k: k.back(m.dz, m.x, m.tensors, SCALE, None, False, m.every),
            x + z + 2 * own,
            2 * (low + high),
        ),
        "back": (
            lambda k: k.back(m.dz, m.x, m.tensors, SCALE, None, True, m.every),
            2 * x + z + 2 * own,
            3 * low + 2 * high,
        ),
    }
    codes = CODES[m.case.family]
    return {
        name: Launch({i: lambda call=call, code=code: call(code) for i, code in codes.items()}, size, flops)
        for name, (call, size, flops) in calls.items()
    }


def _halves(case: Case) -> tuple[int, int]:
    """Flops of the product with the factor on x's side and of that on y's."""
    t = case.tokens
    if case.family == "kron":
        a, b, c, d = case.size
        return 2 * t * c * d * b, 2 * t * a * c * b
    i, o, r = case.size
    return 2 * t * i * r * r, 2 * t * o * r * r


def _sparse(m: entries.Inputs) -> dict[str, Launch]:
    """An entry is its value and two indices; what one reads around it is not counted."""
    nnz, width = m.index.shape[1], m.W.element_size()
    own = nnz * (4 + 8)
    codes = {TRITON: sparse_triton, TORCH: sparse} | ({CUDA: sparse_cuda} if has_cuda(m) else {})
    out = m.W.clone()
    grads = {
        TRITON: entries.TRITON["grad"],
        TORCH: lambda dz, x, index: sparse.grad(dz, x, index, entries.F32),
    }
    grads |= {CUDA: entries.CUDA["grad"]} if has_cuda(m) else {}

    def copy(code: Any) -> Any:
        return code.copy(m.W, m.values, m.index, out)

    def window(code: Any) -> None:
        code.restore(m.W, m.index, code.put(m.W, m.values, m.index))

    return {
        "copy": Launch(
            {i: lambda c=c: copy(c) for i, c in codes.items()}, 2 * nbytes(m.W) + own + 2 * nnz * width, nnz
        ),
        "put, restore": Launch(
            {i: lambda c=c: window(c) for i, c in codes.items()}, own + 8 * nnz + 5 * nnz * width, nnz
        ),
        "grad": Launch(
            {i: lambda g=g: g(m.dz, m.x, m.index) for i, g in grads.items()},
            nbytes(m.dz, m.x) + own,
            2 * m.case.tokens * nnz,
        ),
    }


def has_cuda(m: entries.Inputs) -> bool:
    return m.x.is_cuda and sparse_cuda.built()


def timed(run: Run, case: Case, name: str, known: dict[str, tuple[float, float]]) -> Row:
    """Triton's time and its share of the roof, and the other implementations' times. known: the roofs, once measured."""
    if "roofs" not in known:
        known["roofs"] = roofs(run)
    sets = [launches(m)[name] for m in rotated(run, case)]
    seconds = times({i: [s.calls[i] for s in sets] for i in sets[0].calls}, run)
    bandwidth, rate = known["roofs"]
    launch = sets[0]
    floor = max(launch.bytes / bandwidth, launch.flops / rate)
    middle = {i: statistics.median(s) for i, s in seconds.items()}
    row: Row = {"bytes": launch.bytes, "flops": launch.flops, "roof_us": 1e6 * floor}
    row |= {"share": floor / middle[TRITON]} | summary(seconds[TRITON])
    others = {
        i: {**summary(s), "triton_to_it": middle[TRITON] / middle[i]}
        for i, s in seconds.items()
        if i != TRITON
    }
    return row | {"others": others}


def rotated(run: Run, case: Case) -> list[Any]:
    """Sets of inputs that do not fit in L2 together; index and values of an adapter are one set, and small."""
    make: Any = entries.make if case.family == "sparse" else whole.make
    first = make(case, run.device)
    moved = [first.W] if case.family == "sparse" else [first.z]
    return [first, *copies(lambda: make(case, run.device), nbytes(first.x, first.dz, *moved), run)[1:]]


def cases(run: Run) -> list[Case]:
    """lokr's split by 16 and krona's by the root, loha's rank 8 (and 32 once), random masks at two densities; fp32 factors."""
    found = []
    for t, i, o in run.shapes:
        if run.dry:
            found += [
                ("kron", t, (4, o // 4, 4, i // 4)),
                ("hadamard", t, (i, o, 3)),
                ("sparse", t, (i, o, 48)),
            ]
            continue
        found += [("kron", t, (16, o // 16, 16, i // 16)), ("hadamard", t, (i, o, 8))]
        if i == o:
            found += [("kron", t, (64, o // 64, 64, i // 64)), ("hadamard", t, (i, o, 32))]
        found += [("sparse", t, (i, o, int(p * i * o))) for p in (0.001, 0.01)]
    return [Case(*c, run.dtype, entries.F32) for c in found]


def line(r: Row, dry: bool) -> str:
    head = f"{r['family'] + ' ' + r['operator']:<22}"
    if "failed" in r:
        return f"{head} FAILED {r['failed'][:100]}  {r['case']}"
    others = ", ".join(f"{name} {shown(o['us'], dry)}" for name, o in r["others"].items())
    return f"{head} {shown(r['us'], dry):>8} us {shown(100 * r['share'], dry, '.0f'):>4}% of roof; {others}  {r['case']}"
