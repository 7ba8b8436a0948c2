"""What one adapted layer keeps for backward, counted in bytes of distinct storages beside the parameters."""

from __future__ import annotations

import pytest
import torch

from fastpeft import AdaptedLinear

TOKENS, IN, OUT, R = 512, 32, 48, 2
FLOAT = 4
X, Y, RANK = TOKENS * IN * FLOAT, TOKENS * OUT * FLOAT, TOKENS * R * FLOAT
SEED = 8
# vectors and factors of the layer's own size, which do not grow with the tokens
FACTORS = (4 * R * (IN + OUT) + 8 * OUT) * FLOAT


def saved_bytes(forward, *modules):
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    for m in modules:
        for p in m.parameters():
            storages.pop(p.untyped_storage().data_ptr(), None)
    assert any(t.requires_grad for t in (y if isinstance(y, tuple) else (y,)))
    return sum(storages.values())


def layer(method="lora", **options):
    return AdaptedLinear(IN, OUT, method=method, rank=R, **options)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_keeps_x_and_two_numbers_per_rank_and_token(dropout):
    m, x = layer(dropout=dropout), torch.randn(TOKENS, IN, requires_grad=True)
    kept = saved_bytes(lambda: m(x), m)
    assert X < kept <= X + 2 * RANK + SEED, f"{kept - X} bytes beside x"


def test_dora_keeps_one_output_more():
    m, x = layer("dora"), torch.randn(TOKENS, IN, requires_grad=True)
    kept = saved_bytes(lambda: m(x), m)
    assert X + Y < kept <= X + Y + 2 * RANK + FACTORS, f"{kept - X - Y} bytes beside x and z"


def test_three_sites_share_a_transposed_input():
    sites, x = [layer() for _ in range(3)], torch.randn(8, TOKENS // 8, IN, requires_grad=True).transpose(0, 1)
    kept = saved_bytes(lambda: tuple(m(x) for m in sites), *sites)
    assert X < kept <= X + 3 * 2 * RANK, f"{kept - X} bytes beside one x"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_a_keeps_no_x(dropout):
    m, x = layer(dropout=dropout), torch.randn(TOKENS, IN, requires_grad=True)
    m.adapter.lora.A.requires_grad_(False)
    kept = saved_bytes(lambda: m(x), m)
    assert 0 < kept <= 2 * RANK + SEED, f"{kept} bytes"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_fa_keeps_rank_numbers_per_token(dropout):
    m, x = layer("lora_fa", dropout=dropout), torch.randn(TOKENS, IN, requires_grad=True)
    assert saved_bytes(lambda: m(x), m) == RANK + (SEED if dropout else 0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("method", "options"), [("prolora", {}), ("prolora", {"unshared": 0}), ("dylora", {}), ("dylora", {"mode": "frozen"})], ids=str)
def test_composed_factors_keep_x_and_rank_numbers_per_token(method, options, dropout):
    m, x = layer(method, dropout=dropout, **options), torch.randn(TOKENS, IN, requires_grad=True)
    kept = saved_bytes(lambda: m(x), m)
    assert X + RANK < kept <= X + RANK + FACTORS + SEED < X + 2 * RANK + FACTORS, f"{kept - X - RANK} bytes beside x and u"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_hydralora_keeps_x_u_gates_and_their_products(heads, dropout):
    m, x = layer("hydralora", heads=heads, dropout=dropout), torch.randn(TOKENS, IN, requires_grad=True)
    numbers = R if heads == 1 else R + heads + heads * R
    assert saved_bytes(lambda: m(x), m) == X + TOKENS * numbers * FLOAT + (SEED if dropout else 0)


def test_no_grad_keeps_nothing():
    m, x = layer(), torch.randn(TOKENS, IN)
    with torch.no_grad():
        assert not m(x).requires_grad
    m.requires_grad_(False)
    assert m(x).grad_fn is None
