"""The grouped kernels built for four GPUs without a GPU."""

from __future__ import annotations

import gates
import pytest
import torch
from triton.backends.compiler import GPUTarget

from bench import gate

targets = pytest.mark.parametrize("target", gate.TARGETS)


@targets
def test_default_tile(target):
    assert isinstance(gate.TARGETS[target], GPUTarget)
    gates.assert_builds("grouped", gate.GROUPED_DEFAULT, target)


@pytest.mark.accept
@targets
def test_every_tile(target):
    """Every rank tile, ranks that no row is aligned for and others, several rank tiles; the default in fp16 and with 16-bit factors too."""
    gates.assert_builds("grouped", gate.GROUPED_EVERY, target)
    for dtypes in ({"dtype": torch.float16}, {"factor": torch.bfloat16}):
        for row in gate.rows("grouped", gate.GROUPED_DEFAULT, [target], **dtypes):
            assert not row.faults(), gate.markdown([row])


def launches(shape=gate.GROUPED_DEFAULT[0], **dtypes):
    """(call, launch) on sm_90."""
    for name, case in gate.grouped_cases(shape, **dtypes).items():
        for launch in gate.launches(case, "sm_90"):
            yield name, launch


def test_offsets_have_64_bits_and_no_atomics():
    for name, launch in launches():
        text = gate.build(launch, "sm_90").asm["ttir"]
        assert not gates.narrow_offsets(text), name
        assert "atomic" not in text, name


def test_fp32_spills_nothing():
    """Its products use no tensor core, by choice: TF32 would lose what fp32 is for."""
    for row in gate.rows("grouped", gate.GROUPED_DEFAULT, ["sm_90"], dtype=torch.float32):
        assert set(row.faults()) <= {"no tensor-core instruction"}, gate.markdown([row])


def test_the_grid_is_the_largest_that_sizes_allow():
    """Nothing of it is read from the device: tiles of all pairs and one more for each expert, whatever was chosen."""
    (ranks, k), k_ = gate.GROUPED_DEFAULT[0], gate.grouped
    assert k_._tiles(gate.T * k, len(ranks), 64) == gate.T * k // 64 + len(ranks)
    assert [k_._tiles(*s) for s in ((0, 4, 64), (1, 4, 64), (3, 8, 64), (64, 1, 64))] == [0, 1, 3, 2]


def test_a_place_is_a_launch_and_the_first_of_a_fresh_y_is_of_its_own():
    found = {name: [] for name in gate.grouped_cases(gate.GROUPED_DEFAULT[0])}
    for name, launch in launches():
        if launch.kernel is gate.grouped.expand_kernel:
            found[name].append((launch.arguments["place"], launch.arguments["FRESH"], launch.arguments["HAS_BIAS"]))
    assert found["up_add"] == found["dx_add"] == [(0, False, False), (1, False, False)]
    assert found["up"] == [(0, True, False), (1, False, False)] and found["up, bias"] == [(0, True, True), (1, False, False)]


def test_scale_and_length_do_not_compile_again():
    def hashes(t, scale):
        ranks, k = gate.GROUPED_DEFAULT[0]
        R, P, g = sum(ranks), t * k, gate.grouped
        x, u, A, B = gate.meta(t, 4096), gate.meta(P, 16), gate.meta(R, 4096), gate.meta(4096, R)
        order, ends, w = gate.meta(P, dtype=torch.int64), gate.meta(33 * k + 1, dtype=torch.int32), gate.meta(P, dtype=torch.float32)
        calls = (
            lambda: g.down(x, A, order, ends, w, ranks, torch.bfloat16),
            lambda: g.du(x, B, u, order, ends, w, ranks, scale),
            lambda: g.up(u, B, order, ends, ranks, scale, None, t),
            lambda: g.outer(x, u, B, order, ends, w, ranks, scale, False),
        )
        return [gate.source(launch).hash() for call in calls for launch in gate.launches(call, "sm_90")]

    first = hashes(4096, 1.0)
    assert len(first) >= 5
    for other in ((4096, 0.37), (4097, 1.0), (2500, 2.0)):
        assert hashes(*other) == first
