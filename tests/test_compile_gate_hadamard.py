"""The Hadamard kernels built for four GPUs without a GPU."""

from __future__ import annotations

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
    gates.assert_builds("hadamard", gate.HADAMARD_DEFAULT, target)


@pytest.mark.accept
@targets
def test_every_tile(target):
    """Every width, ranks that fill it and others; the default ones in fp16 too."""
    gates.assert_builds("hadamard", gate.HADAMARD_EVERY, target)
    for row in gate.rows("hadamard", gate.HADAMARD_DEFAULT, [target], dtype=torch.float16):
        assert not row.faults(), gate.markdown([row])


@targets
def test_every_legal_tile_is_among_them(target):
    """By kernel: the tile, and whether du comes in the same pass."""
    found, legal = set(), set()
    for r in gate.HADAMARD_EVERY:
        for case in gate.hadamard_cases(r).values():
            for launch in gate.launches(case, target):
                if launch.kernel in gate.hadamard.KERNELS:
                    a, name = launch.arguments, launch.kernel.fn.__name__.removesuffix("_kernel")
                    options = launch.options["num_warps"], launch.options["num_stages"]
                    found.add((name, tiles.Tile(a["BT"], a["BC"], a["RI"] * a["P"], *options), a["P"]))
    for r in range(1, tiles.HADAMARD_RANK + 1):
        width = tiles.hadamard_width(r)
        for name in ("shrink", "expand", "outer"):
            for need_u in {False, name == "outer" and tiles.hadamard_fuses(r)}:
                legal.add((name, tiles.hadamard(name, width, 2, gates.ARCHES[target], need_u), width))
    assert found == legal


def test_offsets_have_64_bits():
    for name, case in gate.hadamard_cases(4).items():
        for launch in gate.launches(case, "sm_90"):
            assert not gates.narrow_offsets(gate.build(launch, "sm_90").asm["ttir"]), name


def test_no_atomics():
    for case in gate.hadamard_cases(8).values():
        for launch in gate.launches(case, "sm_90"):
            assert "atomic" not in gate.build(launch, "sm_90").asm["ttir"]


def test_fp32_spills_nothing():
    """Its products use no tensor core, by choice: TF32 would lose what fp32 is for."""
    for row in gate.rows("hadamard", gate.HADAMARD_DEFAULT, ["sm_90"], dtype=torch.float32):
        assert set(row.faults()) <= {"no tensor-core instruction"}, gate.markdown([row])


def test_nothing_of_rank_r_squared_is_in_memory():
    """Besides u and du, one row a token: the largest buffer of a gradient is its partial sums."""
    r, seen = 8, []
    with pytest.MonkeyPatch.context() as patch:
        real = gate.lowrank.memory.empty
        patch.setattr(gate.lowrank.memory, "empty", lambda shape, *rest: seen.append(shape) or real(shape, *rest))
        for name in ("up", "du_db", "dx", "da"):
            gate.launches(gate.hadamard_cases(r)[name], "sm_90")
    tokens, width = gate.T, tiles.hadamard_width(r)
    assert (tokens, r * width) in seen
    for shape in seen:
        assert shape[-2:] in {(tokens, r * width), (tokens, gate.C), (gate.C, r), (r, gate.C)}, shape


def test_scale_and_length_do_not_compile_again():
    k = gate.hadamard
    a, b = gate.meta(4, 4096), gate.meta(4096, 4)

    def hashes(t, scale):
        x, u = gate.meta(t, 4096), gate.meta(t, 16)
        calls = (
            lambda: k.down(x, a, a, x.dtype),
            lambda: k.up(u, b, b, scale, None),
            lambda: k.up_add(x, u, b, b, scale),
            lambda: k.du_db(x, u, b, b, scale, True, True, True),
            lambda: k.dx_add(x, u, a, a),
            lambda: k.da(x, u, a, a, True, True),
        )
        return [gate.source(launch).hash() for call in calls for launch in gate.launches(call, "sm_90")]

    first = hashes(4096, 1.0)
    assert len(first) >= 6
    for other in ((4096, 0.37), (4097, 1.0), (2500, 2.0)):
        assert hashes(*other) == first
