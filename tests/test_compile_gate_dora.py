"""DoRA's norm kernel built for four GPUs without a GPU."""

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
    gates.assert_builds("dora", gate.DEFAULT, target)


@pytest.mark.accept
@targets
def test_every_tile(target):
    gates.assert_builds("dora", gate.EVERY, target)


@targets
def test_every_legal_tile_is_among_them(target):
    assert gates.built_tiles("dora", "norm", target) == gate.tiles.legal("norm", gates.ARCHES[target])


def test_offsets_have_64_bits():
    for name, case in gate.dora_cases(16).items():
        for launch in gate.launches(case, "sm_90"):
            assert not gates.narrow_offsets(gate.build(launch, "sm_90").asm["ttir"]), name


def test_fp32_factors_spill_nothing():
    """Their products use no tensor core, by choice: TF32 would lose what DoRA's norm needs."""
    for row in gate.rows("dora", gate.DEFAULT, factor=torch.float32):
        assert set(row.faults()) <= {"no tensor-core instruction"}, gate.markdown([row])
