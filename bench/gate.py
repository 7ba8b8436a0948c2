"""The compile gate: build every kernel for GPUs that are not here, and read what the compiler made of it.

python -m bench.gate [--all] [--target sm_90] [--dtype fp32] ...   prints a markdown table: registers, spills, shared memory, tensor-core instructions

The real launchers run on tensors of the meta device; their launches are recorded and each recorded launch is compiled, with
the specialisation (strides of 1, multiples of 16) that the JIT would give it. So what is built is what is launched.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpeft.ops.launch import kernels

lowrank, dora = kernels("lowrank"), kernels("dora")
tiles = lowrank.tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes a block may use; the compiler does not check it
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MMA = {
    "sm_80": r"\bmma\.sync", "sm_90": r"\bmma\.sync|\bwgmma\.mma_async", "sm_100": r"\bmma\.sync|\btcgen05\.mma", "gfx942": r"\bv_mfma_",
}  # fmt: skip
PTX_F64 = r"\.f64\b"
AMD_F64 = r"\bv_\w+_f64\b"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}

T, C, N_BLOCKS = 4096, 4096, 4


class Launch(NamedTuple):
    """One recorded launch: the kernel, its arguments by name, its options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Row(NamedTuple):
    """What one launch became on one target."""

    case: str
    kernel: str
    tile: str
    target: str
    registers: int
    spills: int
    shared: int
    mma: int
    f64: int
    dots: bool

    def faults(self) -> list[str]:
        """What forbids this build; empty where nothing does."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED[self.target]:
            found.append(f"{self.shared} bytes of shared memory, the card has {SHARED[self.target]}")
        if self.f64:
            found.append(f"{self.f64} f64 instructions")
        if self.dots and not self.mma:
            found.append("no tensor-core instruction")
        return found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def lowrank_cases(
    r: int, dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """Every launcher with every combination of flags that the seam uses; fp32 factors on a bf16 x unless told."""
    x, u, A, B = (
        meta(T, C, dtype=dtype),
        meta(T, r, dtype=dtype),
        meta(r, C, dtype=factor),
        meta(C, r, dtype=factor),
    )
    gain, seed = meta(C, dtype=factor), meta(dtype=torch.int64)
    n = N_BLOCKS
    An, Bn, un = (
        meta(n, r, C // n, dtype=factor),
        meta(n, C // n, r, dtype=factor),
        meta(T, n * r, dtype=dtype),
    )
    k = lowrank
    return {
        "down": lambda: k.down(x, A, dtype, None, 0.0, 1),
        "down, dropout": lambda: k.down(x, A, dtype, seed, 0.1, 1),
        "down, blocks": lambda: k.down(x, An, dtype, None, 0.0, n),
        "up": lambda: k.up(u, B, 2.0, 1, None),
        "up, bias": lambda: k.up(u, B, 2.0, 1, gain),
        "up, blocks": lambda: k.up(un, Bn, 2.0, n, None),
        "up_add": lambda: k.up_add(x, u, B, 2.0, 1),
        "up_add, blocks": lambda: k.up_add(x, un, Bn, 2.0, n),
        "up_add_gain": lambda: k.up_add_gain(x, u, B, 2.0, 1, gain, gain),
        "du": lambda: k.du_db(x, None, B, 2.0, 1, True, False),
        "du_db": lambda: k.du_db(x, u, B, 2.0, 1, True, True),
        "du_db, blocks": lambda: k.du_db(x, un, Bn, 2.0, n, True, True),
        "db": lambda: k.du_db(x, u, B, 2.0, 1, False, True),
        "du_db_gain": lambda: k.du_db_gain(x, x, u, B, 2.0, 1, gain, True, True, True),
        "dx": lambda: k.dx(u, A, None, 0.0, 1),
        "dx, dropout": lambda: k.dx(u, A, seed, 0.1, 1),
        "dx, blocks": lambda: k.dx(un, An, None, 0.0, n),
        "dx_add": lambda: k.dx_add(x, u, A, None, 0.0, 1),
        "dx_add, dropout": lambda: k.dx_add(x, u, A, seed, 0.1, 1),
        "da": lambda: k.da(x, u, A, None, 0.0, 1),
        "da, dropout": lambda: k.da(x, u, A, seed, 0.1, 1),
    }


def dora_cases(
    r: int, dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.bfloat16
) -> dict[str, Callable[[], Any]]:
    """The norm with factors, with a transposed W, and without factors. 16-bit factors: fp32 ones use no tensor core."""
    W, A, B = meta(C, C, dtype=dtype), meta(r, C, dtype=factor), meta(C, r, dtype=factor)
    return {
        "row_sq_norm": lambda: dora.row_sq_norm(W, A, B),
        "row_sq_norm, transposed W": lambda: dora.row_sq_norm(W.T, A, B),
        "row_sq_norm, no factors": lambda: dora.row_sq_norm(W, None, None),
    }


CASES = {"lowrank": lowrank_cases, "dora": dora_cases}
# one rank per rank tile, ranks whose rows are not aligned, and ranks of several rank tiles; the default is a LoRA of rank 16
EVERY = (*tiles.RANKS, 3, 20, 256)
DEFAULT = (16,)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the block are kept and not run."""
    seen: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for kernel in (*lowrank.KERNELS, *dora.KERNELS):
            stack.enter_context(mock.patch.object(kernel, "run", _recorder(kernel, seen)))
        yield seen


