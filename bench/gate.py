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
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from fastpeft.ops.launch import kernels
from fastpeft.ops.nf4 import per_byte

lowrank, dora = kernels("lowrank"), kernels("dora")
sparse = kernels("sparse")
kron, hadamard = kernels("kron"), kernels("hadamard")
nf4, grouped = kernels("nf4"), kernels("grouped")
product, product_hopper = kernels("product"), kernels("product_hopper")
MODULES = (lowrank, sparse, dora, kron, hadamard, nf4, grouped, product, product_hopper)
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
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip

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


def sparse_cases(
    r: int, dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """Both routes of the gradient, one entry among them so that its sum is split, and the changes of W; `factor` is of values.

    r says only whether rows are aligned: no tile depends on it.
    """
    width = C if r % 16 == 0 else C + r
    x, W, nnz = meta(T, width, dtype=dtype), meta(width, width, dtype=dtype), 50_000
    index, one = meta(2, nnz, dtype=torch.int32), meta(2, 1, dtype=torch.int32)
    values, saved = meta(nnz, dtype=factor), meta(nnz, dtype=dtype)
    return {
        "sddmm": lambda: sparse.sddmm(x, x, index),
        "sddmm, one entry": lambda: sparse.sddmm(x, x, one),
        "masked": lambda: sparse.masked(x, x, index),
        "masked, transposed x": lambda: sparse.masked(x, meta(width, T, dtype=dtype).T, index),
        "copy": lambda: sparse.copy(W, values, index, meta(width, width, dtype=dtype)),
        "put": lambda: sparse.put(W, values, index),
        "restore": lambda: sparse.restore(W, index, saved),
    }


def kron_cases(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """shape: a, b, c, d. The product, its transpose for dx, and the gradients in one pass where they fit and in two."""
    a, b, c, d = shape
    x, y = meta(T, c * d, dtype=dtype), meta(T, a * b, dtype=dtype)
    C, D, bias = meta(a, c, dtype=factor), meta(b, d, dtype=factor), meta(a * b, dtype=factor)
    return {
        "fresh": lambda: kron.fresh(x, C, D, 2.0, None),
        "fresh, bias": lambda: kron.fresh(x, C, D, 2.0, bias),
        "add": lambda: kron.add(y, x, C, D, 2.0),
        "dx": lambda: kron.fresh(y, C.T, D.T, 2.0, None),
        "dx_add": lambda: kron.add(x, y, C.T, D.T, 2.0),
        "dC, dD": lambda: kron.grads(y, x, C, D, 2.0, True, True),
        "dC": lambda: kron.grads(y, x, C, D, 2.0, True, False),
        "dD": lambda: kron.grads(y, x, C, D, 2.0, False, True),
    }


def hadamard_cases(
    r: int, dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """Every launcher with every combination of flags that the operators use."""
    k, P = hadamard, tiles.hadamard_width(r)
    x, u = meta(T, C, dtype=dtype), meta(T, r * P, dtype=dtype)
    a, b, bias = meta(r, C, dtype=factor), meta(C, r, dtype=factor), meta(C, dtype=factor)
    return {
        "down": lambda: k.down(x, a, a, dtype),
        "up": lambda: k.up(u, b, b, 2.0, None),
        "up, bias": lambda: k.up(u, b, b, 2.0, bias),
        "up_add": lambda: k.up_add(x, u, b, b, 2.0),
        "du": lambda: k.du_db(x, None, b, b, 2.0, True, False, False),
        "du_db": lambda: k.du_db(x, u, b, b, 2.0, True, True, True),
        "db1": lambda: k.du_db(x, u, b, b, 2.0, False, True, False),
        "dx": lambda: k.dx(u, a, a),
        "dx_add": lambda: k.dx_add(x, u, a, a),
        "da": lambda: k.da(x, u, a, a, True, True),
        "da2": lambda: k.da(x, u, a, a, False, True),
    }


def grouped_cases(
    shape: tuple[tuple[int, ...], int], dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """shape: ranks, k. Every launcher with every combination of flags that the family uses; weights in fp32."""
    k, (ranks, chosen) = grouped, shape
    R, P, W = sum(ranks), T * chosen, -(-max(ranks) // 16) * 16
    x, u, A, B = meta(T, C, dtype=dtype), meta(P, W, dtype=dtype), meta(R, C, dtype=factor), meta(C, R, dtype=factor)
    order, ends = meta(P, dtype=torch.int64), meta((len(ranks) + 1) * chosen + 1, dtype=torch.int32)
    w, bias = meta(P, dtype=torch.float32), meta(C, dtype=dtype)
    return {
        "down": lambda: k.down(x, A, order, ends, None, ranks, dtype),
        "down, weights": lambda: k.down(x, A, order, ends, w, ranks, dtype),
        "du": lambda: k.du(x, B, None, order, ends, None, ranks, 2.0),
        "du, weights": lambda: k.du(x, B, None, order, ends, w, ranks, 2.0),
        "du, dw": lambda: k.du(x, B, u, order, ends, w, ranks, 2.0),
        "up": lambda: k.up(u, B, order, ends, ranks, 2.0, None, T),
        "up, bias": lambda: k.up(u, B, order, ends, ranks, 2.0, bias, T),
        "up_add": lambda: k.up_add(x, u, B, order, ends, ranks, 2.0),
        "dx_add": lambda: k.up_add(x, u, A.T, order, ends, ranks, 1.0),
        "dA": lambda: k.outer(x, u, A, order, ends, None, ranks, 1.0, True),
        "dB": lambda: k.outer(x, u, B, order, ends, None, ranks, 2.0, False),
        "dB, weights": lambda: k.outer(x, u, B, order, ends, w, ranks, 2.0, False),
    }


def nf4_cases(
    bits: int, dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """Codes of `bits` bits, with scales of their own and nested ones, and int8; of a weight of the usual size and a ragged one."""
    per, u8, f32 = per_byte(bits), torch.uint8, torch.float32

    def codes(out: int, size: int, double: bool) -> None:
        n, block = out * size, 64
        blocks = -(-n // block)
        scale = meta(blocks, dtype=u8 if double else f32)
        inner = (meta(256, dtype=f32), meta(-(-blocks // 256), dtype=f32), meta(dtype=f32)) if double else (None,) * 3
        levels = meta(2**bits, dtype=f32)
        nf4.dequantise(
            meta(out, size, dtype=dtype), meta(-(-n // per), dtype=u8), levels, scale, bits, per, block, *inner, 256
        )

    def rows(out: int, size: int) -> None:
        nf4.dequantise_rows(meta(out, size, dtype=dtype), meta(out, size, dtype=torch.int8), meta(out, dtype=f32))

    return {
        "codes": lambda: codes(T, C, False),
        "codes, nested scales": lambda: codes(T, C, True),
        "codes, ragged": lambda: codes(37, 97, True),
        "int8": lambda: rows(T, C),
        "int8, ragged": lambda: rows(37, 97),
    }


def product_cases(
    tile: Any, dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """One tile of either kernel, both directions, with a share of rank 16 and without; `factor` plays no part: the share comes in
    x's dtype."""
    module = product if isinstance(tile, product.PlainTile) else product_hopper
    x, W, u, F = meta(T, C, dtype=dtype), meta(C, C, dtype=dtype), meta(T, 16, dtype=dtype), meta(C, 16, dtype=dtype)
    return {
        "y": lambda: module.product(x, W, None, None, meta(T, C, dtype=dtype), False, tile, 132),
        "y, share": lambda: module.product(x, W, u, F, meta(T, C, dtype=dtype), False, tile, 132),
        "dx": lambda: module.product(x, W, None, None, meta(T, C, dtype=dtype), True, tile, 132),
        "dx, share": lambda: module.product(x, W, u, meta(16, C, dtype=dtype), meta(T, C, dtype=dtype), True, tile, 132),
    }


CASES: dict[str, Callable[..., dict[str, Callable[[], Any]]]] = {
    "lowrank": lowrank_cases, "sparse": sparse_cases, "dora": dora_cases, "kron": kron_cases, "hadamard": hadamard_cases,
    "nf4": nf4_cases, "grouped": grouped_cases, "product": product_cases, "product_hopper": product_cases,
}  # fmt: skip
# one rank per rank tile, ranks whose rows are not aligned, and ranks of several rank tiles; the default is a LoRA of rank 16
EVERY = (*tiles.RANKS, 3, 20, 256)
DEFAULT = (16,)
# a, b, c, d of 4096 x 4096 near the square, as LoKr has it by default, and with factor 8
KRON_DEFAULT = ((64, 64, 64, 64), (8, 512, 8, 512))
# every step of a, b and c with d of one tile and of several, C of several tiles, and sizes with no aligned row
KRON_EVERY = (
    *KRON_DEFAULT,
    *((a, b, c, d) for a in (8, 32, 64) for b, d in ((16, 256), (64, 64), (128, 256)) for c in (8, 16)),
    *((a, b, 64, 16) for a in (8, 64) for b in (16, 64)),
    (512, 8, 512, 8), (5, 7, 7, 5), (37, 111, 43, 97), (1, 4099, 3, 1365), (5, 33, 11, 65), (5, 33, 67, 65),
    (19, 33, 7, 65), (19, 33, 11, 65), (19, 33, 130, 65), (129, 33, 7, 65),
)  # fmt: skip
HADAMARD_DEFAULT = (4, 8)
# 32 experts of rank 16; one rank per rank tile, ranks that no row is aligned for, and of several rank tiles
GROUPED_DEFAULT = (((16,) * 32, 2),)
GROUPED_EVERY = (
    *GROUPED_DEFAULT, *(((r,) * 8, 1) for r in (8, 32, 64, 128, 256)), ((3, 0, 8), 2), ((16, 20, 33), 2), ((16, 0, 64), 3), ((130,) * 4, 2), ((16,), 1),
)  # fmt: skip
NF4_DEFAULT, NF4_EVERY = (4,), (4, 2, 3, 8)
HADAMARD_EVERY = (1, 3, 4, 5, 8, 12, 16, 20, 32)
# what `main` builds, default and all, where it is not DEFAULT and EVERY
SIZES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "kron": (KRON_DEFAULT, KRON_EVERY), "hadamard": (HADAMARD_DEFAULT, HADAMARD_EVERY),
    "nf4": (NF4_DEFAULT, NF4_EVERY), "grouped": (GROUPED_DEFAULT, GROUPED_EVERY),
    "product": ((product.PlainTile(),), product.TILES), "product_hopper": ((product_hopper.ProductTile(),), product_hopper.TILES),
}  # fmt: skip


# families that only these cards have the instructions for
ONLY = {"product": ("sm_90", "sm_100"), "product_hopper": ("sm_90",)}


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the block are kept and not run."""
    seen: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for kernel in (k for module in MODULES for k in module.KERNELS):
            stack.enter_context(mock.patch.object(kernel, "run", _recorder(kernel, seen)))
        yield seen


def _recorder(kernel: Any, seen: list[Launch]) -> Callable[..., None]:
    def run(*args: Any, grid: Any, warmup: bool, num_warps: int, num_stages: int = 3, **kwargs: Any) -> None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if "enable_fp_fusion" in kwargs:
            options["enable_fp_fusion"] = kwargs.pop("enable_fp_fusion")
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        seen.append(Launch(kernel, dict(bound), options))

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
        elif hasattr(value, "block_shape"):
            signature[parameter.name] = _described(value)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else ASTSource
    return kind(launch.kernel, signature, constants, attributes)


def _described(descriptor: Any) -> str:
    """A tensor descriptor's type; Gluon's names its layout too."""
    layout = getattr(descriptor, "layout", None)
    return f"tensordesc<{NAMES[descriptor.base.dtype]}{list(descriptor.block_shape)}{'' if layout is None else f',{layout!r}'}>"


def build(launch: Launch, target: str) -> Any:
    return triton.compile(source(launch), target=TARGETS[target], options=launch.options)


def row(case: str, launch: Launch, target: str) -> Row:
    """Compile one launch and read its machine code."""
    compiled = build(launch, target)
    cuda = TARGETS[target].backend == "cuda"
    text = compiled.asm["ptx"] if cuda else compiled.asm["amdgcn"]
    registers, spills = _cuda_usage(compiled.asm["cubin"]) if cuda else _amd_usage(text)
    arguments = launch.arguments
    names = ("BM", "BN", "BT", "BO", "BC", "BI", "BJ", "BK", "BL", "BR", "RI", "P", "BLOCK", "BYTES")
    sizes = [arguments[k] for k in names if k in arguments]
    tile = (
        "x".join(map(str, sizes))
        + f", {launch.options['num_warps']} warps, {launch.options['num_stages']} stages"
    )
    return Row(
        case, launch.kernel.fn.__name__, tile, target, registers, spills, compiled.metadata.shared,
        len(re.findall(MMA[target], text)), len(re.findall(PTX_F64 if cuda else AMD_F64, text)), _dots(compiled.asm),
    )  # fmt: skip


def _dots(asm: dict[str, Any]) -> bool:
    """Gluon begins at the GPU's own form."""
    return "tt.dot" in asm["ttir"] if "ttir" in asm else "warp_group_dot" in asm["ttgir"]


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
    family: str, sizes: Iterable[Any], targets: Iterable[str] = TARGETS, **dtypes: torch.dtype
) -> list[Row]:
    """Every case of `family` at every size, a rank for most, once per distinct build."""
    table, done = [], set()
    for target, size in itertools.product([t for t in targets if t in ONLY.get(family, TARGETS)], sizes):
        for case, call in CASES[family](size, **dtypes).items():
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
        r
        for f in families
        for r in rows(f, SIZES.get(f, (DEFAULT, EVERY))[args.all], args.target or TARGETS, **dtypes)
    ]
    print(markdown(table))
    print(f"\n{len(table)} builds, {sum(bool(r.faults()) for r in table)} with a fault")


if __name__ == "__main__":
    main()
