"""bitsandbytes' layers as bases: codes, dense weights and gradients to its own bit; and what it may not be asked."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from checks import rand
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft.integrations.bitsandbytes import base_of
from fastpeft.ops import int8, nf4
from fastpeft.ops.nf4 import Nested, Packed
from fastpeft.packed import kind_of
from fastpeft.quantised import NF4, Int8
from fastpeft.terms import Dense, Gain, LowRank, Sparse

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)


def four_bits(i=128, o=64, dtype=F32, bias=True, **options):
    """A quantised Linear4bit; NF4 unless told."""
    layer = bnb.nn.Linear4bit(i, o, bias=bias, **{"quant_type": "nf4", "compute_dtype": dtype} | options)
    layer.load_state_dict(nn.Linear(i, o, bias=bias).state_dict())
    return layer.to("cpu")


def eight_bits(i=128, o=64, bias=False):
    layer = bnb.nn.Linear8bitLt(i, o, bias=bias, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(i, o, bias=bias).state_dict())
    return layer.to("cpu")


def test_its_tables():
    assert torch.equal(nf4.levels(4), functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_codes_and_scales(dtype, block):
    """Among the numbers: a block of zeros, exact midpoints of two levels, subnormal ones."""
    W = torch.randn(128, 96)
    W.view(-1)[:block] = 0
    middle = (nf4.levels(4)[1:] + nf4.levels(4)[:-1]) / 2
    W.view(-1)[block : block + 15], W.view(-1)[block + 15] = middle, 1.0
    W.view(-1)[block + 16 : 2 * block].clamp_(-1, 1)
    W.view(-1)[2 * block : 3 * block] *= 1e-39
    W = W.to(dtype)
    codes, state = functional.quantize_4bit(W, blocksize=block, quant_type="nf4")
    own, absmax = nf4.quantise(W, 4, block)
    assert torch.equal(own, codes.view(-1)) and torch.equal(absmax, state.absmax)


def packed_of(codes, state):
    nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if state.nested else None
    return Packed(codes.view(-1), state.absmax, 4, state.blocksize, state.code, nested)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_cpu_kernel_and_ours(dtype, kind, nested):
    """Rows of whole blocks: elsewhere bitsandbytes 0.50.2's AVX-512 kernel takes scales of other blocks."""
    for shape, block in (((128, 256), 64), ((40, 32), 32), ((33, 1024), 1024)):
        codes, state = functional.quantize_4bit(torch.randn(shape).to(dtype), None, None, block, nested, kind)
        want, packed = functional.dequantize_4bit(codes, state), packed_of(codes, state)
        assert torch.equal(nf4.dequantise(packed, *shape, dtype), want)
        got = torch.empty(shape, dtype=dtype)
        nf4.fill_torch(got, packed)
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_reference_where_blocks_pass_the_end_of_a_row(dtype, kind):
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    compute = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    for shape, block in (((128, 96), 64), ((7, 18), 32), ((64, 40), 64)):
        codes, state = functional.quantize_4bit(torch.randn(shape).to(dtype), blocksize=block, quant_type=kind)
        want = compute(codes.view(-1), state.absmax, state.code, block, shape, dtype)
        assert torch.equal(nf4.dequantise(packed_of(codes, state), *shape, dtype), want)


