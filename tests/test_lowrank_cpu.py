"""The low-rank products in C++ against fp64, no worse than plain PyTorch in the same dtype; and what their build may not hold."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import checks
import pytest
import torch
from tolerance import assert_as_good

import fastpeft
from fastpeft.ops import lowrank, lowrank_cpu, small
from fastpeft.ops.rownorm import row_gain, row_sq_norm
from fastpeft.terms import Gain, LowRank

ROOT = Path(__file__).resolve().parents[1]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
SCALE = 0.37

pytestmark = pytest.mark.skipif(not lowrank_cpu._BUILT, reason="fastpeft._C was built without the low-rank products")

# tokens, in, out, blocks, rank: ragged, multiples of 32 columns (bfloat16 products), wider than a tile and than a cached piece, blocks at no multiple of a vector
SHAPES = [(33, 40, 35, 1, 5), (67, 64, 96, 1, 13), (70, 128, 192, 2, 8), (70, 300, 270, 2, 16), (9, 39, 36, 3, 4), (131, 600, 1100, 1, 7), (5, 16, 8, 1, 1)]
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)]
cases = pytest.mark.parametrize(
    ("shape", "dtypes", "p"), list(itertools.product(SHAPES, DTYPES, (0.0, 0.3))), ids=lambda v: str(v).replace("torch.", "")
)


@pytest.fixture(autouse=True, params=["avx2", "avx512"])
def everything_in_cpp(monkeypatch, request):
    """Each instruction set, whatever the size."""
    own = lowrank_cpu._EXTENSION.build_info()["isa"]
    if not lowrank_cpu._EXTENSION.isa_use(request.param):
        pytest.skip(f"this processor has no {request.param}")
    request.addfinalizer(lambda: lowrank_cpu._EXTENSION.isa_use(own))
    monkeypatch.setattr(lowrank_cpu, "SMALL", 0)
    torch.set_num_threads(2)


class Problem:
    def __init__(self, shape, dtypes, p):
        torch.manual_seed(0)
        t, i, o, n, r = shape
        self.dtype, factor = dtypes
        self.n = n
        # rows of a wider matrix: the stride of rows is not the number of columns
        self.x, self.dz, self.z = (torch.randn(t, c + 3).to(self.dtype)[:, 1 : 1 + c] for c in (i, o, o))
        self.u, self.v = (torch.randn(t, n * r).to(self.dtype) for _ in range(2))
        self.A, self.B = torch.randn(n, r, i // n).to(factor), torch.randn(n, o // n, r).to(factor)
        if n == 1:
            self.A, self.B = self.A[0], self.B[0]
        self.gain, self.bias = (torch.randn(o).to(factor) for _ in range(2))
        self.mask = fastpeft.dropout_mask(SEED, (t, i), p)
        self.how = dict(seed=SEED if p else None, p=p, blocks=n)
        self.wide = torch.promote_types(factor, self.dtype)

    def check(self, got, formula, dtype, name, **tensors):
        want, plain = (formula(**{k: v.to(d) for k, v in tensors.items()}) for d in (torch.float64, dtype))
        assert_as_good(got, want, plain, name)


def dense(m):
    return m if m.dim() == 2 else torch.block_diag(*m)


def gradient(like, left, right):
    """left^T right of a factor's shape: block k of the columns of both."""
    if like.dim() == 2:
        return left.T @ right
    n = like.shape[0]
    return torch.stack([a.T @ b for a, b in zip(left.chunk(n, 1), right.chunk(n, 1), strict=True)])


