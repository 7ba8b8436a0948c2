"""Small checks of the core against the papers: real tests run them, and test_faults proves that each can fail."""

from __future__ import annotations

import papers
import torch
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.method.dylora import set_rank
from fastpeft.method.rosa import RoSA
from fastpeft.ops import nf4
from fastpeft.ops.dropout import draw_seed
from fastpeft.registry import Method
from fastpeft.terms import APPLY, Composed, Dense, Gain, KhatriRao, Kron, LowRank, Sparse

DT = torch.float64


def rand(*shape, grad=True):
    return torch.randn(*shape, dtype=DT).requires_grad_(grad)


def compare(y, z, ours, theirs, case=""):
    """y and z, and their gradients in the tensors of ours and theirs, name by name."""
    assert_fp64(y, z, f"y {case}")
    d = torch.randn_like(y)
    got, want = (torch.autograd.grad(out, list(own.values()), d) for out, own in ((y, ours), (z, theirs)))
    for name, a, b in zip(ours, got, want, strict=True):
        assert b.abs().max() > 0, f"the gradient of {name} vanishes, so this shows nothing {case}"
        assert_fp64(a, b, f"{name} {case}")


def lora_gap(p=0.0):
    """adapted_linear and the paper's LoRA on one problem: {name: (got, want)} of the output and the gradients."""
    torch.manual_seed(1)
    x, W, b = rand(3, 7, 12), rand(10, 12, grad=False), rand(10, grad=False)
    A, B, s, seed = rand(4, 12), rand(10, 4), 1.7, torch.tensor(123456789)
    mask = fastpeft.dropout_mask(seed, x.shape, p) if p else None
    got = fastpeft.adapted_linear(x, W, b, [LowRank(A, B, s, dropout=p)], seed=seed)
    want = papers.lora(x, W, b, A, B, s, mask)
    d = torch.randn_like(want)
    pairs = zip(torch.autograd.grad(got, (x, A, B), d), torch.autograd.grad(want, (x, A, B), d), strict=True)
    return {"y": (got, want)} | dict(zip(("dx", "dA", "dB"), pairs, strict=True))


def check_forward():
    assert_fp64(*lora_gap()["y"], "y")


def check_dx():
    assert_fp64(*lora_gap()["dx"], "dx")


def check_dA():
    assert_fp64(*lora_gap()["dA"], "dA")


def check_dB():
    assert_fp64(*lora_gap()["dB"], "dB")


def check_dropout():
    for name, pair in lora_gap(p=0.4).items():
        assert_fp64(*pair, f"{name} with dropout")


def site_gap(blocks=1, gain=False):
    """adapted_linear and the dense formula, with block-diagonal factors or a gain and a bias: {name: (got, want)}."""
    torch.manual_seed(3)
    x, W, b = rand(3, 7, 12), rand(8, 12, grad=False), rand(8, grad=False)
    A, B = (rand(4, 12), rand(8, 4)) if blocks == 1 else (rand(blocks, 4, 12 // blocks), rand(blocks, 8 // blocks, 4))
    g = rand(8) if gain else None
    terms = [LowRank(A, B, 1.7, blocks=blocks)] + ([Gain(g)] if gain else [])
    got = fastpeft.adapted_linear(x, W, b, terms)
    want = papers.site(x, W, b, [papers.low_rank(x, A, B, 1.7, blocks=blocks)], g)
    leaves = {"x": x, "A": A, "B": B} | ({"g": g} if gain else {})
    d = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(y, list(leaves.values()), d) for y in (got, want)), strict=True)
    return {"y": (got, want)} | dict(zip((f"d{n}" for n in leaves), pairs, strict=True))


def check_blocks():
    for name, pair in site_gap(blocks=4).items():
        assert_fp64(*pair, f"{name} with blocks")


def check_gain():
    for name, pair in site_gap(gain=True).items():
        assert_fp64(*pair, f"{name} with a gain")


def term_gap(term, want, **leaves):
    """adapted_linear with one term and a dense formula of x, W and b: the output and the gradients of x and the term's tensors."""
    torch.manual_seed(7)
    x, W, b = rand(3, 7, 12), rand(10, 12, grad=False), rand(10, grad=False)
    leaves = {"x": x} | leaves
    compare(fastpeft.adapted_linear(x, W, b, [term]), want(x, W, b), leaves, leaves)


def check_kron():
    torch.manual_seed(5)
    C, D = rand(5, 3), rand(2, 4)
    term_gap(Kron(C, D, 1.7), lambda x, W, b: papers.linear(x, W + 1.7 * papers.kron(C, D), b), C=C, D=D)


def check_hadamard():
    torch.manual_seed(5)
    b1, a1, b2, a2 = rand(10, 3), rand(3, 12), rand(10, 3), rand(3, 12)
    term = LowRank(KhatriRao(a1, a2), KhatriRao(b1, b2), 1.7)
    term_gap(term, lambda x, W, b: papers.loha(x, W, b, b1, a1, b2, a2, 1.7), b1=b1, a1=a1, b2=b2, a2=a2)


