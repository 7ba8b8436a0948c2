"""Shared parameters under data parallelism: two processes with different data get the mean gradient, or an error, never less."""

from __future__ import annotations

import pytest
import torch
from checks import DT
from test_shared import CASES, WIDTH, adapted, assert_same, every, trains
from torch import nn

RANKS = 2


def rank_main(rank, folder):
    """One rank: gradients of each case, plain, checkpointed, in reentrant checkpoints, and those in a graph declared static."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seen = {}
    for case in CASES:
        for checkpointed in (None, False, True, "static"):
            torch.manual_seed(0)
            model = adapted(case).train()
            ddp = nn.parallel.DistributedDataParallel(model, static_graph=checkpointed == "static")
            model.checkpointed = checkpointed and bool(checkpointed)
            try:
                ddp(data(rank).requires_grad_()).square().sum().backward()
            except RuntimeError as e:
                assert checkpointed
                seen[case, checkpointed] = str(e)
            else:
                seen[case, checkpointed] = {n: p.grad for n, p in trains(model).items()}
    torch.save(seen, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def data(rank):
    return torch.randn(4, WIDTH, dtype=DT, generator=torch.Generator().manual_seed(50 + rank))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


@every
def test_data_parallel_gradients_are_the_mean(case, ranks):
    torch.manual_seed(0)
    model = adapted(case).train()
    sum(model(data(r)).square().sum() for r in range(RANKS)).backward()
    for seen in ranks:
        # one composition has one gradient, whatever the graph is declared as
        good = (None, False) if case == "projected" else (None, False, "static")
        for checkpointed in good:
            got = seen[case, checkpointed]
            assert_same(got, {n: p.grad / RANKS for n, p in trains(model).items()})
        for checkpointed in {True, "static"} - set(good):
            assert "use_reentrant=False" in str(seen[case, checkpointed]), checkpointed
