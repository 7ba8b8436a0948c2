"""The Kronecker kernels built for four GPUs without a GPU."""

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
    gates.assert_builds("kron", gate.KRON_DEFAULT, target)


@pytest.mark.accept
@targets
def test_every_tile(target):
    """Aligned rows and others; the default ones in fp16 too."""
    gates.assert_builds("kron", gate.KRON_EVERY, target)
    for row in gate.rows("kron", gate.KRON_DEFAULT, [target], dtype=torch.float16):
        assert not row.faults(), gate.markdown([row])


@targets
def test_every_legal_tile_is_among_them(target):
    found = {"kron": set(), "kron_grads": set()}
    for shape in gate.KRON_EVERY:
        for case in gate.kron_cases(shape).values():
            for launch in gate.launches(case, target):
                if launch.kernel in gate.kron.KERNELS:
                    a = launch.arguments
                    sizes = [a[s] for s in ("BT", "BI", "BK", "BJ", "BL", "GROUP")]
                    tile = tiles.KronTile(*sizes, launch.options["num_warps"], launch.options["num_stages"])
                    found["kron" if launch.kernel is gate.kron.apply_kernel else "kron_grads"].add(tile)
    assert found == {name: tiles.legal(name, gates.ARCHES[target]) for name in found}


def test_both_gradients_are_built_by_one_kernel_and_by_two():
    for shape, names in zip(gate.KRON_DEFAULT, (["right"], ["left", "right"]), strict=True):
        launches = gate.launches(gate.kron_cases(shape)["dC, dD"], "sm_90")
        assert [f"{n}_kernel" for n in names] == [
            launch.kernel.fn.__name__ for launch in launches if launch.kernel in gate.kron.KERNELS
        ]


def test_offsets_have_64_bits():
    for shape in gate.KRON_DEFAULT:
        for name, case in gate.kron_cases(shape).items():
            for launch in gate.launches(case, "sm_90"):
                assert not gates.narrow_offsets(gate.build(launch, "sm_90").asm["ttir"]), name


def test_no_atomics():
    for case in gate.kron_cases(gate.KRON_DEFAULT[0]).values():
        for launch in gate.launches(case, "sm_90"):
            assert "atomic" not in gate.build(launch, "sm_90").asm["ttir"]


def test_fp32_spills_nothing():
    """Its products use no tensor core, by choice: TF32 would lose what fp32 is for."""
    for row in gate.rows("kron", gate.KRON_DEFAULT, ["sm_90"], dtype=torch.float32):
        assert set(row.faults()) <= {"no tensor-core instruction"}, gate.markdown([row])


def test_scale_and_length_do_not_compile_again():
    C, D, k = gate.meta(64, 64), gate.meta(64, 64), gate.kron

    def hashes(t, scale):
        x = gate.meta(t, 4096)
        calls = (
            lambda: k.fresh(x, C, D, scale, None),
            lambda: k.add(x, x, C, D, scale),
            lambda: k.grads(x, x, C, D, scale, True, True),
            lambda: k.grads(x, x, C, D, scale, True, False),
        )
        return [gate.source(launch).hash() for call in calls for launch in gate.launches(call, "sm_90")]

    first = hashes(4096, 1.0)
    assert len(first) >= 4
    for other in ((4096, 0.37), (4097, 1.0), (2500, 2.0)):
        assert hashes(*other) == first
