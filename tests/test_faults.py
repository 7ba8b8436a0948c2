"""The gate: faults planted into the core one at a time; each must fail the check that guards it."""

from __future__ import annotations

import checks
import pytest
import torch

import fastpeft.base
from fastpeft import linear
from fastpeft.method import hydralora, lora
from fastpeft.method.dylora import DyLoRA
from fastpeft.ops import composed, khatri_rao, kron, lowrank, nf4, rownorm, slabs, sparse, steps
from fastpeft.ops import gain as gain_ops


def db_sign_flipped(monkeypatch):
    real = lowrank.db
    monkeypatch.setattr(lowrank, "db", lambda *a: -real(*a))


def scale_missing(monkeypatch):
    real = lowrank.up_add
    monkeypatch.setattr(lowrank, "up_add", lambda z, v, B, scale, blocks: real(z, v, B, 1.0, blocks))


def scale_missing_where_the_base_comes_last(monkeypatch):
    real = lowrank.up
    monkeypatch.setattr(steps, "ONE_PASS", 0)
    monkeypatch.setattr(lowrank, "up", lambda v, B, scale, blocks, bias: real(v, B, 1.0, blocks, bias))


def scale_missing_in_backward(monkeypatch):
    real = lowrank.du
    monkeypatch.setattr(lowrank, "du", lambda dz, B, scale, blocks: real(dz, B, 1.0, blocks))


def da_doubled(monkeypatch):
    real = lowrank.da
    monkeypatch.setattr(lowrank, "da", lambda *a, **k: 2 * real(*a, **k))


def dx_without_adapter(monkeypatch):
    real = lowrank.dx
    monkeypatch.setattr(lowrank, "dx", lambda *a, **k: torch.zeros_like(real(*a, **k)))


def dx_without_base(monkeypatch):
    monkeypatch.setattr(fastpeft.base.Plain, "grad_onto", lambda *a: None)


def other_mask_in_backward_of_x(monkeypatch):
    real = lowrank.dx
    monkeypatch.setattr(lowrank, "dx", lambda *a, seed, **k: real(*a, seed=None if seed is None else seed + 1, **k))


def other_mask_in_backward_of_a(monkeypatch):
    real = lowrank.da
    monkeypatch.setattr(lowrank, "da", lambda *a, seed, **k: real(*a, seed=None if seed is None else seed + 1, **k))


def kept_values_not_scaled(monkeypatch):
    real = lowrank.dropout
    monkeypatch.setattr(lowrank, "dropout", lambda x, seed, p, row0=0: real(x, seed, p, row0) * (1 - p))


def second_slab_repeats_the_mask(monkeypatch):
    real = lowrank.dropout
    monkeypatch.setattr(slabs, "SLAB_BYTES", 256)
    monkeypatch.setattr(lowrank, "dropout", lambda x, seed, p, row0=0: real(x, seed, p, 0))


def last_row_of_a_tile_dropped(monkeypatch):
    real = slabs.row_blocks

    def short(rows, step):
        for s in real(rows, step):
            yield s if s.stop < rows else slice(s.start, s.stop - 1)

    monkeypatch.setattr(slabs, "row_blocks", short)


def blocks_shifted(monkeypatch):
    real = lowrank._by_blocks
    monkeypatch.setattr(lowrank, "_by_blocks", lambda left, right: real(left, right.roll(1, 0)))


def gain_on_the_bias(monkeypatch):
    real = gain_ops.scale_rows
    monkeypatch.setattr(gain_ops, "scale_rows", lambda z, g, bias=None: real(z, g, None if bias is None else g * bias))


def gain_missing_in_dx(monkeypatch):
    real = fastpeft.base.Plain.grad_onto
    monkeypatch.setattr(fastpeft.base.Plain, "grad_onto", lambda self, dx, dz, gain=None: real(self, dx, dz))


def gain_missing_in_db(monkeypatch):
    real = lowrank.du_db_gain

    def wrong(dy, z, v, B, scale, blocks, gain, **need):
        dz, du, _, dgain = real(dy, z, v, B, scale, blocks, gain, **need)
        return dz, du, lowrank.db(dy, v, B, scale, blocks), dgain

    monkeypatch.setattr(lowrank, "du_db_gain", wrong)


def norm_cached(monkeypatch):
    real, cache = rownorm._sq_norm, {}

    def cached(W, A, B, scale=1.0):
        key = (W.data_ptr(), A is None)
        if key not in cache:
            cache[key] = real(W, A, B, scale)
        return cache[key].clone()

    monkeypatch.setattr(rownorm, "_sq_norm", cached)


def rank_mask_stale(monkeypatch):
    real, cache = DyLoRA.terms, {}

    def cached(self, base):
        return cache.setdefault(id(self), real(self, base))

    monkeypatch.setattr(DyLoRA, "terms", cached)


def transposed_kron(monkeypatch):
    real = kron._product
    monkeypatch.setattr(kron, "_product", lambda y, x, C, D, scale, *, fresh: real(y, x, C.flip(0), D, scale, fresh=fresh))


def kron_scale_missing_in_dc(monkeypatch):
    real = kron.back

    def wrong(dz, x, tensors, scale, dx, need_x, needs):
        dx, (dC, dD) = real(dz, x, tensors, scale, dx, need_x, needs)
        return dx, (dC / scale, dD)

    monkeypatch.setattr(kron, "back", wrong)


def kron_dx_of_another_factor(monkeypatch):
    real = kron._write
    monkeypatch.setattr(kron, "_write", lambda dx, e, dm, fresh: real(dx, e, dm.flip(1), fresh))


