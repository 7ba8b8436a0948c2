"""The checks of stage parts notice what is wrong, and every arm of stage structured is right: pytest bench/."""

from __future__ import annotations

import time

import pytest
import torch

from bench.arms import AGAIN, FROZEN
from bench.gpu import part_operators as whole
from bench.gpu import part_sparse as entries
from bench.gpu import structured_layers, structured_routes
from bench.gpu.common import Run
from bench.gpu.part_layers import LAYERS, check, layer_arm, shira_arms
from bench.gpu.part_operators import Case
from bench.harness import inputs
from fastpeft.job.layerbench import Shape
from fastpeft.ops import khatri_rao, kron, sparse

F32 = torch.float32
SIZES = {"kron": (kron, (5, 7, 8, 5)), "hadamard": (khatri_rao, (40, 35, 3))}


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("name", whole.OPERATORS)
def test_an_operator_check_of_a_gpu_stage_can_fail(family, name):
    code, size = SIZES[family]
    m = whole.make(Case(family, 33, size, F32, F32), "cpu")
    got = whole.OPERATORS[name](m, code)
    assert whole.wrong(name, m, got)[1] == []
    for output, tensor in got.items():
        for bad in (tensor * 1.001, tensor * float("nan"), tensor[:-1], tensor.double()):
            assert whole.wrong(name, m, got | {output: bad})[1], output


def test_a_gradient_that_was_not_asked_for_is_noticed():
    class Generous:
        @staticmethod
        def back(dz, x, tensors, scale, dx, need_x, needs):
            return kron.back(dz, x, tensors, scale, dx, need_x, (True, True))

    with pytest.raises(AssertionError, match="dC was asked for"):
        whole.alone(whole.make(Case("kron", 33, (5, 7, 8, 5), F32, F32), "cpu"), Generous)


class Wrong:
    """Sparse code that misses the last entry, keeps the wrong numbers, or does not put W back."""

    @staticmethod
    def copy(W, values, index, out):
        sparse.copy(W, values[:-1], index[:, :-1].contiguous(), out)

    @staticmethod
    def put(W, values, index):
        return sparse.put(W, values, index) * 1.001

    @staticmethod
    def restore(W, index, saved):
        pass


def test_a_sparse_check_of_a_gpu_stage_can_fail():
    make = lambda: entries.make(Case("sparse", 33, (40, 35, 60), F32, F32), "cpu")  # noqa: E731
    m = make()
    for call in entries.TORCH.values():
        right = call(m.dz, m.x, m.index)
        assert entries.gradient(m, call)[1] == []
        for bad in (right * 1.001, right * float("nan"), right[:-1]):
            assert entries.gradient(m, lambda dz, x, index, bad=bad: bad)[1]
    assert entries.copy(make(), sparse) == entries.window(make(), sparse) == []
    assert entries.copy(make(), Wrong) == ["out has other bits"]
    assert entries.window(make(), Wrong) == ["saved has other bits", "W after has other bits"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_check_of_a_gpu_stage_can_fail(name, dtype):
    size = Shape(33, 40, 36, dtype=dtype)
    method, small, _ = LAYERS[name]
    arm = layer_arm(size, name, method, small)
    assert check(arm, *inputs(size))[1] == []
    for parameter in arm.parameters.values():
        with torch.no_grad():
            before = parameter.clone()
            parameter.mul_(1.1)
        found = check(arm, *inputs(size))[1]
        # a 16-bit y rounds away a tenth of LoHa's small update; the other factors' gradients show it
        assert "y" in found if dtype is torch.float32 or "values" in arm.parameters else found
        with torch.no_grad():
            parameter.copy_(before)


def test_peft_shira_beside_random_masking():
    size = Shape(33, 40, 36)
    for arm in shira_arms(size, "SHiRA", 1):
        assert check(arm, *inputs(size))[1] == []
        arm.index = arm.index.flip(1)
        assert check(arm, *inputs(size))[1]


@pytest.fixture
def run(tmp_path):
    return Run("cpu", True, tmp_path, time.monotonic() + 100)


def test_every_arm_of_structured_layers_but_triton_is_right(run):
    for title, shape in structured_layers.settings(run):
        arms = structured_layers.arms(run, title, shape)
        size = Shape(*shape, dtype=torch.float16)
        for name, arm in arms.items():
            if arm.impl != "triton":
                assert check(arm, *inputs(size))[1] == [], name
        weights = {getattr(a.layer, "base_layer", a.layer).weight.data_ptr() for a in arms.values()}
        assert len(weights) == 1 and {FROZEN, AGAIN} <= set(arms)


def test_a_wrong_route_is_not_timed(run, monkeypatch):
    monkeypatch.setattr(
        entries, "TRITON", {"grad by sddmm": lambda dz, x, index: torch.zeros(index.shape[1])}
    )
    rows = {r["route"]: r for r in structured_routes.sparse_routes(run, 0.02)}
    assert not rows["triton, grad by sddmm"]["right"] and "us" not in rows["triton, grad by sddmm"]
    assert rows["torch, grad by chunk"]["right"] and rows["torch, grad by chunk"]["ratio"] == 1
    assert "not timed" in structured_routes.line(
        {"what": "sparse routes", "density": 0.02} | rows["triton, grad by sddmm"], False
    )