def _recorder(kernel: Any, seen: list[Launch]) -> Callable[..., None]:
    def run(*args: Any, grid: Any, warmup: bool, num_warps: int, num_stages: int = 3, **kwargs: Any) -> None:
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        seen.append(Launch(kernel, dict(bound), {"num_warps": num_warps, "num_stages": num_stages}))

    return run


def launches(case: Callable[[], Any], target: str) -> list[Launch]:
    """What one call of a launcher launches on `target`."""
    arch = "hip" if TARGETS[target].backend == "hip" else target
    with mock.patch.object(lowrank, "architecture", lambda device: arch), recorded() as seen:
        case()
    assert seen, "a case that launches nothing checks nothing"
    return seen


def source(launch: Launch) -> ASTSource:
    """The launch as the compiler's input, specialised as the JIT would: integers of 1 are constants, 16 divides the rest."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def build(launch: Launch, target: str) -> Any:
    return triton.compile(source(launch), target=TARGETS[target], options=launch.options)


def row(case: str, launch: Launch, target: str) -> Row:
    """Compile one launch and read its machine code."""
    compiled = build(launch, target)
    cuda = TARGETS[target].backend == "cuda"
    text = compiled.asm["ptx"] if cuda else compiled.asm["amdgcn"]
    registers, spills = _cuda_usage(compiled.asm["cubin"]) if cuda else _amd_usage(text)
    arguments = launch.arguments
    sizes = [arguments[k] for k in ("BT", "BO", "BC", "BI", "BR", "BLOCK") if k in arguments]
    tile = (
        "x".join(map(str, sizes))
        + f", {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"
    )
    return Row(
        case, launch.kernel.fn.__name__, tile, target, registers, spills, compiled.metadata.shared,
        len(re.findall(MMA[target], text)), len(re.findall(PTX_F64 if cuda else AMD_F64, text)), "tt.dot" in compiled.asm["ttir"],
    )  # fmt: skip


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory and stack a thread: what ptxas could not keep in registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {k: int(re.search(rf"\b{k}:(\d+)", text)[1]) for k in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(text: str) -> tuple[int, int]:
    """Vector registers, and spilled vector and scalar registers."""
    find = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # type: ignore[index]  # noqa: E731
    return find("vgpr_count"), find("vgpr_spill_count") + find("sgpr_spill_count")


def rows(
    family: str, ranks: Iterable[int], targets: Iterable[str] = TARGETS, **dtypes: torch.dtype
) -> list[Row]:
    """Every case of `family` at every rank, once per distinct build."""
    table, done = [], set()
    for target, r in itertools.product(targets, ranks):
        for case, call in CASES[family](r, **dtypes).items():
            for launch in launches(call, target):
                key = (target, source(launch).hash(), *launch.options.values())
                if key not in done:
                    done.add(key)
                    table.append(row(case, launch, target))
    return table


def markdown(table: list[Row]) -> str:
    head = ["call", "kernel", "tile", "target", "registers", "spills", "shared B", "MMA", "faults"]
    lines = [head, ["---"] * len(head)]
    for r in table:
        lines.append(
            [
                r.case,
                r.kernel,
                r.tile,
                r.target,
                *map(str, (r.registers, r.spills, r.shared, r.mma)),
                "; ".join(r.faults()),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every legal tile, not only the default one")
    parser.add_argument("--family", choices=CASES, help="one family only")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of x and W")
    parser.add_argument("--factors", choices=["bf16", "fp16", "fp32"], help="of A and B")
    args = parser.parse_args()
    by_name = {v: k for k, v in NAMES.items()}
    dtypes = {"dtype": by_name[args.dtype]} | ({"factor": by_name[args.factors]} if args.factors else {})
    print(f"Triton {triton.__version__}\n")
    families = [args.family] if args.family else list(CASES)
    table = [
        r for f in families for r in rows(f, EVERY if args.all else DEFAULT, args.target or TARGETS, **dtypes)
    ]
    print(markdown(table))
    print(f"\n{len(table)} builds, {sum(bool(r.faults()) for r in table)} with a fault")


if __name__ == "__main__":
    main()
