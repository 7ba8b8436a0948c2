"""Accelerated models under DDP, FSDP1 and FSDP2 in two processes, accelerated before or after: a single process's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from accelerated import assert_same, inputs, stock

import fastpeft

RANKS = 2
WRAPS = ("ddp", "fsdp1", "fsdp2", "fsdp2 units")
CASES = [(family, wrap, first) for family in ("lora", "dora") for wrap in WRAPS for first in (True, False)]


def data(rank):
    return inputs(8).chunk(RANKS)[rank]


def wrapped(model, how):
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    from torch.distributed.fsdp import fully_shard

    if how == "fsdp2 units":  # each factor gathers itself, in a forward that only PEFT's own calls
        for m in list(model.modules()):
            if isinstance(m, nn.ModuleDict):
                for factor in m.values():
                    if any(True for _ in factor.parameters()):
                        fully_shard(factor)
    return fully_shard(model)


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def rank_main(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    seen = {}
    for family, wrap, first in CASES:
        model = stock(family)
        if first:
            fastpeft.accelerate(model)
        outside = wrapped(model, wrap)
        report = fastpeft.accelerate(outside)
        fastpeft.reset_calls()
        outside(data(rank)).square().sum().backward()
        own = {n: p for n, p in outside.named_parameters() if p.requires_grad}
        if wrap == "fsdp1":
            with torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(outside, with_grads=True):
                grads = {n: p.grad.clone() for n, p in own.items()}
        else:
            grads = {n: whole(p.grad).clone() for n, p in own.items()}
        clean = {n.replace("_fsdp_wrapped_module.", "").removeprefix("module."): g for n, g in grads.items()}
        seen[family, wrap, first] = clean, fastpeft.fused_calls(), list(report.unfused.values())
    torch.save(seen, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.accept
def test_gradients_are_a_single_process(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        seen = torch.load(tmp_path / str(rank))
        assert list(seen) == CASES
        for (family, wrap, first), (grads, calls, unfused) in seen.items():
            model = stock(family)
            sum(model(data(r)).square().sum() for r in range(RANKS)).backward()
            want = {n: p.grad / RANKS for n, p in model.named_parameters() if p.requires_grad}
            assert_same(grads, want)
            if wrap == "fsdp2 units":
                assert not calls and len(unfused) == 2, (family, wrap, first, calls, unfused)
            else:
                assert calls == {family: 2} and not unfused, (family, wrap, first, calls, unfused)