@pytest.mark.parametrize("storage", [torch.uint8, BF16, F32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_base_of_a_four_bit_layer(kind, nested, storage):
    for dtype in DTYPES:
        layer = four_bits(dtype=dtype, quant_type=kind, compress_statistics=nested, quant_storage=storage)
        base = base_of(layer)
        assert (kind_of(type(layer)), type(base), base.dtype, base.shape) == ("Linear4bit", NF4, dtype, (64, 128))
        # its weight was fp32, so that is what it gives
        assert torch.equal(base.weight(), functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype))
        assert base.codes.data_ptr() == layer.weight.data.data_ptr()


def test_the_dtype_of_a_four_bit_layer():
    assert base_of(four_bits(dtype=None)).dtype is F32  # that its weight had
    assert base_of(four_bits(dtype=BF16), F16).dtype is F16
    half = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to(BF16).to("cpu")
    assert base_of(half).dtype is BF16


def test_the_base_of_an_int8_layer():
    layer = eight_bits()
    base = base_of(layer)
    assert (kind_of(type(layer)), type(base), base.dtype) == ("Linear8bitLt", Int8, F16)
    assert base_of(eight_bits(bias=True)).dtype is F32 and base_of(layer, BF16).dtype is BF16
    W = base.dense(F32)
    for dtype in DTYPES:
        # in training on a CPU it multiplies by its dense weight: by the identity, that is what comes out
        y = layer.train()(torch.eye(128, dtype=dtype))
        assert torch.equal(base_of(layer, dtype).dense(dtype), y.T)  # now the scales are the state's
    assert torch.equal(base_of(layer, F32).dense(F32), base_of(copy.deepcopy(layer), F32).dense(F32))
    # its other function multiplies twice
    other = functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
    exact = layer.weight.data.double() * layer.state.SCB.double()[:, None] / 127
    assert_as_good(base_of(layer, F32).dense(F32), exact, other)
    assert not torch.equal(W, base_of(layer, F32).dense(F32))  # W was rounded to fp16


def test_its_int8_codes():
    W = torch.randn(64, 128).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(W)
    own, scales = int8.quantise(W)
    assert torch.equal(own, codes) and torch.equal(scales, absmax)


def terms_for(base, which):
    torch.manual_seed(1)
    o, i = base.out_features, base.in_features
    low = LowRank(torch.randn(4, i).requires_grad_(), torch.randn(o, 4).requires_grad_(), 0.5)
    match which:
        case "lora":
            return [low], [low.A, low.B]
        case "dora":
            g = torch.rand(o).requires_grad_()
            return [low, Gain(g, over=low)], [low.A, low.B, g]
        case "sparse":
            index = torch.nonzero(torch.rand(o, i) < 0.05).T.to(torch.int32).contiguous()
            values = torch.randn(index.shape[1]).requires_grad_()
            return [Sparse(values, index)], [values]
        case _:
            delta = torch.randn(o, i).requires_grad_()
            return [Dense(delta)], [delta]


@pytest.mark.parametrize("which", ["lora", "dora", "sparse", "dense"])
@pytest.mark.parametrize("make", [four_bits, eight_bits])
def test_adapters_over_its_layers(make, which):
    """Against the same terms over the dense weight that bitsandbytes gives."""
    layer = make()
    if make is eight_bits:
        base, W = base_of(layer, F32), layer.train()(torch.eye(128)).T.detach().contiguous()
    else:
        base, W = base_of(layer), functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(512, 128).requires_grad_()  # too many for the small call, which a dense weight would take
    results = []
    for b in (base, W):
        terms, leaves = terms_for(base, which)
        y = fastpeft.adapted_linear(x, b, layer.bias, terms)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *leaves])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # and without an adapter it is the layer itself
    if make is four_bits:
        layer.train()
        assert torch.equal(base.forward(x.detach(), layer.bias), layer(x.detach().requires_grad_()).detach())


@pytest.mark.parametrize("make", [lambda: four_bits(compress_statistics=True), lambda: four_bits(compress_statistics=False), eight_bits])
def test_compiled(make):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = make()
            self.A, self.B = (nn.Parameter(rand(*shape)) for shape in ((4, 128), (64, 4)))

        def forward(self, x):
            base = base_of(self.linear, torch.float64)
            return fastpeft.adapted_linear(x, base, None, [LowRank(self.A, self.B)])

    model, x = Adapted(), rand(5, 128)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, model.A, model.B])])
    for a, b in zip(*results, strict=True):
        assert_fp64(a, b)


def test_what_it_refuses():
    with pytest.raises(TypeError, match="got Linear; it takes a Linear4bit or Linear8bitLt"):
        base_of(nn.Linear(4, 4))
    assert kind_of(nn.Linear) is None
    with pytest.raises(ValueError, match="this Linear4bit is not quantised"):
        base_of(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    with pytest.raises(ValueError, match="this Linear8bitLt is not quantised"):
        base_of(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True))
    with pytest.raises(ValueError, match=r"quantised as \(128, 64\), the layer is \[out, in\] = \(64, 128\)"):
        layer = four_bits()
        layer.weight.quant_state.shape = torch.Size((128, 64))
        base_of(layer)


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="bitsandbytes repacks weights for AVX-512 BF16 only")
def test_a_weight_that_it_repacked_is_refused():
    layer = four_bits(dtype=BF16).eval()
    with torch.no_grad():
        layer(torch.randn(3, 128, dtype=BF16))
    with pytest.raises(ValueError, match=r"used in eval mode on a CPU.*load the model again"):
        base_of(layer)


def test_it_is_not_imported_by_us():
    code = """
        import sys
        import torch
        import fastpeft
        import fastpeft.integrations.bitsandbytes
        from fastpeft.packed import kind_of
        from fastpeft.quantised import NF4Weight
        NF4Weight.quantise(torch.randn(64, 64)).view().forward(torch.randn(2, 64))
        assert kind_of(torch.nn.Linear) is None
        assert "bitsandbytes" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_state_that_only_the_module_holds():
    """FSDP may leave a plain parameter in the place of bitsandbytes' own."""
    layer = four_bits()
    W = base_of(layer).dense()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(base_of(layer).dense(), W)


def test_gradients_reach_x_through_its_layer():
    layer, x = four_bits(dtype=F32), rand(4, 128).float().detach().requires_grad_()
    y = fastpeft.adapted_linear(x, base_of(layer), None, [])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_as_good(dx, (torch.ones(4, 64).double() @ base_of(layer).dense(torch.float64)), torch.ones(4, 64) @ base_of(layer).dense(F32))