def check_sparse():
    """Entries of the last row and column among them; W is as it was."""
    torch.manual_seed(5)
    index = torch.tensor([[0, 0, 3, 7, 9, 9], [0, 11, 5, 2, 4, 11]], dtype=torch.int32)
    values = rand(6)
    for apply in APPLY:
        def want(x, W, b):
            return papers.linear(x, W + torch.zeros_like(W).index_put(tuple(index.long()), values), b)

        term_gap(Sparse(values, index, apply), want, values=values)


def check_window():
    """The weight under apply="window", bit for bit, after a forward and a backward."""
    torch.manual_seed(6)
    W, x, values = rand(10, 12, grad=False), rand(4, 12), rand(2)
    index, before = torch.tensor([[1, 9], [3, 11]], dtype=torch.int32), W.clone()
    fastpeft.adapted_linear(x, W, None, [Sparse(values, index, "window")]).sum().backward()
    assert torch.equal(W, before), "W was changed"


def check_composed():
    torch.manual_seed(5)
    p, q = rand(10, 4), rand(4, 12)
    term = Dense(Composed(lambda p, q: p.sin() @ q, (p, q)), 1.7)
    term_gap(term, lambda x, W, b: papers.linear(x, W + 1.7 * p.sin() @ q, b), p=p, q=q)


def check_rslora():
    torch.manual_seed(5)
    layer = perturb(fastpeft.AdaptedLinear(12, 10, method="lora", rank=4, alpha=6, rslora=True, dtype=DT))
    own, x = layer.adapter.lora, rand(5, 12, grad=False)
    assert_fp64(layer(x), papers.lora(x, layer.weight, layer.bias, own.A, own.B, 6 / 2), "y with rslora")


def check_hydralora():
    torch.manual_seed(5)
    layer = perturb(fastpeft.AdaptedLinear(12, 10, method="hydralora", rank=3, alpha=6, heads=2, dtype=DT))
    own, x = layer.adapter.hydralora, rand(5, 12)
    leaves = {"x": x} | dict(own.named_parameters())
    compare(layer(x), papers.hydralora(x, layer.weight, layer.bias, own.A, own.B.chunk(2, 1), own.G, 2.0), leaves, leaves, "of hydralora")


def check_nf4():
    """The weight of an NF4 base, whose blocks go across rows; its table and scales are fp32."""
    torch.manual_seed(5)
    W = rand(6, 32, grad=False)
    codes, absmax = nf4.quantise(W, 4, 64)
    got, want = nf4.dequantise(nf4.Packed(codes, absmax), 6, 32, DT), papers.quantised(W, 4)
    assert (got - want).abs().max() <= 2 * torch.finfo(torch.float32).eps * want.abs().max(), "the dequantised weight differs"


def check_dylora_ranks():
    """Each rank that set_rank puts in use is LoRA's with the factors cut to it."""
    torch.manual_seed(4)
    layer = fastpeft.AdaptedLinear(12, 10, method="dylora", rank=4, alpha=6, dtype=DT).eval()
    perturb(layer)
    own, x = layer.adapter.dylora, rand(5, 12, grad=False)
    for rank in (4, 2, 3, 1):
        set_rank(layer, rank)
        A, B = own.A[:rank], own.B[:, :rank]
        want = papers.lora(x, layer.weight, layer.bias, A, B, 6 / rank)
        assert_fp64(layer(x), want, f"y at rank {rank}")


def check_dora_after_fused_step():
    """After AdamW(fused=True) moved A, B and m, the output is DoRA of the moved parameters."""
    torch.manual_seed(2)
    layer = fastpeft.AdaptedLinear(12, 10, method="dora", rank=3, alpha=6, dtype=DT)
    dora = layer.adapter.dora
    optimizer = torch.optim.AdamW(dora.parameters(), lr=0.1, fused=True)
    x = rand(5, 12, grad=False)
    for _ in range(3):
        before = layer(x)
        before.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = layer(x)
        assert not torch.equal(before, after), "the step changed nothing"
        want = papers.dora(x, layer.weight, layer.bias, dora.A, dora.B, dora.m, 2.0)
        assert_fp64(after, want, "y after a fused step")


def perturb(model, size=0.3):
    """Move every trainable parameter away from its start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
    return model


def with_masks(model, seed=0):
    """Give every rosa layer a random mask, as a finished schedule would; its values stay zero. Others train as with their procedure."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, RoSA) and m.values is not None:
            flat = torch.randperm(m.shape[0] * m.shape[1], generator=generator)[: m.values.numel()].sort().values
            m.set_mask(torch.stack([flat // m.shape[1], flat % m.shape[1]]))
        elif isinstance(m, Method):
            m.attached = True
    return model


def seed_after(number):
    """The dropout seed that the first adapted layer draws after torch.manual_seed(number)."""
    torch.manual_seed(number)
    seed = draw_seed("cpu")
    torch.manual_seed(number)
    return seed


class MLP(nn.Module):
    """16 -> 32 -> 16 with a non-linearity between."""

    def __init__(self, dtype=DT, bias=True):
        super().__init__()
        self.up = nn.Linear(16, 32, bias=bias, dtype=dtype)
        self.down = nn.Linear(32, 16, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))
