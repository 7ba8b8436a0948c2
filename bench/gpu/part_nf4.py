"""Stage part_nf4: stored weights made dense by Triton, to the bit of the reference on the CPU; layers over them; then their times.

A dequantisation moves bits in one way only, so equality is asked for, in bf16 too (which Triton's interpreter cannot round).
Times: each kernel as a share of what copying as many bytes takes, beside bitsandbytes' own where it is installed; and a LoRA
layer over an NF4 base as a ratio to the same over the dense weight.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastpeft
from bench.gpu.ceilings import roofs
from bench.gpu.common import Row, Run, Task, copies, nbytes, ratios, shown, summary, times, verdict
from bench.machine import name_of
from fastpeft.base import Plain
from fastpeft.ops import int8, nf4, nf4_triton
from fastpeft.ops.nf4 import Nested, Packed
from fastpeft.quantised import NF4, Int8
from fastpeft.terms import Gain, LowRank, Sparse

# bits, block, nested
STORED = [(4, 64, False), (4, 64, True), (4, 128, False), (2, 64, False), (3, 64, False), (8, 64, True), (4, 96, True)]
RAGGED = [(37, 97), (3, 10), (1, 1)]
WHICH = ("lora", "dora", "copy")
IMPL = "triton"


def stored(run: Run, shape: tuple[int, int], bits: int, block: int, nested: bool) -> Packed:
    """Random codes and scales on the CPU."""
    torch.manual_seed(0)
    n, per = shape[0] * shape[1], nf4.per_byte(bits)
    blocks = -(-n // block)
    codes = torch.randint(256 if per > 1 else 2**bits, (-(-n // per),), dtype=torch.uint8)
    if not nested:
        return Packed(codes, torch.rand(blocks), bits, block)
    inner = Nested(torch.randn(256), torch.rand(-(-blocks // 256)), torch.tensor(0.37))
    return Packed(codes, torch.randint(256, (blocks,), dtype=torch.uint8), bits, block, None, inner)


def moved(packed: Packed, device: str) -> Packed:
    """The same on another device."""
    nested = packed.nested
    if nested is not None:
        nested = Nested(*(t.to(device) for t in nested[:3]), nested.group)
    return packed._replace(codes=packed.codes.to(device), absmax=packed.absmax.to(device), nested=nested)


def tasks(run: Run) -> Iterator[Task]:
    yield from bit_tasks(run)
    yield from layer_tasks(run)
    yield from kernel_times(run)
    yield from layer_times(run)


def bit_tasks(run: Run) -> Iterator[Task]:
    """Triton into memory full of NaN, twice, against the reference on the CPU; torch's code on the device likewise."""
    shapes = RAGGED if run.dry else [*RAGGED, (4096, 4096), (14336, 4096)]
    for shape, dtype in itertools.product(shapes, run.dtypes):
        for bits, block, nested in STORED:
            case = f"{list(shape)} {name_of(dtype)}, {bits} bits in blocks of {block}{', nested' if nested else ''}"

            def work(shape=shape, dtype=dtype, packed=(bits, block, nested)) -> Row:
                p = stored(run, shape, *packed)
                want = torch.empty(shape, dtype=dtype)
                nf4.fill_torch(want, p)
                there = moved(p, run.device)
                return compared(run, want, lambda out: nf4_triton.fill(out, there), lambda out: nf4.fill_torch(out, there))

            yield {"check": "bits", "what": "codes", "case": case}, work

        def rows(shape=shape, dtype=dtype) -> Row:
            torch.manual_seed(0)
            codes, absmax = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0])
            want = torch.empty(shape, dtype=dtype)
            int8.fill_torch(want, codes, absmax)
            c, a = codes.to(run.device), absmax.to(run.device)
            return compared(run, want, lambda out: nf4_triton.fill_rows(out, c, a), lambda out: int8.fill_torch(out, c, a))

        yield {"check": "bits", "what": "int8", "case": f"{list(shape)} {name_of(dtype)}"}, rows


def compared(run: Run, want: Tensor, triton: Callable[[Tensor], None], plain: Callable[[Tensor], None]) -> Row:
    found = []
    for name, call in (("triton", triton), ("triton again", triton), ("torch", plain)):
        out = torch.full(want.shape, float("nan"), dtype=want.dtype, device=run.device)
        call(out)
        if not torch.equal(out.cpu(), want):
            found.append(f"{name} has other bits in {int((out.cpu() != want).sum())} of {want.numel()}")
    return {"right": not found, "wrong": "; ".join(found)}


