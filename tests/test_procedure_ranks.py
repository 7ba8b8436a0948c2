"""Procedures under data parallelism: two processes with different rows end alike, and as one process that sees all rows does."""

from __future__ import annotations

import functools

import pytest
import torch
from checks import DT
from procedure_runs import Blocks, Run, assert_same, on_ranks, plain, tokens
from test_aflora_procedure import run_of as aflora
from test_alora_procedure import run_of as alora
from test_bilora_procedure import run_of as bilora
from test_delta_lora import made as delta_lora
from test_galore import assert_close_at_this_step
from test_galore import made as galore
from test_lisa import made as lisa
from test_o_lora_procedure import run_of as o_lora
from test_periodic_lora import made as periodic_lora
from tolerance import assert_fp64

import fastpeft
from fastpeft import train


def one(cls, **options):
    return [cls(**options)]


def run(model, cls, optimizer=torch.optim.AdamW, **options):
    return Run(model, functools.partial(one, cls, **options), tokens(9, 2), cls=optimizer, lr=0.01)


def dylora():
    torch.manual_seed(1)
    model = Blocks()
    fastpeft.adapt(model, "dylora", rank=4, mode="frozen")
    return model


RUNS = {
    "dylora": run(dylora, train.DyLoRASampling, distribution="geometric", seed=5),
    "periodic_lora": run(periodic_lora, train.PeriodicLoRASchedule, steps=4),
    "delta_lora": run(delta_lora, train.DeltaLoRASchedule, start=3),
    "delta_lora in place": run(functools.partial(delta_lora, inplace=True), train.DeltaLoRASchedule, start=3),
    "lisa": run(lisa, train.LISASchedule, active=2, interval=3, seed=4),
    "galore": run(galore, train.GaLoreProjection, train.GaLoreAdamW),
    "galore both sides": run(functools.partial(galore, proj_type="full"), train.GaLoreProjection, train.GaLoreAdamW),
    "alora_alloc": alora(9),
    "aflora": aflora(20),
    "bilora": bilora(6, 2),
    "bilora darts": bilora(6, hypergrad="darts"),
    "o_lora": o_lora(6),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(RUNS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_agree(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert_same(first, second)
    alone, _ = plain(RUNS[name])
    for n, t in alone.state_dict().items():
        if "galore" in name:  # whose projections are made in fp32 (see test_galore)
            assert_close_at_this_step(first[n], t, n)
        elif t.dtype is DT:
            assert_fp64(first[n], t, n)
        else:
            assert torch.equal(first[n], t), n
