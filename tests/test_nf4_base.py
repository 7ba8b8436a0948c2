"""Quantised bases under every term: they are the dense weight that they stand for, made when it is needed, and nothing of its
size is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import DT, rand
from test_memory import saved_bytes
from test_nf4 import stored
from test_parts import IN, OUT, SETS, pieces, want
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.ops import nf4
from fastpeft.ops.workspace import release
from fastpeft.quantised import KINDS, NF4, Int8, Int8Weight, NF4Weight, store
from fastpeft.terms import Dense, Gain, LowRank, Sparse, effective_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def base_of(kind, dtype=DT, shape=(OUT, IN), seed=0):
    """A base of random codes; no fp64 number of it needs more than fp32's digits."""
    if kind == "int8":
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return Int8(codes, torch.rand(shape[0], generator=generator) + 0.1, dtype)
    bits, block = (4, 64) if kind == "nested" else (int(kind[2:]), 32)
    packed = stored(bits, block, shape, kind == "nested", seed)
    return NF4(packed.codes, packed.absmax, shape, dtype, bits=bits, block=block, nested=packed.nested)


EVERY = ("nf4", "nf2", "nf3", "nested", "int8")
kinds = pytest.mark.parametrize("kind", EVERY)


@pytest.mark.parametrize("first", range(0, len(SETS), 40))
def test_every_set_of_terms(first):
    """The sets of test_parts, on each kind in turn."""
    for k, names in enumerate(SETS[first : first + 40]):
        torch.manual_seed(len(names) + first)
        base = base_of(EVERY[(k + first) % len(EVERY)])
        leaf, terms = pieces()
        x, W, bias, seed = rand(3, 7, IN), base.dense(DT), rand(OUT), torch.tensor(77)
        y = fastpeft.adapted_linear(x, base, bias, [terms[n] for n in names], seed=seed)
        z = want(names, terms, leaf, x, W, bias, seed)
        assert_fp64(y, z, str(names))
        inputs, d = [x, bias, *leaf.values()], torch.randn_like(z)
        got, expected = (torch.autograd.grad(t, inputs, d, allow_unused=True) for t in (y, z))
        for name, a, b in zip(("x", "bias", *leaf), got, expected, strict=True):
            assert (a is None) == (b is None), f"{names}: the gradient of {name}"
            if a is not None:
                assert_fp64(a, b, f"{names}: the gradient of {name}")
        assert torch.equal(base.dense(DT), W)


@kinds
def test_the_interface_of_plain(kind):
    base = base_of(kind)
    plain = Plain(base.dense(DT))
    public = [n for n in dir(Plain) if not n.startswith("_")]
    assert all(hasattr(base, n) for n in public)
    for n in ("out_features", "in_features", "dtype", "device", "trains"):
        assert getattr(base, n) == getattr(plain, n)
    x, dz, g, bias = rand(5, IN, grad=False), rand(5, OUT, grad=False), rand(OUT, grad=False), rand(OUT, grad=False)
    pairs = [
        (b.forward(x), b.forward(x, bias), b.grad_linear(dz), b.grad_linear(dz, g), b.row_sq_norm(), b.weight(), b.dense(DT), b.dense(F32))
        for b in (base, plain)
    ]  # fmt: skip
    assert all(torch.equal(*p) for p in zip(*pairs, strict=True))
    for name, to, args in (("forward_onto", dz, (x,)), ("grad_onto", x, (dz,)), ("grad_onto", x, (dz, g))):
        got, same = to.clone(), to.clone()
        getattr(base, name)(got, *args)
        getattr(plain, name)(same, *args)
        assert torch.equal(got, same), name


