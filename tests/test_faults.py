"""The gate: faults planted into the core one at a time; each must fail the check that guards it."""

from __future__ import annotations

import checks
import pytest

import fastpeft.base
from fastpeft.ops import lowrank


def db_sign_flipped(monkeypatch):
    real = lowrank.db
    monkeypatch.setattr(lowrank, "db", lambda *a: -real(*a))


def scale_missing(monkeypatch):
    real = lowrank.up_add
    monkeypatch.setattr(lowrank, "up_add", lambda z, v, B, scale, blocks: real(z, v, B, 1.0, blocks))


def da_doubled(monkeypatch):
    real = lowrank.da
    monkeypatch.setattr(lowrank, "da", lambda *a, **k: 2 * real(*a, **k))


def dx_without_adapter(monkeypatch):
    monkeypatch.setattr(lowrank, "dx_add", lambda *a, **k: None)


def other_mask_in_backward_of_x(monkeypatch):
    real = lowrank.dropout_add_
    monkeypatch.setattr(lowrank, "dropout_add_", lambda y, x, seed, p, row0=0: real(y, x, seed + 1, p, row0))


def other_mask_in_backward_of_a(monkeypatch):
    real = lowrank.da
    monkeypatch.setattr(lowrank, "da", lambda *a, seed, **k: real(*a, seed=None if seed is None else seed + 1, **k))


def norm_cached(monkeypatch):
    real, cache = fastpeft.base.row_sq_norm, {}

    def cached(W, A=None, B=None):
        key = (W.data_ptr(), A is None)
        if key not in cache:
            cache[key] = real(W, A, B)
        return cache[key]

    monkeypatch.setattr(fastpeft.base, "row_sq_norm", cached)


FAULTS = [
    (db_sign_flipped, checks.check_dB),
    (scale_missing, checks.check_forward),
    (da_doubled, checks.check_dA),
    (dx_without_adapter, checks.check_dx),
    (other_mask_in_backward_of_x, checks.check_dropout),
    (other_mask_in_backward_of_a, checks.check_dropout),
    (norm_cached, checks.check_dora_after_fused_step),
]


@pytest.mark.parametrize(("plant", "check"), FAULTS, ids=lambda f: f.__name__)
def test_planted_fault_is_found(plant, check, monkeypatch):
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
    monkeypatch.undo()
    check()