@pytest.fixture
def counted(monkeypatch):
    """Calls of the C++ operators: a test of a fallback would prove nothing."""
    calls = []
    for name in ("read", "write", "write_gain", "fresh", "scale_columns", "norm", "inverse_norm"):
        real = getattr(lowrank_cpu, name)
        monkeypatch.setattr(lowrank_cpu, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    return calls


@cases
def test_down_and_da(shape, dtypes, p, counted):
    m = Problem(shape, dtypes, p)
    u, dA = lowrank.down(m.x, m.A, m.dtype, **m.how), lowrank.da(m.x, m.u, m.A, **m.how)
    assert counted == ["read", "read"]
    m.check(u, lambda x, k, A: (x * k) @ A.T, m.dtype, "u", x=m.x, k=m.mask, A=dense(m.A))
    m.check(dA, lambda x, k, u: gradient(m.A, u, x * k), m.wide, "dA", x=m.x, k=m.mask, u=m.u)
    assert dA.shape == m.A.shape and dA.dtype == m.A.dtype


@cases
def test_dx(shape, dtypes, p, counted):
    m = Problem(shape, dtypes, p)
    dx, added = lowrank.dx(m.u, m.A, **m.how), m.x.clone()
    lowrank.dx_add(added, m.u, m.A, **m.how)
    assert counted == (["fresh", "write"] if p or m.n > 1 else [])  # elsewhere BLAS is as quick
    m.check(dx, lambda u, k, A: k * (u @ A), m.dtype, "dx", u=m.u, k=m.mask, A=dense(m.A))
    m.check(added, lambda x, u, k, A: x + k * (u @ A), m.dtype, "dx", x=m.x, u=m.u, k=m.mask, A=dense(m.A))


@pytest.mark.parametrize(("shape", "dtypes"), list(itertools.product(SHAPES, DTYPES)))
def test_up(shape, dtypes, counted, monkeypatch):
    monkeypatch.setattr(lowrank_cpu, "writes", lambda *a: True)
    monkeypatch.setattr(lowrank_cpu, "gains", lambda *a: True)
    m = Problem(shape, dtypes, 0.0)
    formula = lambda v, B, b: SCALE * (v @ B.T) + b  # noqa: E731
    m.check(lowrank.up(m.v, m.B, SCALE, m.n, m.bias), formula, m.dtype, "z", v=m.v, B=dense(m.B), b=m.bias)
    m.check(lowrank.up(m.v, m.B, SCALE, m.n, None), formula, m.dtype, "z", v=m.v, B=dense(m.B), b=0 * m.bias)
    z = m.z.clone()
    lowrank.up_add(z, m.v, m.B, SCALE, m.n)
    m.check(z, lambda z, v, B: z + SCALE * (v @ B.T), m.dtype, "z", z=m.z, v=m.v, B=dense(m.B))
    for bias in (m.bias, None):
        z = m.z.clone()
        y = lowrank.up_add_gain(z, m.v, m.B, SCALE, m.n, m.gain, bias)
        b = 0 * m.bias if bias is None else bias
        m.check(z, lambda z, v, B: z + SCALE * (v @ B.T), m.dtype, "z", z=m.z, v=m.v, B=dense(m.B))
        m.check(y, lambda z, v, B, g, b: g * (z + SCALE * (v @ B.T)) + b, m.dtype, "y", z=m.z, v=m.v, B=dense(m.B), g=m.gain, b=b)
        m.check(lowrank_cpu.scale_columns(m.z, m.gain, bias), lambda z, g, b: g * z + b, m.dtype, "gz", z=m.z, g=m.gain, b=b)
    assert set(counted) == {"fresh", "write", "write_gain", "scale_columns"}


@pytest.mark.parametrize(("shape", "dtypes"), list(itertools.product(SHAPES, DTYPES)))
def test_du_db(shape, dtypes, counted):
    m = Problem(shape, dtypes, 0.0)
    du, dB = lowrank.du_db(m.dz, m.v, m.B, SCALE, m.n, need_du=True, need_db=True)
    m.check(du, lambda dz, B: SCALE * (dz @ B), m.dtype, "du", dz=m.dz, B=dense(m.B))
    m.check(dB, lambda dz, v: SCALE * gradient(m.B, dz, v), m.wide, "dB", dz=m.dz, v=m.v)
    assert dB.shape == m.B.shape and dB.dtype == m.B.dtype
    dy, du, dB, dg = lowrank.du_db_gain(
        m.dz, m.z, m.v, m.B, SCALE, m.n, m.gain, need_du=True, need_db=True, need_dgain=True
    )
    assert dy is m.dz and counted == ["read", "read"]
    m.check(du, lambda dy, g, B: SCALE * ((dy * g) @ B), m.dtype, "du g", dy=m.dz, g=m.gain, B=dense(m.B))
    m.check(dB, lambda dy, g, v: SCALE * gradient(m.B, dy * g, v), m.wide, "dB g", dy=m.dz, g=m.gain, v=m.v)
    m.check(dg, lambda dy, z: torch.einsum("to,to->o", dy, z), m.wide, "dgain", dy=m.dz, z=m.z)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("o", "i", "r"), [(35, 40, 5), (270, 700, 16), (3, 7, 1)])