def bases(run: Run, kind: str, o: int, i: int) -> tuple[Any, Plain]:
    """A quantised weight, and the dense one that it stands for."""
    torch.manual_seed(0)
    W = torch.randn(o, i, device=run.device).to(run.dtype)
    base: Any = Int8.quantise(W) if kind == "int8" else NF4.quantise(W)
    return base, Plain(base.dense(run.dtype))


def terms(run: Run, which: str, o: int, i: int) -> tuple[list[Any], list[Tensor]]:
    torch.manual_seed(1)
    A, B = (torch.randn(*s, device=run.device).mul_(0.05).requires_grad_() for s in ((16, i), (o, 16)))
    low = LowRank(A, B, 2.0)
    if which == "dora":
        m = torch.rand(o, device=run.device).requires_grad_()
        return [low, Gain(m, over=low)], [A, B, m]
    if which == "copy":
        flat = torch.randperm(o * i, device=run.device)[: o * i // 500 + 1].sort().values
        values = torch.randn(flat.numel(), device=run.device).requires_grad_()
        return [low, Sparse(values, torch.stack([flat // i, flat % i]).to(torch.int32))], [A, B, values]
    return [low], [A, B]


def step(base: Any, given: tuple[list[Any], list[Tensor]], x: Tensor, dy: Tensor) -> list[Tensor]:
    y = fastpeft.adapted_linear(x, base, None, given[0], impl=IMPL)
    return [y, *torch.autograd.grad(y, [x, *given[1]], dy)]


def layer_tasks(run: Run) -> Iterator[Task]:
    """y and every gradient: the bits that the dense weight gives; eager, by CUDA graph, and compiled."""
    t, i, o = (33, 64, 48) if run.dry else (2048, 4096, 4096)
    for kind, which, how in itertools.product(("nf4", "int8"), WHICH, ("eager", "CUDA graph", "torch.compile")):

        def work(kind=kind, which=which, how=how) -> Row:
            if how == "CUDA graph" and not run.cuda:
                return {"skipped": "CUDA only"}
            base, dense = bases(run, kind, o, i)
            given = terms(run, which, o, i)
            x = torch.randn(t, i, device=run.device).to(run.dtype).requires_grad_()
            dy = torch.randn(t, o, device=run.device).to(run.dtype)
            want = step(dense, given, x, dy)
            got = ways(run, how, base, given, x, dy)
            names = ("y", "dx", "A", "B", "other")
            if how == "torch.compile":
                # its products may be others
                limit = 2 * torch.finfo(run.dtype).eps
                far = [n for n, a, b in zip(names, got, want, strict=False) if (a - b).abs().max() > limit * b.abs().max()]
            else:
                far = [n for n, a, b in zip(names, got, want, strict=False) if not torch.equal(a, b)]
            return {"right": not far, "wrong": ", ".join(far)}

        yield {"check": "layer", "what": f"{kind}, {which}", "case": how}, work


def ways(run: Run, how: str, base: Any, given: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    if how == "eager":
        return step(base, given, x, dy)
    if how == "torch.compile":
        torch._dynamo.reset()
        call = torch.compile(
            lambda x: fastpeft.adapted_linear(x, base, None, given[0], impl=IMPL),
            fullgraph=True, backend="aot_eager" if run.dry else "inductor",
        )  # fmt: skip
        y = call(x)
        return [y, *torch.autograd.grad(y, [x, *given[1]], dy)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(base, given, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(base, given, x, dy)
    for h in held:
        h.detach().fill_(float("nan"))
    graph.replay()
    return held


def kernel_times(run: Run) -> Iterator[Task]:
    shapes = [(48, 64)] if run.dry else [(4096, 4096), (14336, 4096), (1024, 4096)]
    for shape, dtype, kind in itertools.product(shapes, run.dtypes, ("nf4", "nf4, nested", "nf2", "int8")):
        head = {"check": "time", "what": kind, "case": f"{list(shape)} {name_of(dtype)}"}
        yield head, lambda shape=shape, dtype=dtype, kind=kind: timed(run, shape, dtype, kind)


def timed(run: Run, shape: tuple[int, int], dtype: torch.dtype, kind: str) -> Row:
    """Each name rotates over weights that exceed L2 together, so every read is from memory."""
    out = torch.empty(shape, dtype=dtype, device=run.device)
    calls: dict[str, list[Callable[[], object]]] = {"triton": [], "torch": []}
    size, right = 0, True
    if kind == "int8":

        def make() -> Any:
            return torch.randint(-127, 128, shape, dtype=torch.int8, device=run.device), torch.rand(shape[0], device=run.device)

        for codes, absmax in copies(make, out.numel(), run):
            size = nbytes(codes, absmax, out)
            calls["triton"].append(lambda c=codes, a=absmax: nf4_triton.fill_rows(out, c, a))
            calls["torch"].append(lambda c=codes, a=absmax: int8.fill_torch(out, c, a))
    else:
        bits, nested = (2 if kind == "nf2" else 4), kind.endswith("nested")
        for p in copies(lambda: moved(stored(run, shape, bits, 64, nested), run.device), out.numel() * bits // 8, run):
            size = nbytes(p.codes, p.absmax, out)
            calls["triton"].append(lambda p=p: nf4_triton.fill(out, p))
            calls["torch"].append(lambda p=p: nf4.fill_torch(out, p))
            if kind == "nf4" and run.cuda and importlib.util.find_spec("bitsandbytes"):
                call = theirs(p, shape, dtype)
                nf4_triton.fill(out, p)
                right = right and torch.equal(call(), out)
                calls.setdefault("bitsandbytes", []).append(call)
    seconds = times(calls, run)
    bandwidth, _ = roofs(run)
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    row: Row = {"bytes": size, "share": size / bandwidth / middle["triton"], "right": right}
    return row | summary(seconds["triton"]) | {f"{n}_us": 1e6 * s for n, s in middle.items() if n != "triton"}


def theirs(p: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], Tensor]:
    import bitsandbytes.functional as functional

    state = functional.QuantState(p.absmax, torch.Size(shape), None, p.block, "nf4", dtype)
    return lambda: functional.dequantize_4bit(p.codes[:, None], state)


def layer_times(run: Run) -> Iterator[Task]:
    """LoRA of rank 16 over an NF4 or int8 base as a ratio to LoRA over the dense weight; forward, and forward and backward."""
    shapes = [(33, 64, 48)] if run.dry else [(8192, 4096, 4096), (2048, 4096, 4096), (8192, 4096, 14336)]
    for shape, which, whole in itertools.product(shapes, ("lora", "dora"), (False, True)):

        def work(shape=shape, which=which, whole=whole) -> list[Row]:
            t, i, o = shape
            given = terms(run, which, o, i)
            x = torch.randn(t, i, device=run.device).to(run.dtype).requires_grad_()
            dy = torch.randn(t, o, device=run.device).to(run.dtype)
            calls: dict[str, list[Callable[[], object]]] = {}
            for kind in ("nf4", "int8"):
                base, dense = bases(run, kind, o, i)
                for name, b in ((kind, base), *((("dense", dense), ("dense again", dense)) if kind == "nf4" else ())):
                    calls[name] = [call_of(b, given, x, dy, whole)]
            seconds = times(calls, run)
            own = [k for k in calls if k != "dense"]
            return [{"arm": k, "right": True} | ratios(seconds[k], seconds["dense"]) for k in own]

        case = f"{list(shape)} {'forward and backward' if whole else 'forward'}"
        yield {"check": "ratio to the dense base", "what": which, "case": case}, work


def call_of(base: Any, given: Any, x: Tensor, dy: Tensor, whole: bool) -> Callable[[], object]:
    if whole:
        return lambda: step(base, given, x, dy)

    def forward() -> Tensor:
        with torch.no_grad():
            return fastpeft.adapted_linear(x, base, None, given[0], impl=IMPL)

    return forward


def table(found: list[Row], dry: bool) -> str:
    lines = []
    for kind in dict.fromkeys((r["check"], r["what"]) for r in found if r["check"] in ("bits", "layer")):
        members = [r for r in found if (r["check"], r["what"]) == kind]
        lines.append(f"{kind[0]:<8} {kind[1]:<14} {sum(r.get('right', False) for r in members)} of {len(members)} right")
    for r in found:
        where = f"{r['what']} {r.get('arm', '')} {r['case']}"
        if "us" in r and not r["right"]:
            lines.append(f"{where}: other bits than bitsandbytes")
        if "us" in r:
            others = "".join(f", {k[:-3]} {shown(v, dry)} us" for k, v in r.items() if k.endswith("_us") and k != "iqr_us")
            lines.append(f"{shown(r['us'], dry):>9} us, {shown(100 * r['share'], dry, '.0f'):>3}% of a copy{others}  {where}")
        elif "ratio" in r:
            lines.append(f"{shown(r['ratio'], dry, '.3f'):>9} of the dense base  {where}")
        elif "skipped" not in r and not r.get("right"):
            lines.append(f"{r['check']} {where}: {verdict(r)}")
    return "\n".join(lines)
