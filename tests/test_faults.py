"""The gate: faults planted into the core one at a time; each must fail the check that guards it."""

from __future__ import annotations

import checks
import pytest
import torch

import fastpeft.base
from fastpeft.method.dylora import DyLoRA
from fastpeft.ops import gain as gain_ops
from fastpeft.ops import lowrank, rownorm, slabs, steps


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
]


@pytest.mark.parametrize(("plant", "check"), FAULTS, ids=lambda f: f.__name__)
def test_planted_fault_is_found(plant, check, monkeypatch):
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
    monkeypatch.undo()
    check()
