"""The sparse kernels built for four GPUs without a GPU."""

from __future__ import annotations

import re

import gates
import pytest
import torch
from triton.backends.compiler import GPUTarget

from bench import gate

tiles = gate.tiles
targets = pytest.mark.parametrize("target", gate.TARGETS)


@targets
def test_default_tile(target):
    assert isinstance(gate.TARGETS[target], GPUTarget)
    gates.assert_builds("sparse", gate.DEFAULT, target)


@pytest.mark.accept
@targets
def test_every_tile(target):
    """Aligned rows and others, in both 16-bit dtypes."""
    gates.assert_builds("sparse", gate.EVERY, target)
    for row in gate.rows("sparse", gate.EVERY, [target], dtype=torch.float16):
        assert not row.faults(), gate.markdown([row])


@targets
def test_every_legal_tile_is_among_them(target):
    sizes = {"sddmm": ("BLOCK", "BT"), "masked": ("BT", "BO", "BI")}
    found = {name: set() for name in sizes}
    for case in gate.sparse_cases(16).values():
        for launch in gate.launches(case, target):
            name = launch.kernel.fn.__name__.removesuffix("_kernel")
            if name in sizes:
                size = [launch.arguments[s] for s in sizes[name]]
                size += [0] * (3 - len(size))
                found[name].add(tiles.Tile(*size, launch.options["num_warps"], launch.options["num_stages"]))
    assert found == {name: tiles.legal(name, gates.ARCHES[target]) for name in sizes}


def test_offsets_have_64_bits():
    for name, case in gate.sparse_cases(16).items():
        for launch in gate.launches(case, "sm_90"):
            assert not gates.narrow_offsets(gate.build(launch, "sm_90").asm["ttir"]), name


def test_fp32_spills_nothing():
    """Its products use no tensor core, by choice: TF32 would lose what fp32 is for."""
    for row in gate.rows("sparse", gate.DEFAULT, dtype=torch.float32):
        assert set(row.faults()) <= {"no tensor-core instruction"}, gate.markdown([row])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_bf16_is_rounded_to_nearest(target):
    """Which the interpreter does not do."""
    (launch,) = gate.launches(gate.sparse_cases(16)["put"], target)
    ptx = gate.build(launch, target).asm["ptx"]
    assert set(re.findall(r"cvt[.\w]*\.bf16\.f32", ptx)) == {"cvt.rn.bf16.f32"}


def test_no_atomics():
    for case in gate.sparse_cases(16).values():
        for launch in gate.launches(case, "sm_90"):
            assert "atomic" not in gate.build(launch, "sm_90").asm["ttir"]


def test_length_and_number_of_entries_do_not_compile_again():
    meta, k = gate.meta, gate.sparse
    W = meta(4096, 4096)

    def hashes(t, nnz):
        x, index, v = meta(t, 4096), meta(2, nnz, dtype=torch.int32), meta(nnz, dtype=torch.float32)
        calls = (
            lambda: k.sddmm(x, x, index),
            lambda: k.masked(x, x, index),
            lambda: k.copy(W, v, index, W),
            lambda: k.put(W, v, index),
            lambda: k.restore(W, index, meta(nnz)),
        )
        return [gate.source(launch).hash() for call in calls for launch in gate.launches(call, "sm_90")]

    first = hashes(4096, 50_000)
    assert len(first) == 5
    for other in ((4097, 50_000), (4096, 49_999), (2500, 60_000)):
        assert hashes(*other) == first
