"""Parameters that lie in shards over several processes: FSDP2's DTensors, and those that DeepSpeed's ZeRO-3 partitioned.

An adapter is saved and loaded as if they were whole. Only its own tensors are gathered, and no weight of the model beside them.
Every process has to take part; the first of them writes the files.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.record import Adaptation, holders_of

Place = tuple[nn.Module, str, Tensor]


def kind_of(parameter: Tensor) -> str:
    """Who sharded it, "" for a whole one."""
    if hasattr(parameter, "ds_id"):
        return "ZeRO-3"
    if getattr(parameter, "_fsdp_flattened", False):
        return "FullyShardedDataParallel"
    return "DTensor" if _is_dtensor(parameter) else ""


def _is_dtensor(tensor: Tensor) -> bool:
    found = sys.modules.get("torch.distributed.tensor")  # who never imported it has none
    return found is not None and isinstance(tensor, found.DTensor)


def _units(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on."""
    found = sys.modules.get("torch.distributed.fsdp")
    return [] if found is None else [m for m in model.modules() if isinstance(m, found.FSDPModule)]


def refuse_sharded(model: nn.Module, who: str, instead: str) -> None:
    """ValueError for `who` where some parameter lies in shards."""
    for name, parameter in model.named_parameters():
        if kind := kind_of(parameter):
            raise ValueError(f"{who}: {name!r} of this {type(model).__name__} lies in shards over several processes ({kind}); {instead}")


@contextlib.contextmanager
def gathered(model: nn.Module, record: Adaptation, who: str, *, write: bool = False) -> Iterator[bool]:
    """Within it the tensors of the adapter are whole, also where they lie in shards; every process must enter.

    Gives whether this process holds them: with `write` all do, and give the shards what was written; without, the first alone
    does, and the others wait at the end. RuntimeError under FullyShardedDataParallel outside of its summon_full_params.
    """
    for module in _units(model):
        module.reshard()  # its last forward may have left it whole, beside the shards that stay
    found = list(_places(model, record))
    _refuse_flat(found, who)
    shards = [place for place in found if _is_dtensor(place[2])]
    parts = [p for _, _, p in found if hasattr(p, "ds_id")]
    if parts:
        try:
            with _deepspeed().GatheredParameters(parts, modifier_rank=0 if write else None):
                yield write or torch.distributed.get_rank() == 0
        finally:  # an error of the first process must not leave the others waiting
            torch.distributed.barrier()
    elif shards:
        yield from _as_whole(shards, write)
    else:
        yield True


@torch.no_grad()
def _as_whole(shards: list[Place], write: bool) -> Iterator[bool]:
    mesh: Any = shards[0][2].device_mesh  # type: ignore[attr-defined]
    holds = write or not any(mesh.get_coordinate() or ())
    whole: dict[Tensor, nn.Parameter] = {}
    for _, _, p in shards:
        if p not in whole:
            full = p.full_tensor()  # type: ignore[attr-defined]
            whole[p] = nn.Parameter(full if holds else full.new_empty(0), p.requires_grad)
    try:
        for module, leaf, p in shards if holds else ():
            module._parameters[leaf] = whole[p]
        yield holds
        for p, full in whole.items() if write else ():
            _write_shard(p, full)
    finally:
        for module, leaf, p in shards:
            module._parameters[leaf] = p
        for dim in range(0 if write else mesh.ndim):
            torch.distributed.barrier(mesh.get_group(dim))


def _write_shard(parameter: Any, full: Tensor) -> None:
    """This process's part of `full`, without communication: every process has read the same."""
    from torch.distributed.tensor import distribute_tensor

    own = distribute_tensor(full.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(own.to_local())


def _places(model: nn.Module, record: Adaptation) -> Iterator[Place]:
    """Where the parameters stand that a checkpoint of the adapter holds, or is composed of; in the same order in every process."""
    modules = [model.get_submodule(site).adapter for site in record.sites]
    modules += holders_of(model, record).values()
    modules += [model.get_submodule(name) for name in record.originals]
    seen: set[tuple[int, str]] = set()
    for root in modules:
        for module in root.modules():
            for leaf, p in module._parameters.items():
                if p is not None and (id(module), leaf) not in seen:
                    seen.add((id(module), leaf))
                    yield module, leaf, p
    for name in (*record.biases, *record.trained):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if (id(module), leaf) not in seen:
            seen.add((id(module), leaf))
            yield module, leaf, module._parameters[leaf]  # type: ignore[misc]


def _refuse_flat(found: list[Place], who: str) -> None:
    flat = [p for _, _, p in found if getattr(p, "_fsdp_flattened", False)]
    if flat and all(p.dim() < 2 for p in flat):  # whole ones have the shapes of factors
        raise RuntimeError(
            f"{who}: FullyShardedDataParallel holds a flat part of the adapter here; call this within "
            "FullyShardedDataParallel.summon_full_params(wrapped, writeback=True), and save in the first process alone."
        )


def _deepspeed() -> Any:
    import deepspeed

    return deepspeed.zero
