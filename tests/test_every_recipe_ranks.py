"""Every recipe under DDP and FSDP2 in two processes with different rows: the gradients of one process that has all rows, in fp64."""

from __future__ import annotations

import pytest
import torch
from sharded import CASES, MORE, RANKS, RECIPES, WRAPS, adapted, begin, data, gradients, loss, trains, wrapped
from tolerance import assert_fp64

QUICK = [(case, "layers") for case in RECIPES] + [(case, "ddp") for case in ("lora", "dora", "lotr", "rosa", "moa", "phatgoose", "krona_b")]
REST = [(case, wrap) for case in RECIPES + list(MORE) for wrap in WRAPS if (case, wrap) not in QUICK]
# a parameter that no process adds up with the others'
FAULTS = [("lora", "ddp"), ("lora", "layers"), ("dora", "ddp"), ("lotr", "layers")]


def rank_main(rank, folder, runs, faults):
    begin(rank, folder)
    seen = {run: backward(rank, *run) for run in runs}
    seen |= {(*run, "alone"): backward(rank, *run, alone=True) for run in faults}
    torch.save(seen, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def backward(rank, case, wrap, alone=False):
    """The gradients of this rank's share of the rows; alone: the first parameter's is left out of what the ranks add up."""
    model = adapted(case)
    options = {}
    if alone:
        name, first = next(iter(trains(model).items()))
        if wrap == "ddp":
            torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])
        else:
            options["ignored_params"] = {first}
    outside = wrapped(model, wrap, **options)
    loss(model, outside, *data(rank)).backward()
    return gradients(model)


def spawned(folder, runs, faults=()):
    torch.multiprocessing.spawn(rank_main, (str(folder), runs, faults), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("quick"), QUICK, FAULTS)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("rest"), REST)


def wanted(case, shares=(0, 1)):
    """Of one process, over these shares of the rows; a rank's mean is over the ranks."""
    model = adapted(case)
    sum(loss(model, model, *data(r)) for r in shares).backward()
    return {n: g / len(shares) for n, g in gradients(model).items()}


def assert_joined(case, wrap, ranks):
    want, alone = wanted(case), wanted(case, [0])
    assert want
    for n in want:
        assert (want[n] - alone[n]).abs().max() > 1e-6, f"{n}: rank 0 has the same alone, so this shows nothing"
    for seen in ranks:
        got = seen[case, wrap]
        assert got.keys() == want.keys()
        for n in want:
            assert_fp64(got[n], want[n], f"{case}, {wrap}: {n}")


@pytest.mark.parametrize(("case", "wrap"), QUICK)
def test_gradients_are_those_of_the_joined_batch(case, wrap, quick):
    assert_joined(case, wrap, quick)


@pytest.mark.accept
@pytest.mark.parametrize(("case", "wrap"), REST)
def test_gradients_are_those_of_the_joined_batch_elsewhere(case, wrap, rest):
    assert set(QUICK + REST) == {(c, w) for c in CASES for w in WRAPS}
    assert_joined(case, wrap, rest)


@pytest.mark.parametrize(("case", "wrap"), FAULTS)
def test_a_gradient_that_is_not_added_up_is_seen(case, wrap, quick):
    want = wanted(case)
    for seen in quick:
        got = seen[case, wrap, "alone"]
        first, *others = want
        with pytest.raises(AssertionError, match="differs by"):
            assert_fp64(got[first], want[first], first)
        for n in others:
            assert_fp64(got[n], want[n], n)
