"""accelerate under torch.compile(fullgraph=True), which breaks in PEFT's own DoRA, LoHa and LoKr."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from accelerated import accelerated, inputs, stock
from tolerance import assert_as_good

F32, BF16 = torch.float32, torch.bfloat16


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.accept)


@pytest.mark.parametrize("family, base", [("lora", F32), ("dora", BF16), ("lokr", BF16), slow("lora", BF16), slow("dora", F32),
                                          slow("adalora", F32), slow("loha", F32)])  # fmt: skip
def test_compiles_whole(family, base):
    """One graph for the model, with dropout where there is one and fp32 adapters; as good as eager code under the same mask."""
    dropped = {"lora_dropout": 0.3} if family == "lora" or (family, base) == ("dora", F32) else {}
    model = stock(family, dtype=F32, **dropped)
    for name, p in model.named_parameters():
        p.data = p.data.to(base if "base_layer" in name else F32)
    ours = accelerated(model)
    exact = copy.deepcopy(ours).double()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for lead in ((3, 5), (7,)):
        found = []
        for run, dtype in ((compiled, base), (exact, torch.float64), (ours, base)):
            x = inputs(*lead, dtype=base).to(dtype).requires_grad_()
            torch.manual_seed(1)
            y = run(x)
            found.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
        for got, want, plain in zip(*found, strict=True):
            assert_as_good(got, want, plain)