def test_norm(dtype, o, i, r, counted):
    W, A, B = torch.randn(o, i + 2).to(dtype)[:, 1 : i + 1], torch.randn(r, i), torch.randn(o, r)
    want, plain = (((W.to(d) + B.to(d) @ A.to(d)) ** 2).sum(1) for d in (torch.float64, F32))
    assert_as_good(row_sq_norm(W, A, B), want, plain, "norm")
    assert counted == ["norm"]


def test_row_gain(counted):
    """Also of a row of zeros, in forward and backward."""
    W, A, B, m = torch.randn(35, 40), torch.randn(5, 40), torch.randn(35, 5), torch.randn(35)
    W[3], B[3] = 0, 0
    leaves = [t.requires_grad_() for t in (m, A, B)]
    for through in (False, True):
        got = row_gain(m, W, A, B, SCALE, through)
        grads = torch.autograd.grad(got, leaves if through else [m], torch.ones(35))
        truth = []
        for dtype in (torch.float64, F32):
            own = [t.detach().to(dtype).requires_grad_() for t in leaves]
            norm = (W.to(dtype) + SCALE * (own[2] @ own[1]))[torch.arange(35) != 3].norm(dim=1)
            g = torch.ones(35, dtype=dtype)
            g = g.index_copy(0, torch.arange(35)[torch.arange(35) != 3], own[0][torch.arange(35) != 3] / (norm if through else norm.detach()))
            truth.append([g, *torch.autograd.grad(g, own if through else own[:1], torch.ones(35, dtype=dtype))])
        for k, (a, want, plain) in enumerate(zip((got, *grads), *truth, strict=True)):
            assert_as_good(a.detach(), want.detach(), plain.detach(), f"result {k}")
    assert counted == ["inverse_norm", "inverse_norm"]


def test_a_row_that_nearly_cancels():
    A, B = torch.randn(8, 300), torch.randn(70, 8)
    W = (-(B.double() @ A.double()) * (1 - 1e-3)).float()
    want, plain = (((W.to(d) + B.to(d) @ A.to(d)) ** 2).sum(1) for d in (torch.float64, F32))
    assert_as_good(row_sq_norm(W, A, B), want, plain, "norm")


def test_the_mask_is_that_of_dropout_mask():
    """Bit for bit: x of ones and a factor that picks out single columns."""
    t, c, p = 37, 83, 0.4
    u = lowrank.down(torch.ones(t, c), torch.eye(c), F32, seed=SEED, p=p, blocks=1)
    want = fastpeft.dropout_mask(SEED, (t, c), p).float()
    assert torch.equal(u, want)
    assert torch.equal(lowrank.dx(torch.ones(t, 1), torch.ones(1, c), seed=SEED, p=p, blocks=1), want)


def test_nan_and_inf_pass():
    x = torch.full((4, 16), float("inf"))
    assert lowrank.down(x, torch.ones(1, 16), F32, seed=SEED, p=0.5, blocks=1).isnan().all()
    assert lowrank.down(x, torch.ones(1, 16), F32, seed=None, p=0.0, blocks=1).isinf().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_equal_bits_on_every_run(threads):
    m = Problem((400, 300, 270, 2, 16), (BF16, F32), 0.3)
    torch.set_num_threads(threads)

    def run():
        dA = lowrank.da(m.x, m.u, m.A, **m.how)
        return [dA, *lowrank.du_db_gain(m.dz, m.z, m.v, m.B, 1.0, 2, m.gain, need_du=True, need_db=True, need_dgain=True)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 5])