def kron_last_block_of_dd_dropped(monkeypatch):
    real = kron._outer
    monkeypatch.setattr(kron, "_outer", lambda e, rows: real(e[:-1], rows[:-1]))


def hadamard_factors_swapped(monkeypatch):
    real = khatri_rao._composed
    monkeypatch.setattr(khatri_rao, "_composed", lambda t: real((t[0], t[1], t[3], t[2])))
    monkeypatch.setattr(khatri_rao, "materialises", lambda *a: False)


def hadamard_gradients_swapped(monkeypatch):
    real = khatri_rao.back

    def wrong(*a):
        dx, grads = real(*a)
        return dx, (grads[1], grads[0], *grads[2:])

    monkeypatch.setattr(khatri_rao, "back", wrong)
    monkeypatch.setattr(khatri_rao, "materialises", lambda *a: False)


def dense_hadamard_without_its_scale(monkeypatch):
    real = khatri_rao.delta
    monkeypatch.setattr(khatri_rao, "delta", lambda tensors, scale, dtype: real(tensors, 1.0, dtype))
    monkeypatch.setattr(khatri_rao, "materialises", lambda *a: True)


def sparse_rows_and_columns_swapped_in_the_gradient(monkeypatch):
    real = sparse.grad
    monkeypatch.setattr(sparse, "grad", lambda dz, x, index, dtype: real(dz, x, index.flip(1), dtype))


def sparse_last_entry_lost(monkeypatch):
    for name in ("dense", "copy", "put"):
        real = getattr(sparse, name)
        at = 0 if name == "dense" else 1

        def wrong(*a, real=real, at=at):
            short = (a[at][:-1], a[at + 1][:, :-1])
            return real(*a[:at], *short, *a[at + 2 :])

        monkeypatch.setattr(sparse, name, wrong)


def window_left_in_the_weight(monkeypatch):
    monkeypatch.setattr(sparse, "restore", lambda *a: None)


def composition_detached(monkeypatch):
    real = composed._through
    monkeypatch.setattr(composed, "_through", lambda *a: tuple(None if g is None else 0 * g for g in real(*a)))


def rslora_as_lora(monkeypatch):
    real = lora.scaling
    monkeypatch.setattr(lora, "scaling", lambda rank, alpha, rslora=False: real(rank, alpha, False))


def gates_do_not_add_up(monkeypatch):
    monkeypatch.setattr(hydralora, "route", lambda u, p, x: (torch.sigmoid(p)[..., :, None] * u[..., None, :]).flatten(-2))


def gates_learn_at_half_the_rate(monkeypatch):
    real = linear._middle

    def wrong(t, u, p, *a):
        return real(t, u, None if p is None else (p + p.detach()) / 2, *a)

    monkeypatch.setattr(linear, "_middle", wrong)


def codes_in_the_other_nibble(monkeypatch):
    real = nf4.unpack
    monkeypatch.setattr(nf4, "unpack", lambda codes, bits: real(codes, bits).view(-1, 2).flip(1).flatten())
    monkeypatch.setattr(nf4.cpu, "runs", lambda out: False)


def scale_of_the_block_before(monkeypatch):
    real = nf4.scales
    monkeypatch.setattr(nf4, "scales", lambda packed: real(packed).roll(1))
    monkeypatch.setattr(nf4.cpu, "runs", lambda out: False)


FAULTS = [
    (db_sign_flipped, checks.check_dB),
    (scale_missing, checks.check_forward),
    (scale_missing_where_the_base_comes_last, checks.check_forward),
    (scale_missing_in_backward, checks.check_dx),
    (da_doubled, checks.check_dA),
    (dx_without_adapter, checks.check_dx),
    (dx_without_base, checks.check_dx),
    (other_mask_in_backward_of_x, checks.check_dropout),
    (other_mask_in_backward_of_a, checks.check_dropout),
    (kept_values_not_scaled, checks.check_dropout),
    (second_slab_repeats_the_mask, checks.check_dropout),
    (last_row_of_a_tile_dropped, checks.check_dropout),
    (blocks_shifted, checks.check_blocks),
    (gain_on_the_bias, checks.check_gain),
    (gain_missing_in_dx, checks.check_gain),
    (gain_missing_in_db, checks.check_gain),
    (norm_cached, checks.check_dora_after_fused_step),
    (rank_mask_stale, checks.check_dylora_ranks),
    (transposed_kron, checks.check_kron),
    (kron_scale_missing_in_dc, checks.check_kron),
    (kron_dx_of_another_factor, checks.check_kron),
    (kron_last_block_of_dd_dropped, checks.check_kron),
    (hadamard_factors_swapped, checks.check_hadamard),
    (hadamard_gradients_swapped, checks.check_hadamard),
    (dense_hadamard_without_its_scale, checks.check_hadamard),
    (sparse_rows_and_columns_swapped_in_the_gradient, checks.check_sparse),
    (sparse_last_entry_lost, checks.check_sparse),
    (window_left_in_the_weight, checks.check_window),
    (composition_detached, checks.check_composed),
    (rslora_as_lora, checks.check_rslora),
    (gates_do_not_add_up, checks.check_hydralora),
    (gates_learn_at_half_the_rate, checks.check_hydralora),
    (codes_in_the_other_nibble, checks.check_nf4),
    (scale_of_the_block_before, checks.check_nf4),
]


@pytest.mark.parametrize(("plant", "check"), FAULTS, ids=lambda f: f.__name__)
def test_planted_fault_is_found(plant, check, monkeypatch):
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
    monkeypatch.undo()
    check()
