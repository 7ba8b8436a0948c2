"""Microbenchmarks: pytest bench/."""

from __future__ import annotations

import pytest
import torch

from bench.harness import FASTPEFT, FROZEN, PEFT_SAME, arms, compare
from fastpeft.job.layerbench import Shape


@pytest.mark.parametrize("arm", [FROZEN, PEFT_SAME, FASTPEFT])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layer(benchmark, method, arm):
    layer = arms(Shape(256, 256, 256), method)[arm]
    x = torch.randn(256, 256, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    benchmark(lambda: torch.autograd.grad(layer(x).sum(), wanted))


def test_a_wrong_arm_is_not_timed(monkeypatch):
    import bench.harness as h

    def broken(*args):
        found = arms(*args)
        found[PEFT_SAME].requires_grad_(True).get_parameter(
            "base_model.model.linear.lora_B.default.weight"
        ).data.mul_(2)
        return found

    monkeypatch.setattr(h, "arms", broken)
    rows = {r["arm"]: r for r in compare("t", Shape(32, 16, 16), "lora", rounds=3)}
    assert not rows[PEFT_SAME]["right"] and "ratio" not in rows[PEFT_SAME]
    assert rows[FASTPEFT]["right"] and "ratio" in rows[FASTPEFT]