def test_no_tokens(n):
    m = Problem((0, 40, 35, n, 3), (F32, F32), 0.3)
    assert not lowrank.da(m.x, m.u, m.A, **m.how).any()
    assert lowrank.dx(m.u, m.A, **m.how).shape == (0, 40)
    du, dB = lowrank.du_db(m.dz, m.v, m.B, SCALE, n, need_du=True, need_db=True)
    assert du.shape == (0, 3 * n) and not dB.any()


def test_layers_equal_fp64():
    """Whole layers in fp32 through the seam, every term, with and without dropout."""
    for p, method in itertools.product((0.0, 0.4), ("lora", "dora", "melora")):
        torch.manual_seed(3)
        small = fastpeft.AdaptedLinear(48, 40, method=method, rank=4, dropout=p)
        checks.perturb(small)
        wide = fastpeft.AdaptedLinear(48, 40, method=method, rank=4, dropout=p, dtype=torch.float64)
        wide.load_state_dict({k: v.double() for k, v in small.state_dict().items()})
        plain = fastpeft.AdaptedLinear(48, 40, method=method, rank=4, dropout=p)
        plain.load_state_dict(small.state_dict())
        x, d, results = torch.randn(65, 48), torch.randn(65, 40), []
        for layer, dtype, floor in ((small, F32, 0), (wide, torch.float64, 0), (plain, F32, 1 << 60)):
            lowrank_cpu.SMALL = floor
            torch.manual_seed(9)
            xs = x.to(dtype).requires_grad_()
            y = layer(xs)
            own = [q for q in layer.parameters() if q.requires_grad]
            results.append([y.detach(), *torch.autograd.grad(y, [xs, *own], d.to(dtype))])
        for k, (got, want, reference) in enumerate(zip(*results, strict=True)):
            assert_as_good(got, want, reference, f"{method} p={p} result {k}")


@pytest.mark.parametrize("lead", [(1,), (4,), (2, 5), (3, 1, 7)], ids=str)
@pytest.mark.parametrize("bias", [None, "frozen", "trains"])
@pytest.mark.parametrize("gain", [None, "plain", "over"])
@pytest.mark.parametrize(("i", "o", "r"), [(40, 35, 5), (64, 64, 8), (7, 30, 2)])
def test_a_small_layer_in_one_call(lead, bias, gain, i, o, r, monkeypatch):
    """As good as the composition that a user would write, in every part; also with an x that needs no gradient."""
    calls = []
    real = small.Small.apply
    monkeypatch.setattr(small.Small, "apply", lambda *a: (calls.append(1), real(*a))[1])
    names = ["x", "A", "B"] + (["b"] if bias == "trains" else []) + (["g"] if gain else [])
    torch.manual_seed(0)
    made = {"x": torch.randn(*lead, i), "A": torch.randn(r, i), "B": torch.randn(o, r), "b": torch.randn(o), "g": torch.randn(o)}
    W, d = torch.randn(o, i), torch.randn(*lead, o)
    if r == 2:
        W[1], made["B"][1] = 0, 0  # a row of norm zero

    def run(dtype, ours):
        t = {n: v.to(dtype).requires_grad_(n in names) for n, v in made.items()}
        w, b = W.to(dtype), t["b"] if bias else None
        if ours:
            low = LowRank(t["A"], t["B"], SCALE)
            terms = [low] + ([Gain(t["g"], over=low if gain == "over" else None)] if gain else [])
            y = fastpeft.adapted_linear(t["x"], w, b, terms)
        else:
            y = t["x"] @ w.T + SCALE * ((t["x"] @ t["A"].T) @ t["B"].T)
            if gain:
                norm = (w + SCALE * (t["B"] @ t["A"])).norm(dim=1).detach()
                g = torch.where(norm == 0, torch.ones_like(norm), t["g"] / torch.where(norm == 0, 1, norm))
                y = y * (g if gain == "over" else t["g"])
            y = y if b is None else y + b
        return [y.detach(), *torch.autograd.grad(y, [t[n] for n in names], d.to(dtype))]

    for name, got, want, plain in zip(["y", *names], run(F32, True), run(torch.float64, False), run(F32, False), strict=True):
        assert_as_good(got, want, plain, name)
    names.remove("x")
    for name, got, want, plain in zip(["y", *names], run(F32, True), run(torch.float64, False), run(F32, False), strict=True):
        assert_as_good(got, want, plain, name)
    assert len(calls) == 2


