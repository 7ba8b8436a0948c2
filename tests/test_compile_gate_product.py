"""The base product with the low-rank share in it, built for GPUs without a GPU."""

from __future__ import annotations

import re

import gates
import pytest
import torch

from bench import gate

FAMILIES = [(family, target) for family, of in gate.ONLY.items() for target in of]


@pytest.mark.parametrize("family,target", FAMILIES)
def test_default(family, target):
    gates.assert_builds(family, gate.SIZES[family][0], target)


@pytest.mark.accept
@pytest.mark.parametrize("family,target", FAMILIES)
def test_every_tile(family, target):
    for dtype in (torch.bfloat16, torch.float16):
        bad = [r for r in gate.rows(family, gate.SIZES[family][1], [target], dtype=dtype) if r.faults()]
        assert not bad, gate.markdown(bad)


def test_the_share_is_a_step_of_the_same_ring():
    """In Gluon it takes no matrix instruction and no buffer of its own."""
    tile = gate.product_hopper.ProductTile()
    found = {}
    for name, case in gate.product_cases(tile).items():
        (launch,) = gate.launches(case, "sm_90")
        built = gate.build(launch, "sm_90")
        found[name] = (len(re.findall(r"wgmma\.mma_async", built.asm["ptx"])), built.metadata.shared)
    for direction in ("y", "dx"):
        (plain, small), (shared, large) = found[direction], found[f"{direction}, share"]
        # the steps' descriptors lie beside the buffers
        assert plain == shared and large - small < 64, found


def test_a_tile_that_spills_is_a_fault():
    tile = gate.product.PlainTile(rows=256, cols=256, stages=1)
    (launch,) = gate.launches(gate.product_cases(tile)["y"], "sm_90")
    assert any("spills" in fault for fault in gate.row("y", launch, "sm_90").faults())
