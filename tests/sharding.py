"""FSDP2 over two processes: the same probe for every method, in one spawn."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path

import torch
from checks import rand, with_masks
from probes import Outcome, outcome
from test_methods import adapted, grads, trainable
from tolerance import assert_fp64
from torch import nn

RANKS = 2


def fsdp2(name: str) -> str:
    """fully_shard of every layer and the model: output and every gradient of two halves of a batch are those of one process."""
    from torch.distributed.fsdp import fully_shard

    model, x = adapted(name), rand(2 * RANKS, 16)
    whole = with_masks(copy.deepcopy(model))  # a copy has no procedure
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module)
    fully_shard(model)
    mine = x.chunk(RANKS)[torch.distributed.get_rank()]
    y = model(mine)
    assert_fp64(y, whole(mine), "y")
    y.square().sum().backward()
    exact = grads(whole(x), whole)
    own = trainable(model)
    assert own.keys() == exact.keys() - {"x"}
    for n, p in own.items():
        assert_fp64(RANKS * p.grad.full_tensor(), exact[n], n)  # FSDP takes the mean over the ranks
    return ""


def _rank(rank: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    found = {n: outcome(n, fsdp2) for n in names}
    torch.save({n: (o.works, o.remark) for n, o in found.items()}, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def outcomes(names: list[str], folder: Path) -> dict[str, Outcome]:
    """method -> what came of it, the same on both ranks."""
    torch.multiprocessing.spawn(_rank, (names, str(folder)), nprocs=RANKS)
    ranks = [torch.load(folder / str(rank)) for rank in range(RANKS)]
    assert ranks[0] == ranks[1]
    return {n: Outcome(*o) for n, o in ranks[0].items()}
