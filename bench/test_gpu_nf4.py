"""The checks of stage part_nf4 notice what is wrong: pytest bench/."""

from __future__ import annotations

import time

import torch

from bench.gpu import part_nf4
from bench.gpu.common import Run
from fastpeft.ops import nf4


def test_a_check_of_bits_can_fail(tmp_path):
    run = Run("cpu", True, tmp_path, time.monotonic() + 100)
    packed = part_nf4.stored(run, (37, 97), 4, 64, True)
    want = torch.empty(37, 97)
    nf4.fill_torch(want, packed)
    right = lambda out: nf4.fill_torch(out, packed)  # noqa: E731
    assert part_nf4.compared(run, want, right, right)["right"]
    wrong = packed._replace(absmax=packed.absmax.roll(1))
    for bad in (lambda out: None, lambda out: nf4.fill_torch(out, wrong), lambda out: out.copy_(want)[0, :1].zero_()):
        for calls in ((bad, right), (right, bad)):
            assert not part_nf4.compared(run, want, *calls)["right"]


def test_a_check_of_layers_can_fail(tmp_path, monkeypatch):
    """Scales that are off by half a unit of fp16 are other bits. In fp16: the small call takes dense fp32 weights."""

    class Half(Run):
        dtypes = [torch.float16]  # noqa: RUF012

    monkeypatch.setattr(part_nf4, "IMPL", "torch")
    run = Half("cpu", True, tmp_path, time.monotonic() + 100)
    checks = {(h["what"], h["case"]): work for h, work in part_nf4.layer_tasks(run)}
    work = checks["nf4, lora", "eager"]
    assert work()["right"]
    real = part_nf4.bases

    def other(*args):
        base, dense = real(*args)
        base.packed.absmax.copy_(base.packed.absmax * (1 + 2**-11))
        return base, dense

    monkeypatch.setattr(part_nf4, "bases", other)
    assert not work()["right"]
