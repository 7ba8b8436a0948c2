"""LoftQ: each round of its alternation against the slow one, the specification's checks, bitsandbytes' codes, scales and limits."""

from __future__ import annotations

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.adapter import base_of
from fastpeft.ops import nf4

RANK = 8


def toy(rows=48, cols=64):
    """A weight with a decaying spectrum."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(rows, rows, dtype=DT))[0], torch.linalg.qr(torch.randn(cols, cols, dtype=DT))[0]
    return U * (10 * torch.arange(1, rows + 1, dtype=DT) ** -0.7) @ V[:rows]


def built(W=None, dtype=DT, **options):
    W = toy() if W is None else W
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.to(dtype)
    layer = fastpeft.AdaptedLinear.from_linear(linear, "loftq", **({"rank": RANK, "alpha": RANK} | options))
    m = layer.adapter.loftq
    return layer, m, base_of(layer).dense(torch.promote_types(dtype, torch.float32)).to(DT), m.scale * (m.B @ m.A).detach().to(DT)


def left(W, Q, low):
    return (W - Q - low).norm().item()


def assert_stored(got, want):
    """Equal up to the fp32 in which levels and scales are stored: a number has three roundings, and rounds add up."""
    assert (got - want).abs().max() < 64 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_are_the_algorithm(rounds, bits):
    _, _, Q, low = built(bits=bits, iterations=rounds)
    want_q, want_low = papers.loftq(toy(), RANK, rounds, bits)
    assert_stored(Q, want_q)
    assert_stored(low, want_low)


def test_error_falls_below_that_of_plain_nf4():
    """As in the specification's toy: plain NF4, then 1 to 5 rounds, each better than the one before."""
    W = toy(128, 128)
    plain = left(W, papers.quantised(W, 4), 0)
    errors = [left(W, *built(W, rank=16, alpha=16, iterations=k)[2:]) for k in range(1, 6)]
    assert all(b < a for a, b in zip([plain, *errors], errors, strict=False)), [plain, *errors]
    tail = torch.linalg.svdvals(W - papers.quantised(W, 4))[16:].norm().item()
    assert abs(errors[0] - tail) < 1e-6 * plain, "one round takes the leading part of the error, and nothing else"


def test_one_round_keeps_plain_nf4_and_more_do_not():
    """Q is NF4(W) after one round; after five, Q - NF4(W) has full rank, so no frozen low-rank term says it."""
    plain = papers.quantised(toy(), 4)
    assert_stored(built(iterations=1)[2], plain)
    assert torch.linalg.matrix_rank(built(iterations=5)[2] - plain) == 48


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_q_lies_on_the_grid(bits):
    """Each number of Q is a level times its block's scale, and Q quantised again is Q, code for code."""
    layer, _, Q, _ = built(bits=bits)
    stored = layer.adapter.base
    levels = papers.normal_float(bits)
    ratio = Q.reshape(-1, 64) / stored.absmax.double()[:, None]
    assert ((ratio[..., None] - levels).abs().amin(-1) < 4 * torch.finfo(torch.float32).eps).all()
    codes, absmax = nf4.quantise(Q, bits, 64)
    assert torch.equal(codes, stored.codes) and torch.equal(absmax, stored.absmax)


def test_bitsandbytes_reads_the_same_q():
    """Quantised by bitsandbytes as a reload of the dense Q would be: the same codes and scales."""
    functional = pytest.importorskip("bitsandbytes.functional")
    layer, _, Q, _ = built(dtype=torch.float32)
    codes, state = functional.quantize_4bit(Q.float(), blocksize=64, compress_statistics=False, quant_type="nf4")
    assert torch.equal(codes.flatten(), layer.adapter.base.codes)
    assert torch.equal(state.absmax, layer.adapter.base.absmax)
    assert torch.equal(functional.dequantize_4bit(codes, state), base_of(layer).dense())


@pytest.mark.parametrize("alpha", [2.0, 8.0, 24.0])
def test_scales(alpha):
    """Q + s B A is one matrix whatever s is; unscaled, the authors' start adds s times the low rank instead."""
    _, _, Q, low = built(alpha=alpha)
    want_q, want_low = papers.loftq(toy(), RANK, 5)
    assert_stored(Q, want_q)
    assert_stored(low, want_low)
    _, m, _, theirs = built(alpha=alpha, compat_unscaled=True)
    assert m.scale == alpha / RANK
    assert_stored(theirs, alpha / RANK * want_low)


def test_full_rank_makes_up_for_everything():
    layer, _, _, _ = built(rank=48, alpha=16, bits=2)
    x = rand(5, 64)
    assert_fp64(layer(x), nn.functional.linear(x, toy()))


def test_the_start_is_not_the_pre_trained_layer():
    layer, _, Q, low = built()
    x = rand(5, 64)
    assert_fp64(layer(x), nn.functional.linear(x, Q + low))
    assert (layer(x) - nn.functional.linear(x, toy())).abs().max() > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_gradients(dropout):
    from checks import seed_after

    layer, m, Q, _ = built(alpha=12.0, dropout=dropout)
    perturb(layer).train()
    x = rand(2, 5, 64)
    mask = fastpeft.dropout_mask(seed_after(7), x.shape, dropout) if dropout else None
    got, want = layer(x), papers.lora(x, Q, None, m.A, m.B, 1.5, mask)
    own = {"x": x, "A": m.A, "B": m.B}
    compare(got, want, own, own)


def test_a_block_of_zeros():
    """The released code divides by its absmax, 0."""
    W = toy()
    W[0] = 0
    layer, _, Q, low = built(W, iterations=1)
    assert not Q[0].any() and low.isfinite().all() and layer(rand(3, 64)).isfinite().all()


def test_parameters():
    _, m, _, _ = built()
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {"A": (RANK, 64), "B": (48, RANK)}


def test_merge_keeps_q_and_export_refuses(tmp_path):
    model = MLP()
    fastpeft.adapt(model, "loftq", rank=4)
    x = rand(5, 16)
    want = perturb(model).eval()(x)
    with pytest.raises(ValueError, match="replaced the base weight of 'up'"):
        fastpeft.export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_fp64(fastpeft.merge(model)(x), want)


@pytest.mark.parametrize(
    ("shape", "options", "error", "words"),
    [
        ((10, 10), dict(), ValueError, r"loftq: bits=4, block=64 at 'linear'.*divides"),
        ((16, 16), dict(bits=1), ValueError, r"bits=1.*2 to 8"),
        ((16, 16), dict(block=48), ValueError, r"block=48"),
        ((16, 16), dict(iterations=0), ValueError, r"loftq: iterations=0"),
        ((16, 16), dict(alpha=-1), ValueError, r"loftq: alpha=-1.*positive"),
        ((16, 16), dict(rank=17), ValueError, r"loftq: rank=17"),
    ],
)
def test_errors(shape, options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(*shape), "loftq", **({"rank": 4} | options))
