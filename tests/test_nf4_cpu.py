"""Stored weights made dense in C++: the bits of the reference in torch; and what the build may not hold."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_nf4 import stored

from fastpeft.ops import int8, nf4, nf4_cpu

ROOT = Path(__file__).resolve().parents[1]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
# ragged; less than a vector; rows that begin inside a block; several pieces of work, the last one short
SHAPES = [(37, 97), (3, 5), (33, 65), (300, 250)]

pytestmark = pytest.mark.skipif(not nf4_cpu._BUILT, reason="fastpeft._C was built without stored weights")


@pytest.fixture(autouse=True, params=["avx2", "avx512"])
def one_instruction_set(request):
    own = nf4_cpu._EXTENSION.build_info()["isa"]
    if not nf4_cpu._EXTENSION.isa_use(request.param):
        pytest.skip(f"this processor has no {request.param}")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    nf4_cpu._EXTENSION.isa_use(own)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))


def both(shape, dtype, packed):
    """What C++ and torch write over NaN."""
    got, want = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    nf4_cpu.fill(got, packed, nf4.levels(packed.bits) if packed.levels is None else packed.levels)
    nf4.fill_torch(want, packed)
    return got, want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits,block,nested", list(itertools.product([2, 3, 4, 8], [32, 64, 96, 4096], [False, True])))
def test_codes(bits, block, nested, dtype):
    for shape in SHAPES:
        packed = stored(bits, block, shape, nested)
        assert same_bits(*both(shape, dtype, packed))
        assert same_bits(*both(shape, dtype, packed._replace(levels=torch.randn(2**bits))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_scale(dtype):
    """Zero and negative ones, so small and so large that the product is subnormal or infinite in 16 bits, NaN."""
    scales = torch.tensor([0.0, -0.0, -1.5, 1e-7, 3e-8, 1e-38, 1e-42, 7e4, 3e38, float("inf"), float("nan"), 65519.9])
    packed = stored(4, 32, (12, 32))._replace(absmax=scales)
    got, want = both((12, 32), dtype, packed)
    assert same_bits(got.nan_to_num(), want.nan_to_num()) and torch.equal(got.isnan(), want.isnan())
    codes = torch.randint(-127, 128, (12, 32), dtype=torch.int8)
    got, want = torch.empty(12, 32, dtype=dtype), torch.empty(12, 32, dtype=dtype)
    nf4_cpu.fill_rows(got, codes, scales)
    int8.fill_torch(want, codes, scales)
    assert same_bits(got.nan_to_num(), want.nan_to_num()) and torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (3, 40000), (5000, 7)])
def test_rows(shape, dtype):
    codes, absmax = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0])
    got, want = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    nf4_cpu.fill_rows(got, codes, absmax)
    int8.fill_torch(want, codes, absmax)
    assert same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_with_any_number_of_threads(dtype):
    packed, results = stored(4, 64, (301, 250), nested=True), []
    codes, absmax = torch.randint(-127, 128, (301, 250), dtype=torch.int8), torch.rand(301)
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        rows = torch.empty(301, 250, dtype=dtype)
        nf4_cpu.fill_rows(rows, codes, absmax)
        results.append((both((301, 250), dtype, packed)[0], rows))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_nothing_is_written_beside_the_weight():
    around = torch.full((3, 37 * 97), 7.0)
    nf4_cpu.fill(around[1].view(37, 97), stored(4, 64, (37, 97)), nf4.levels())
    assert (around[::2] == 7).all()


def test_nothing():
    nf4_cpu.fill(torch.empty(0, 8), nf4.Packed(torch.empty(0, dtype=torch.uint8), torch.empty(0)), nf4.levels())
    nf4_cpu.fill_rows(torch.empty(4, 0), torch.empty(4, 0, dtype=torch.int8), torch.ones(4))


def test_arguments_that_do_not_fit_are_refused():
    packed, out, levels = stored(4, 64, (8, 64), nested=True), torch.empty(8, 64), nf4.levels()
    nested = packed.nested
    faults = {
        "codes is .*needed are 256": lambda: nf4_cpu.fill(out, packed._replace(codes=packed.codes[:-1]), levels),
        r"codes is .* torch.int8": lambda: nf4_cpu.fill(out, packed._replace(codes=packed.codes.view(torch.int8)), levels),
        "absmax is .*torch.uint8": lambda: nf4_cpu.fill(out, packed._replace(nested=None), levels),
        "absmax is .*needed are 16": lambda: nf4_cpu.fill(out, packed._replace(block=32), levels),
        "levels is .*needed are 16": lambda: nf4_cpu.fill(out, packed, levels[:-1]),
        "nested.table is": lambda: nf4_cpu.fill(out, packed._replace(nested=nested._replace(table=levels)), levels),
        "nested.absmax is": lambda: nf4_cpu.fill(out, packed._replace(nested=nested._replace(group=8)), levels),
        "out is .* strides": lambda: nf4_cpu.fill(torch.empty(64, 8).T, packed, levels),
        "blocks of 16": lambda: nf4_cpu.fill(torch.empty(2, 8), stored(4, 16, (2, 8)), levels),
        "codes is .*torch.uint8": lambda: nf4_cpu.fill_rows(out, packed.codes, torch.ones(8)),
        "absmax is .*torch.bfloat16": lambda: nf4_cpu.fill_rows(out, torch.zeros(8, 64, dtype=torch.int8), torch.ones(8).bfloat16()),
    }
    for match, call in faults.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_it_runs_unless_torch_is_asked_for(monkeypatch):
    called, real = [], nf4_cpu.fill
    monkeypatch.setattr(nf4_cpu, "fill", lambda *a: (called.append(1), real(*a)))
    packed = stored(4, 64, (8, 64))
    first = nf4.dequantise(packed, 8, 64, BF16)
    assert len(called) == 1
    monkeypatch.setenv("FASTPEFT_IMPL", "torch")
    assert same_bits(nf4.dequantise(packed, 8, 64, BF16), first) and len(called) == 1
    assert not nf4_cpu.runs(torch.empty(2, 2))


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="no g++ or nm on the path")
def test_a_file_for_one_instruction_set_shares_no_symbol(tmp_path):
    """Else the linker may keep its copy of a shared function, which other processors cannot run."""
    isa = nf4_cpu._EXTENSION.build_info()["isa"]
    flags = re.search(rf'"_{isa}": "([^"]*)"', (ROOT / "setup.py").read_text()).group(1).split()
    out = tmp_path / "one.o"
    command = ["g++", "-std=c++17", "-O1", "-fno-inline", *flags, "-c", str(ROOT / f"csrc/quant/quant_{isa}.cpp"), "-o", str(out)]
    subprocess.run(command, check=True)
    listing = subprocess.run(["nm", "-C", str(out)], check=True, capture_output=True, text=True).stdout
    shared = [line for line in listing.splitlines() if re.search(r" [WVu] (?!DW\.ref\.)", line)]
    assert shared == []
    given = [line.split(" T ")[1] for line in listing.splitlines() if " T " in line]
    assert given == [f"fastpeft::{isa}::quant_functions()"]
