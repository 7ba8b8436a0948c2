"""The sparse products in C++ against fp64, no worse than plain PyTorch in the same dtype; and what their build may not hold."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tolerance import assert_as_good

from fastpeft.ops import sparse_cpu

ROOT = Path(__file__).resolve().parents[1]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

pytestmark = pytest.mark.skipif(not sparse_cpu._BUILT, reason="fastpeft._C was built without the sparse products")

# tokens, in, out, density: ragged; smaller than a vector; several blocks and parts of tokens; whole panels without an entry; one column; one token; every entry, also so many that they are shared out
SHAPES = [
    (37, 41, 35, 0.1),
    (5, 3, 7, 0.5),
    (1000, 700, 300, 0.003),
    (65, 1100, 900, 0.00005),
    (300, 1, 70, 0.6),
    (1, 70, 40, 0.2),
    (33, 40, 35, 1.0),
    (20, 560, 500, 1.0),
]
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16)]
cases = pytest.mark.parametrize(
    ("shape", "dtypes"), list(itertools.product(SHAPES, DTYPES)), ids=lambda v: str(v).replace("torch.", "")
)
weights = pytest.mark.parametrize(
    ("shape", "dtype"),
    list(itertools.product([(35, 41, 0.1), (900, 700, 0.08), (7, 3, 1.0), (40, 30, 0.0)], (F32, BF16, F16))),
)


@pytest.fixture(autouse=True, params=["avx2", "avx512"])
def one_instruction_set(request):
    own = sparse_cpu._EXTENSION.build_info()["isa"]
    if not sparse_cpu._EXTENSION.isa_use(request.param):
        pytest.skip(f"this processor has no {request.param}")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    sparse_cpu._EXTENSION.isa_use(own)


def strided(rows, cols, dtype):
    """Columns of a wider matrix: rows are further apart than they are long, and begin at no multiple of a vector."""
    return torch.randn(rows, cols + 5).to(dtype)[:, 2 : 2 + cols]


def support(rows, cols, density):
    """An index of about `density` of all entries."""
    return torch.nonzero(torch.rand(rows, cols) < density).T.to(torch.int32).contiguous()


def dense(values, index, rows, cols, dtype):
    out = torch.zeros(rows, cols, dtype=dtype)
    out[index[0].long(), index[1].long()] = values.to(dtype)
    return out


def picked(m, index):
    return m[index[0].long(), index[1].long()]


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))


@cases
def test_grad(shape, dtypes):
    t, i, o, density = shape
    x, dz, index = strided(t, i, dtypes[0]), strided(t, o, dtypes[1]), support(o, i, density)
    want, plain = (picked(dz.to(d).T @ x.to(d), index) for d in (F64, F32))
    assert_as_good(sparse_cpu.grad(dz, x, index), want, plain, "dvalues")


@cases
def test_add(shape, dtypes):
    """y in one dtype, x in another; both directions."""
    t, i, o, density = shape
    x, y, index = strided(t, i, dtypes[0]), strided(t, o, dtypes[1]), support(o, i, density)
    dz, dx = strided(t, o, dtypes[0]), strided(t, i, dtypes[1])
    values = torch.randn(index.shape[1])
    S = {d: dense(values, index, o, i, d) for d in (F64, F32)}
    for name, call, to, by, turn in (("y", sparse_cpu.add, y, x, True), ("dx", sparse_cpu.add_t, dx, dz, False)):
        got = to.clone()
        call(got, by, values, index)
        want, wide = (to.to(d) + by.to(d) @ (S[d].T if turn else S[d]) for d in (F64, F32))
        assert_as_good(got, want, wide.to(to.dtype), name)
        touched = set(index[0 if turn else 1].tolist())
        untouched = [c for c in range(to.shape[1]) if c not in touched]
        assert same_bits(got[:, untouched], to[:, untouched])


@pytest.mark.parametrize("call", ["add", "add_t"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_columns_without_an_entry_keep_their_sign_of_zero(call, dtype):
    """Also those that share a vector with one that has an entry."""
    y = torch.full((20, 40), -0.0).to(dtype)
    index = torch.tensor([[3], [3]], dtype=torch.int32)
    getattr(sparse_cpu, call)(y, torch.ones(20, 40).to(dtype), torch.ones(1), index)
    assert (y[:, 3] == 1).all()
    y[:, 3] = -0.0
    assert same_bits(y, torch.full((20, 40), -0.0).to(dtype))


@pytest.mark.parametrize("name", ["grad", "add", "add_t"])
@pytest.mark.parametrize("shape", [(1000, 700, 300, 0.003), (70, 560, 500, 1.0), (4096, 40, 50, 0.05)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_equal_bits_with_any_number_of_threads(name, shape, dtype):
    t, i, o, density = shape
    x, dz, index = strided(t, i, dtype), strided(t, o, dtype), support(o, i, density)
    values, results = torch.randn(index.shape[1]), []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        if name == "grad":
            results.append(sparse_cpu.grad(dz, x, index))
        else:
            to, by = (dz.clone(), x) if name == "add" else (x.clone(), dz)
            getattr(sparse_cpu, name)(to, by, values, index)
            results.append(to)
    assert all(same_bits(results[0], other) for other in results[1:])


@weights
def test_copy(shape, dtype):
    o, i, density = shape
    index = support(o, i, density)
    values = torch.randn(index.shape[1])
    for W in (strided(o, i, dtype), torch.randn(o, i).to(dtype)):
        before = W.clone()
        want = W.clone()
        want[index[0].long(), index[1].long()] = (picked(W, index).float() + values).to(dtype)
        for out in (strided(o, i, dtype), torch.empty(o, i, dtype=dtype)):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert sparse_cpu.copy(W, values, index, out) is out
                assert same_bits(out, want)
                out.fill_(7)
        assert same_bits(W, before)
        assert sparse_cpu.copy(W, values, index, W) is W and same_bits(W, want)


@weights
def test_put_and_restore(shape, dtype):
    """The entries and nothing beside them; afterwards every bit is back, of NaN, infinity and -0 too."""
    o, i, density = shape
    index = support(o, i, density)
    values = torch.randn(index.shape[1])
    store = torch.randn(o, i + 5).to(dtype)
    store.view(-1)[::3] = torch.tensor(-0.0)
    bits = store.view(torch.int32 if dtype is F32 else torch.int16).view(-1)
    bits[1::7] = 0x7FC12345 if dtype is F32 else 0x7FC5  # a NaN with a payload
    bits[2::7] = -1  # and one with all bits set
    store.view(-1)[4::11] = torch.inf
    before, W = store.clone(), store[:, 2 : 2 + i]
    version = W._version
    for threads in (1, 2):
        torch.set_num_threads(threads)
        saved = sparse_cpu.put(W, values, index)
        assert same_bits(saved, picked(before[:, 2 : 2 + i], index))
        changed = before.clone()
        changed[:, 2 : 2 + i][index[0].long(), index[1].long()] = (saved.float() + values).to(dtype)
        assert torch.equal(store.nan_to_num(3.0), changed.nan_to_num(3.0)) and torch.equal(store.isnan(), changed.isnan())
        assert index.shape[1] == 0 or not same_bits(store, before)
        sparse_cpu.restore(W, index, saved)
        assert same_bits(store, before)
    assert W._version == version


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype):
    """x of all numbers but NaN, subnormal ones too: times one, plus one, and rounded to either type."""
    all_bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = all_bits[~all_bits.isnan()][:, None].contiguous()
    index = torch.zeros(2, 1, dtype=torch.int32)
    for to in (F32, BF16, F16):
        for start in (0.0, 1.0):
            y = torch.full((x.shape[0], 16), start).to(to)
            want = (y.float() + x.float() * (torch.arange(16) == 0)).to(to)
            want[:, 1:] = y[:, 1:]
            sparse_cpu.add(y, x, torch.ones(1), index)
            assert torch.equal(y, want)


def test_nan_and_inf_reach_the_entries_they_meet_and_no_other():
    x, dz = torch.zeros(40, 33), torch.ones(40, 20)
    x[7, 5], x[9, 6] = torch.nan, torch.inf
    index = torch.tensor([[0, 0, 0, 19], [5, 6, 7, 5]], dtype=torch.int32)
    got = sparse_cpu.grad(dz, x, index)
    assert got.isnan().tolist() == [True, False, False, True] and got[1].isinf() and got[2] == 0
    y = torch.zeros(40, 20)
    sparse_cpu.add(y, x, torch.ones(4), index)
    assert y.isnan().nonzero().tolist() == [[7, 0], [7, 19]] and y[9, 0].isinf()


@pytest.mark.parametrize("at", [(0, 0), (34, 40), (17, 3)])
def test_one_entry(at):
    x, dz, index = torch.randn(37, 41), torch.randn(37, 35), torch.tensor(at, dtype=torch.int32)[:, None].contiguous()
    want, plain = ((dz[:, at[0]].to(d) * x[:, at[1]].to(d)).sum()[None] for d in (F64, F32))
    assert_as_good(sparse_cpu.grad(dz, x, index), want, plain, "dvalue")


def test_no_entries_and_no_tokens():
    none, some = torch.empty(2, 0, dtype=torch.int32), torch.tensor([[1, 2], [0, 3]], dtype=torch.int32)
    x, y, values = torch.randn(9, 5), torch.randn(9, 4), torch.randn(2)
    before = y.clone()
    assert sparse_cpu.grad(y, x, none).shape == (0,)
    sparse_cpu.add(y, x, values[:0], none)
    sparse_cpu.add_t(x, y, values[:0], none)
    assert torch.equal(y, before)
    assert sparse_cpu.put(y, values[:0], none).shape == (0,)
    sparse_cpu.restore(y, none, y.new_empty(0))
    assert torch.equal(sparse_cpu.grad(y[:0], x[:0], some), torch.zeros(2))
    sparse_cpu.add(y[:0], x[:0], values, some)
    assert sparse_cpu.copy(y[:0], values[:0], none, torch.empty(0, 4)).shape == (0, 4)


def test_rows_that_do_not_lie_in_columns_are_copied_first():
    x, dz, index = torch.randn(41, 37).T, torch.ones(()).expand(37, 35), support(35, 41, 0.2)
    want, plain = (picked(dz.to(d).T @ x.to(d), index) for d in (F64, F32))
    assert_as_good(sparse_cpu.grad(dz, x, index), want, plain, "dvalues")


BAD_INDEX = {
    "row": [[0, 4], [0, 1]],
    "column": [[0, 1], [0, 5]],
    "negative row": [[-1, 1], [0, 1]],
    "negative column": [[0, 1], [-1, 1]],
    "order of rows": [[2, 1], [0, 1]],
    "order of columns": [[1, 1], [3, 1]],
    "repetition": [[1, 1], [3, 3]],
}


@pytest.mark.parametrize("bad", BAD_INDEX)
def test_an_index_that_does_not_fit_changes_nothing(bad):
    index, values = torch.tensor(BAD_INDEX[bad], dtype=torch.int32), torch.ones(2)
    x, y, W = torch.zeros(6, 5), torch.zeros(6, 4), torch.zeros(4, 5)
    calls = (
        lambda: sparse_cpu.grad(y, x, index),
        lambda: sparse_cpu.add(y, x, values, index),
        lambda: sparse_cpu.add_t(x, y, values, index),
        lambda: sparse_cpu.copy(W, values, index, W.clone()),
        lambda: sparse_cpu.put(W, values, index),
        lambda: sparse_cpu.restore(W, index, values),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"row-major order, none twice; sort it"):
            call()
    assert not any(m.any() for m in (x, y, W))


def test_arguments_that_do_not_fit_are_refused():
    index, values = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32), torch.ones(2)
    x, y, W = torch.zeros(6, 5), torch.zeros(6, 4), torch.zeros(4, 5)
    calls = {
        "different numbers of tokens": lambda: sparse_cpu.grad(y[:3], x, index),
        "index is .* in torch.int64": lambda: sparse_cpu.grad(y, x, index.long()),
        r"index is \(3, 2\)": lambda: sparse_cpu.grad(y, x, torch.zeros(3, 2, dtype=torch.int32)),
        "index is .* with strides": lambda: sparse_cpu.grad(y, x, torch.zeros(5, 2, dtype=torch.int32).T),
        "x is .* in torch.float64": lambda: sparse_cpu.grad(y, x.double(), index),
        r"dz is \(4,\)": lambda: sparse_cpu.grad(y[0], x, index),
        r"got \(1,\)": lambda: sparse_cpu.put(W, values[:1], index),
        "got .* in torch.bfloat16": lambda: sparse_cpu.put(W, values.bfloat16(), index),
        "for 2 entries": lambda: sparse_cpu.restore(W, index, values.bfloat16()),
        "W has strides": lambda: sparse_cpu.put(torch.zeros(5, 4).T, values, index),
        "added to has strides": lambda: sparse_cpu.add(torch.zeros(4, 6).T, x, values, index),
        r"out is \(3, 5\)": lambda: sparse_cpu.copy(W, values, index, W[:3].clone()),
        "shares memory with W": lambda: sparse_cpu.copy(W[::2], values, index, W[:2]),
        "out is .* in torch.float16": lambda: sparse_cpu.copy(W, values, index, W.half()),
    }
    for match, call in calls.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_runs(monkeypatch):
    x = torch.randn(6, 5)
    assert sparse_cpu.runs(x) and sparse_cpu.runs(x.half()) and sparse_cpu.runs(x[:, 1:3])
    assert not sparse_cpu.runs(x.double()) and not sparse_cpu.runs(x.T) and not sparse_cpu.runs(x.to("meta"))
    monkeypatch.setenv("FASTPEFT_IMPL", "torch")
    assert not sparse_cpu.runs(x)


def test_opcheck_of_every_operator():
    index, values = torch.tensor([[0, 1, 3], [4, 0, 1]], dtype=torch.int32), torch.randn(3)
    x, y, W = torch.randn(9, 5), torch.randn(9, 4), torch.randn(4, 5)
    calls = {
        "cpu_sparse_grad": (y, x, index),
        "cpu_sparse_copy": (W, values, index, W.clone()),
        "cpu_sparse_put": (W.clone(), values, index),
        "cpu_sparse_restore": (W.clone(), index, values),
        "cpu_sparse_add": (y, x, values, index),
        "cpu_sparse_add_t": (x, y, values, index),
    }
    assert set(calls) == {schema.partition("(")[0] for schema, _, _ in sparse_cpu._OPERATORS}
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, arguments)


def test_a_subclass_sees_the_call():
    class Seen(torch.Tensor):
        pass

    index, x, dz = torch.tensor([[0], [0]], dtype=torch.int32), torch.randn(3, 5), torch.randn(3, 4)
    assert type(sparse_cpu.grad(dz, x.as_subclass(Seen), index)) is Seen


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="no g++ or nm on the path")
def test_a_file_for_one_instruction_set_shares_no_symbol(tmp_path):
    """Else the linker may keep its copy of a shared function, which other processors cannot run."""
    isa = sparse_cpu._EXTENSION.build_info()["isa"]
    flags = re.search(rf'"_{isa}": "([^"]*)"', (ROOT / "setup.py").read_text()).group(1).split()
    out = tmp_path / "one.o"
    command = ["g++", "-std=c++17", "-O1", "-fno-inline", *flags, "-c", str(ROOT / f"csrc/sparse/sparse_{isa}.cpp"), "-o", str(out)]
    subprocess.run(command, check=True)
    listing = subprocess.run(["nm", "-C", str(out)], check=True, capture_output=True, text=True).stdout
    # W, V, u: symbols that the linker merges with another object's (DW.ref is a pointer, not code); T: what this file gives
    shared = [line for line in listing.splitlines() if re.search(r" [WVu] (?!DW\.ref\.)", line)]
    assert shared == []
    given = [line.split(" T ")[1] for line in listing.splitlines() if " T " in line]
    assert given == [f"fastpeft::{isa}::sparse_functions()"]
