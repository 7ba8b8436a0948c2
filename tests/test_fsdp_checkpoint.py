"""Adapters of a model in FSDP2's shards: what two processes trained is saved whole, and loads whole and into shards, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded import CASES, RANKS, Tower, adapted, begin, data, loss, trains, whole, wrapped
from tolerance import assert_fp64
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import fastpeft
from fastpeft import shards, train
from fastpeft.folder import read_folder

# shared factors, entries at an index, parameters composed for PEFT's file, biases and a whole module
QUICK = ["lora", "lotr", "rosa", "pissa", "lora, biases and a head"]
REST = [case for case in CASES if case not in QUICK]
FULL = StateDictOptions(full_state_dict=True)


def steps(model, outside, shares):
    """Two steps of SGD over these shares of the rows, the loss a mean over RANKS where one process has them all."""
    optimizer = torch.optim.SGD(trains(model).values(), lr=0.05, momentum=0.9)
    for _ in range(2):
        (sum(loss(model, outside, *data(r)) for r in shares) / len(shares)).backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model):
    return {n: whole(t).detach().clone() for n, t in model.state_dict().items()}


def spoiled(case):
    """A sharded model of the same kind whose adapter has other values."""
    model = adapted(case)
    outside = wrapped(model, "layers")
    with torch.no_grad():
        for p in trains(model).values():
            p.add_(1.0)
    return model, outside


def rank_main(rank, folder, cases):
    begin(rank, folder)
    seen = {case: run(rank, case, f"{folder}/{cases.index(case)}") for case in cases}
    seen["refused"] = refused(f"{folder}/refused")
    torch.save(seen, f"{folder}/rank{rank}")
    torch.distributed.destroy_process_group()


def run(rank, case, folder):
    model = adapted(case)
    outside = wrapped(model, "layers")
    steps(model, outside, [rank])
    seen = {"trained": state(model)}
    fastpeft.save_adapter(model, folder)
    loaded, outside = spoiled(case)
    fastpeft.load_adapter(loaded, folder)
    seen["loaded"] = state(loaded)
    with torch.no_grad():  # FSDP2 leaves the root whole after a forward without a backward
        loss(loaded, outside, *data(rank))
        for p in trains(loaded).values():
            p.add_(1.0)
    fastpeft.load_adapter(loaded, folder)
    seen["loaded after a forward"] = state(loaded)
    fastpeft.save_adapter(loaded, f"{folder}/again")
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/dcp")
    restored, _ = spoiled(case)
    held = {"model": get_model_state_dict(restored)}
    dcp.load(held, checkpoint_id=f"{folder}/dcp")
    set_model_state_dict(restored, held["model"])
    seen["restored"] = state(restored)
    seen["full"] = get_model_state_dict(model, options=FULL)
    if case == "lora":
        seen["faults"] = faults(rank, case, model, folder)
        fastpeft.export_lora(model, f"{folder}/lora")
    return seen


def faults(rank, case, model, folder):
    """What one shard alone gives: in the second process when loading, in every one when saving."""
    own, shards._write_shard = shards._write_shard, shards._write_shard if rank == 0 else lambda *_: None
    loaded, _ = spoiled(case)
    fastpeft.load_adapter(loaded, folder)
    shards._write_shard = own
    DTensor = torch.distributed.tensor.DTensor
    gather, DTensor.full_tensor = DTensor.full_tensor, lambda p, **_: p.to_local().repeat(RANKS, *[1] * (p.dim() - 1))
    fastpeft.save_adapter(model, f"{folder}/fault")
    DTensor.full_tensor = gather
    return state(loaded)


def refused(folder):
    """The errors of what shards do not allow."""
    sharded, whole_ones = adapted("lora, biases and a head"), Tower()
    wrapped(sharded, "layers"), wrapped(whole_ones, "layers")
    fastpeft.save_adapter(sharded, folder)
    own = torch.optim.AdamW(trains(sharded).values())
    train.attach(sharded, own, [])  # nothing that would see shards
    calls = {
        "adapt": lambda: fastpeft.adapt(whole_ones, "lora"),
        "load_adapter": lambda: fastpeft.load_adapter(whole_ones, folder),
        "merge": lambda: fastpeft.merge(sharded),
        "unload": lambda: fastpeft.unload(sharded),
        "adapters_off": lambda: fastpeft.adapters_off(sharded).__enter__(),
        "attach": lambda: train.attach(sharded, own, [train.DyLoRASampling()]),
    }
    errors = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        errors[name] = str(error.value)
    return errors


def spawned(folder, cases):
    torch.multiprocessing.spawn(rank_main, (str(folder), cases), nprocs=RANKS)
    return folder, cases, [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("rest"), REST)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for n in want:
        assert torch.equal(got[n], want[n]), n


def assert_same_folder(got, want):
    (config, tensors, meta), (theirs, their_tensors, their_meta) = read_folder(got), read_folder(want)
    assert config == theirs and meta == their_meta
    assert_equal(tensors, their_tensors)


def assert_saved(case, ran):
    folder, cases, ranks = ran
    folder = folder / str(cases.index(case))
    alone = adapted(case)
    steps(alone, alone, range(RANKS))
    start = adapted(case).state_dict()
    first = ranks[0][case]
    trained = first["trained"]
    assert any(not torch.equal(trained[n], start[n]) for n in start), "nothing trained"
    for n, t in alone.state_dict().items():
        if t.dtype.is_floating_point and t.dtype is torch.float64:
            assert_fp64(trained[n], t, n)
        else:
            assert torch.equal(trained[n], t), n
    for seen in ranks:
        for what in ("trained", "loaded", "loaded after a forward", "restored"):
            assert_equal(seen[case][what], trained)
    assert_equal(first["full"], trained)
    torch.manual_seed(3)
    plain = Tower()
    fastpeft.load_adapter(plain, folder)
    # (a base that was let go stands in the plain model, whose own weight it is)
    assert_equal({n: t for n, t in state(plain).items() if n in trained}, trained)
    assert_same_folder(folder / "again", folder)
    assert not list(folder.glob(".*")), "a file of a save that did not end"


@pytest.mark.parametrize("case", QUICK)
def test_saved_and_loaded_to_the_bit(case, quick):
    assert_saved(case, quick)


@pytest.mark.accept
@pytest.mark.parametrize("case", REST)
def test_the_rest_saved_and_loaded_to_the_bit(case, rest):
    assert_saved(case, rest)


def test_one_shard_alone_is_seen(quick):
    folder, cases, ranks = quick
    for seen in ranks:
        with pytest.raises(AssertionError, match="adapter"):
            assert_equal(seen["lora"]["faults"], seen["lora"]["trained"])
    torch.manual_seed(3)
    plain = Tower()
    fastpeft.load_adapter(plain, folder / f"{cases.index('lora')}/fault")
    with pytest.raises(AssertionError, match="adapter"):
        assert_equal(state(plain), ranks[0]["lora"]["trained"])


def test_export_from_shards(quick, tmp_path):
    folder, cases, _ = quick
    folder = folder / str(cases.index("lora"))
    plain = Tower()
    fastpeft.load_adapter(plain, folder)
    fastpeft.export_lora(plain, tmp_path)
    assert_same_folder(folder / "lora", tmp_path)


def test_what_shards_do_not_allow_is_said(quick):
    for seen in quick[2]:
        errors = seen["refused"]
        for name in ("adapt", "load_adapter"):
            assert "lies in shards" in errors[name] and "comes first, and what shards the model" in errors[name]
        for name in ("merge", "unload"):
            assert errors[name].startswith(name) and "load_adapter into a whole model first" in errors[name]
        assert "cannot stand in for shards" in errors["adapters_off"]
        assert "lies in shards" in errors["attach"] and "procedures read and change whole ones" in errors["attach"]
