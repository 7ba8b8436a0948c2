"""The low-rank kernels built for four GPUs without a GPU: no spills, no f64, tensor cores used, shared memory that fits."""

from __future__ import annotations

from unittest import mock

import gates
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from bench import gate

tiles = gate.tiles
targets = pytest.mark.parametrize("target", gate.TARGETS)


def test_the_gate_builds_for_four_targets():
    assert set(gate.TARGETS.values()) == {
        GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)
    }  # fmt: skip


@targets
def test_default_tile(target):
    gates.assert_builds("lowrank", gate.DEFAULT, target)


@pytest.mark.accept
@targets
def test_every_tile(target):
    gates.assert_builds("lowrank", gate.EVERY, target)


@targets
@pytest.mark.parametrize("kernel", ["shrink", "expand", "outer"])
def test_every_legal_tile_is_among_them(kernel, target):
    assert gates.built_tiles("lowrank", kernel, target) == tiles.legal(kernel, gates.ARCHES[target])


def test_offsets_have_64_bits():
    for name, case in gate.lowrank_cases(16).items():
        if "dropout" in name:
            continue  # the generator multiplies in 32 bits; its offsets are made by the same lines
        for launch in gate.launches(case, "sm_90"):
            assert not gates.narrow_offsets(gate.build(launch, "sm_90").asm["ttir"]), name


def hashes(call):
    return [gate.source(launch).hash() for launch in gate.launches(call, "sm_90")]


def test_scale_dropout_rate_and_length_do_not_compile_again():
    k, meta = gate.lowrank, gate.meta
    A, B, seed = meta(16, 4096), meta(4096, 16), meta(dtype=torch.int64)

    def calls(t, scale, p):
        x, u = meta(t, 4096), meta(t, 16)
        return [
            hash_
            for call in (
                lambda: k.down(x, A, x.dtype, seed, p, 1),
                lambda: k.up(u, B, scale, 1, None),
                lambda: k.up_add(x, u, B, scale, 1),
                lambda: k.dx(u, A, seed, p, 1),
                lambda: k.dx_add(x, u, A, seed, p, 1),
                lambda: k.da(x, u, A, seed, p, 1),
                lambda: k.du_db(x, u, B, scale, 1, True, True),
            )
            for hash_ in hashes(call)
        ]  # fmt: skip

    first = calls(4096, 1.0, 0.1)
    assert len(first) >= 5
    for other in ((4096, 0.37, 0.1), (4096, 1.0, 0.5), (4097, 1.0, 0.1), (2500, 2.0, 0.2)):
        assert calls(*other) == first


@triton.jit
def faulty_kernel(x, y, BT: tl.constexpr):
    at = tl.arange(0, BT)[:, None] * BT + tl.arange(0, BT)[None, :]
    a = tl.load(x + at)
    tl.store(y + at, (tl.sum(a.to(tl.float64), 1)[:, None] + tl.dot(a, a)).to(tl.float32))


def built(kernel, **arguments):
    return gate.Launch(kernel, arguments, {"num_warps": 4, "num_stages": 2})


@targets
def test_f64_is_seen(target):
    x, y = gate.meta(16, 16, dtype=torch.float32), gate.meta(16, 16, dtype=torch.float32)
    found = gate.row("", built(faulty_kernel, x=x, y=y, BT=16), target).faults()
    assert any("f64" in f for f in found)


def test_a_product_without_tensor_cores_is_seen():
    """fp32 in full precision uses none."""
    case = gate.lowrank_cases(16, dtype=torch.float32)["up_add"]
    (launch,) = gate.launches(case, "sm_90")
    assert gate.row("", launch, "sm_90").faults() == ["no tensor-core instruction"]


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_spills_are_seen(target):
    with mock.patch.object(tiles, "outer", lambda *a: tiles.Tile(64, 256, 128, 4, 2)):
        launch = gate.launches(gate.lowrank_cases(128)["du_db_gain"], target)[0]
    assert any("spills" in f for f in gate.row("", launch, target).faults())


def test_shared_memory_over_the_limit_is_seen():
    with mock.patch.object(tiles, "shrink", lambda *a: tiles.Tile(128, 128, 128, 8, 6)):
        launch = gate.launches(gate.lowrank_cases(128, factor=torch.bfloat16)["down"], "sm_80")[0]
    assert any("shared memory" in f for f in gate.row("", launch, "sm_80").faults())


def test_32_bit_offsets_are_seen():
    x = gate.meta(16, 16, dtype=torch.float32)
    ttir = gate.build(built(faulty_kernel, x=x, y=x, BT=16), "sm_90").asm["ttir"]
    assert gates.narrow_offsets(ttir)