def test_a_small_layer_keeps_nothing_that_nobody_reads():
    """With a frozen A x is not kept, as on a large layer."""
    x, W, A, B = torch.randn(4, 64, requires_grad=True), torch.randn(64, 64), torch.randn(8, 64), torch.randn(64, 8)
    assert small.takes(x, W, A.requires_grad_(), B.requires_grad_(), None, None)
    assert not small.takes(x, W, A.detach(), B, None, None) and not small.takes(x, W, A, B.detach(), None, None)
    with torch.no_grad():
        assert small.takes(x, W, A.detach(), B, None, None)


def test_opcheck_of_every_operator():
    x, z, u, f, up = torch.randn(9, 16), torch.randn(9, 16), torch.randn(9, 6), torch.randn(2, 3, 8), torch.randn(2, 8, 3)
    g, W, A, B = torch.randn(16), torch.randn(5, 16), torch.randn(3, 16), torch.randn(5, 3)
    calls = {
        "cpu_lowrank_read": (x, up, F32, True, 0.5, g, True, u, SEED, 0.3, z),
        "cpu_lowrank_write": (z, u, f, False, 0.5, SEED, 0.3),
        "cpu_lowrank_write_gain": (z, u, up, 0.5, g, None),
        "cpu_lowrank_scale": (z, g, g.clone()),
        "cpu_lowrank_fresh": (u, f, False, 1.0, g, SEED, 0.3),
        "cpu_lowrank_norm": (W, A, B, 0.5),
        "cpu_lowrank_inverse_norm": (W, A, B, 0.5),
    }
    assert set(calls) == {schema.partition("(")[0] for schema, _, _ in lowrank_cpu._OPERATORS}
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, arguments)


def test_torch_alone_when_asked(monkeypatch, counted):
    monkeypatch.setenv("FASTPEFT_IMPL", "torch")
    m = Problem(SHAPES[1], DTYPES[0], 0.3)
    lowrank.down(m.x, m.A, m.dtype, **m.how)
    assert counted == []


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="no g++ or nm on the path")
def test_a_file_for_one_instruction_set_shares_no_symbol(tmp_path):
    """Else the linker may keep its copy of a shared function, which other processors cannot run."""
    isa = lowrank_cpu._EXTENSION.build_info()["isa"]
    flags = re.search(rf'"_{isa}": "([^"]*)"', (ROOT / "setup.py").read_text()).group(1).split()
    out = tmp_path / "one.o"
    command = ["g++", "-std=c++17", "-O1", "-fno-inline", *flags, "-c", str(ROOT / f"csrc/lowrank_{isa}.cpp"), "-o", str(out)]
    subprocess.run(command, check=True)
    listing = subprocess.run(["nm", "-C", str(out)], check=True, capture_output=True, text=True).stdout
    # W, V, u: symbols that the linker merges with another object's (DW.ref is a pointer, not code); T: what this file gives
    shared = [line for line in listing.splitlines() if re.search(r" [WVu] (?!DW\.ref\.)", line)]
    assert shared == []
    given = [line.split(" T ")[1] for line in listing.splitlines() if " T " in line]
    assert given == [f"fastpeft::{isa}::functions()"]