@kinds
def test_norms_and_their_gradients(kind):
    base = base_of(kind)
    A, B, m = rand(3, IN), rand(OUT, 3), rand(OUT)
    V = base.dense(DT) + 0.7 * (B @ A)
    d = torch.randn(OUT, dtype=DT)
    pairs = {
        "row_sq_norm": (base.row_sq_norm(A, B * 0.7), V.square().sum(1)),
        "row_gain": (base.row_gain(m, A, B, 0.7), m / V.norm(dim=1)),
        "linear": (base.linear(A).T @ torch.ones(3, dtype=DT), base.dense(DT) @ A.T @ torch.ones(3, dtype=DT)),
    }
    for name, (got, expected) in pairs.items():
        assert_fp64(got, expected, name)
        for a, b in zip(*(torch.autograd.grad(t, (A, B, m), d, True, allow_unused=True) for t in (got, expected)), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_fp64(a, b, f"the gradient of {name}")
    assert_fp64(base.row_gain(m, A, B, 0.7, constant=True), m / V.norm(dim=1))


def results(base, dtype, terms, x, autocast=False):
    leaves = [x, *(t for term in terms for t in tensors_of(term))]
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        y = fastpeft.adapted_linear(x, base, None, terms, seed=torch.tensor(5))
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def tensors_of(term):
    match term:
        case LowRank():
            return term.A, term.B
        case Gain():
            return (term.g,)
        case Sparse():
            return (term.values,)
        case _:
            return (term.delta,)


def some_terms(base, which, dtype=F32):
    torch.manual_seed(4)
    o, i = base.out_features, base.in_features
    low = LowRank(torch.randn(4, i, dtype=dtype).requires_grad_(), torch.randn(o, 4, dtype=dtype).requires_grad_(), 0.5)
    match which:
        case "lora":
            return [low]
        case "dora":
            return [low, Gain(torch.rand(o, dtype=dtype).requires_grad_(), over=low)]
        case "dora full":
            m = torch.rand(o, dtype=dtype).requires_grad_()
            return [low, Gain(base.row_gain(m, low.A, low.B, low.scale))]
        case "dora dropped":
            return [low, Gain(torch.rand(o, dtype=dtype).requires_grad_(), 0.3)]
        case "copy" | "window":
            index = torch.nonzero(torch.rand(o, i) < 0.05).T.to(torch.int32).contiguous()
            return [low, Sparse(torch.randn(index.shape[1], dtype=dtype).requires_grad_(), index, which)]
        case "dense":
            return [Dense(torch.randn(o, i, dtype=dtype).requires_grad_())]


WHICH = ("lora", "dora", "dora dropped", "copy", "window", "dense")


@pytest.mark.parametrize("dtype,autocast", [(BF16, False), (F16, False), (F32, True), (BF16, True)])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_the_bits_of_the_dense_weight(kind, which, dtype, autocast):
    """In 16 bits too, and under autocast: as if the dense weight of the base's dtype stood there."""
    base = base_of(kind, dtype, (48, 64))
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    got, expected = (
        results(b, dtype, some_terms(b, which), x, autocast) for b in (base, Plain(base.dense(dtype)))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("which", [*WHICH, "dora full"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_nothing_of_the_weights_size_is_kept(kind, which):
    base = base_of(kind, BF16, (128, 256))
    x = torch.randn(8, 256).to(BF16).requires_grad_()
    kept = []
    for b in (base, Plain(base.dense(BF16))):
        terms = some_terms(b, which)
        kept.append(saved_bytes(lambda b=b, terms=terms: fastpeft.adapted_linear(x, b, None, terms, seed=torch.tensor(5))))
    own = 128 * 256 * 4 if which == "dense" else 0  # delta itself
    assert kept[0] == kept[1] < own + 128 * 256 * 2


@pytest.mark.parametrize("which,times", [("lora", 2), ("dora", 2), ("dora full", 2), ("dora dropped", 2), ("copy", 2), ("dense", 2)])
def test_it_is_made_once_in_each_direction(which, times, monkeypatch):
    """Another layer has the workspace between the two; a norm and two products share what lies there."""
    made, real = [], nf4.fill
    monkeypatch.setattr(nf4, "fill", lambda out, packed: (made.append(packed.codes.data_ptr()), real(out, packed)))
    base, other = (base_of("nf4", F32, (96, 128), seed) for seed in (0, 1))
    x = torch.randn(40, 128).requires_grad_()
    y = fastpeft.adapted_linear(x, base, None, some_terms(base, which), seed=torch.tensor(5))
    other.forward(x.detach())
    y.sum().backward()
    assert made.count(base.packed.codes.data_ptr()) == times and len(made) == times + 1


def test_layers_that_take_turns_in_the_workspace():
    """Forward, forward, backward, backward: each gets its own weight, whoever's is in the workspace."""
    bases = [base_of(k, DT, (96, 128), seed) for seed, k in enumerate(("nf4", "nested", "int8", "nf4"))]
    terms = [some_terms(b, "lora", DT) for b in bases]
    xs = [rand(40, 128) for _ in bases]
    ys = [fastpeft.adapted_linear(x, b, None, t) for x, b, t in zip(xs, bases, terms, strict=True)]
    for x, b, t, y in zip(xs, bases, terms, ys, strict=True):
        W = b.dense(DT) + t[0].scale * (t[0].B @ t[0].A)
        assert_fp64(y, x @ W.T, "y")
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert_fp64(dx, torch.ones(40, 96, dtype=DT) @ W, "dx")


def test_entries_in_the_workspace_do_not_stay_there():
    """A sparse term writes into the workspace; the next product of the same base must not find them."""
    base = base_of("nf4", F32, (96, 128))
    terms, x = some_terms(base, "copy")[1:], torch.randn(40, 128)
    plain = base.forward(x)
    changed = fastpeft.adapted_linear(x, base, None, terms)
    assert not torch.equal(changed, plain) and torch.equal(base.forward(x), plain)


def test_a_new_view_sees_new_codes():
    module = NF4Weight.quantise(torch.randn(64, 128))
    x = torch.randn(3, 128)
    first = module.view().forward(x)
    module.absmax.mul_(2)
    assert torch.equal(module.view().forward(x), 2 * first)


def test_a_workspace_from_inference_mode_serves_training():
    release()
    base, x = base_of("nf4", F32, (96, 128)), torch.randn(4, 128)
    with torch.inference_mode():
        first = base_of("nf4", F32, (96, 128)).forward(x)
    y = fastpeft.adapted_linear(x.requires_grad_(), base, None, some_terms(base, "dense"))
    y.sum().backward()
    assert torch.equal(base.forward(x.detach()), first) and x.grad is not None


class Layer(nn.Module):
    """A layer over a stored weight, its terms made in each forward."""

    def __init__(self, kind, which, dtype=F32):
        super().__init__()
        W = torch.randn(64, 128).to(dtype)
        self.base = Int8Weight.quantise(W) if kind == "int8" else NF4Weight.quantise(W)
        self.which = which
        self.parts = nn.ParameterList(t.detach() for term in some_terms(self.base.view(), which, dtype) for t in tensors_of(term))
        self.index = some_terms(self.base.view(), "copy", dtype)[1].index

    def forward(self, x):
        base, p = self.base.view(), self.parts
        match self.which:
            case "lora":
                terms = [LowRank(p[0], p[1], 0.5)]
            case "dora":
                low = LowRank(p[0], p[1], 0.5)
                terms = [low, Gain(p[2], over=low)]
            case "dora full":
                terms = [LowRank(p[0], p[1], 0.5), Gain(base.row_gain(p[2], p[0], p[1], 0.5))]
            case "copy":
                terms = [LowRank(p[0], p[1], 0.5), Sparse(p[2], self.index)]
            case _:
                terms = [Dense(p[0])]
        return fastpeft.adapted_linear(x, base, None, terms)


def gradients(layer, x):
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def captured(sizes):
    """A backend that runs a graph as it is and notes the number of elements of all that its forward keeps for backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def forward(graph, inputs):
        returned = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        given = {n for n in graph.graph.nodes if n.op == "placeholder"}
        given |= {n for n in graph.graph.nodes if n.target is torch.ops.aten.detach.default and n.args[0] in given}
        sizes.append([n.meta["val"].numel() for n in returned[1:] if isinstance(n, torch.fx.Node) and n not in given])
        return make_boxed_func(graph.forward)

    keep = lambda graph, inputs: make_boxed_func(graph.forward)  # noqa: E731
    return aot_autograd(fw_compiler=forward, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)


@pytest.mark.parametrize("which", ["lora", "dora", "dora full", "copy", "dense"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiled(kind, which):
    """One graph; the same numbers; and nothing of the weight's size goes from forward to backward."""
    layer, x, sizes = Layer(kind, which, DT), rand(5, 128), []
    got = gradients(torch.compile(layer, fullgraph=True, backend=captured(sizes)), x)
    expected = gradients(layer, x)
    for a, b in zip(got, expected, strict=True):
        assert_fp64(a, b)
    assert len(sizes) == 1 and not [n for n in sizes[0] if n >= 64 * 128], sizes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("which", ["lora", "dora", "copy"])
def test_checkpointing_equals_plain(which, reentrant):
    layer, x = Layer("nf4", which), torch.randn(5, 128, requires_grad=True)
    expected = gradients(layer, x)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for a, b in zip([y, x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert torch.equal(a, b)


def test_a_window_is_the_copy_and_an_overlay_is_refused():
    """W is no tensor that somebody else could read: the entries go into the copy that is made anyway."""
    base, x = base_of("nf4", F32, (96, 128)), torch.randn(40, 128)
    copied, window = (some_terms(base, which)[1:] for which in ("copy", "window"))
    assert torch.equal(fastpeft.adapted_linear(x, base, None, copied), fastpeft.adapted_linear(x, base, None, window))
    overlay = Sparse(copied[0].values, copied[0].index, "overlay", object())
    with pytest.raises(ValueError, match="an overlay stays in the weight itself, and this one is quantised; use apply='copy'"):
        fastpeft.adapted_linear(x, base, None, [overlay])


@pytest.mark.parametrize("make", [NF4Weight.quantise, Int8Weight.quantise, lambda W: NF4Weight.quantise(W, 2, 32)])
def test_the_module(make):
    W = torch.randn(24, 64)
    module = make(W)
    assert list(module.state_dict()) == ["codes", "absmax"] and not list(module.parameters())
    bits = module.absmax.clone()
    for change, dtype in (
        (lambda m: m.half(), F16), (lambda m: m.bfloat16(), BF16), (lambda m: m.to(DT), DT), (lambda m: m.float(), F32),
        (lambda m: m.to("cpu"), F32), (lambda m: nn.Sequential(m).to(BF16)[0], BF16),
    ):  # fmt: skip
        module = change(module)
        assert module.dtype is dtype and module.absmax.dtype is F32 and torch.equal(module.absmax, bits)
        base = module.view()
        assert base.dtype is dtype and torch.equal(base.weight(), make(W).view().dense(F32).to(dtype))
    twin = copy.deepcopy(module)
    twin.absmax.zero_()
    assert torch.equal(module.absmax, bits)
    empty = type(module).empty(W) if isinstance(module, Int8Weight) else NF4Weight.empty(W, module.bits, module.block)
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty.view().dense(F32), make(W).view().dense(F32))
    moved = module.to("meta")
    assert moved.codes.is_meta and moved.absmax.is_meta and moved.absmax.dtype is F32 and moved.dtype is BF16
    assert moved.to_empty(device="cpu").absmax.dtype is F32
    assert "torch.bfloat16" in repr(module)


def test_store():
    W = torch.randn(32, 64)
    for kind in KINDS:
        module = store("layer", Plain(W), kind)
        expected = Int8.quantise(W) if kind == "int8" else NF4.quantise(W, int(kind[2:]))
        assert torch.equal(module.view().dense(), expected.dense())
        blank = store("layer", Plain(W.to("meta")), kind)
        assert blank.codes.is_meta and [t.shape for t in blank.buffers()] == [t.shape for t in module.buffers()]
    error = {kind: (module.view().dense() - W).norm() for kind in KINDS if (module := store("layer", Plain(W), kind))}
    assert error["nf2"] > error["nf3"] > error["nf4"] > error["nf5"] > error["nf6"] > error["nf7"] > error["nf8"] > 0
    with pytest.raises(ValueError, match="quantize='fp4' does not exist; choose one of nf2, nf3"):
        store("layer", Plain(W), "fp4")
    with pytest.raises(ValueError, match=r"the weight of 'layer'.*multiple of 32 that divides them"):
        store("layer", Plain(W[:, :3]), "nf4")
    with pytest.raises(ValueError, match="is no dense tensor"):
        store("layer", NF4.quantise(W), "int8")


def test_every_method_that_merges_stands_on_a_quantised_layer():
    """effective_weight over the dense form of the base is what the layer computes."""
    for info in fastpeft.methods():
        if info.site != "linear" or not info.mergeable:
            continue
        W = torch.randn(32, 64, dtype=DT)
        for kind in ("nf4", "int8"):
            stored_weight = store("layer", Plain(W), kind)
            base = stored_weight.view()
            layer = fastpeft.AdaptedLinear(64, 32, method=info.name, dtype=DT).eval()
            with torch.no_grad():
                for p in layer.adapter.parameters():
                    p.add_(0.1 * torch.randn_like(p))
            x = rand(5, 64)
            y = fastpeft.adapted_linear(x, base, None, layer.adapter.terms(base))
            assert_fp64(y, x @ effective_weight(base.dense(DT), layer.adapter.terms(base), DT).T, f"{info.name} on {kind}")
