"""Every recipe under torch.compile(fullgraph=True): at most two graphs over batch sizes and sequence lengths."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from sharded import MORE, RECIPES, WIDTH, Tower, adapted, gradients
from tolerance import assert_fp64

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# from few tokens to more than any threshold of the products on the CPU knows (fastpeft.ops.lowrank_cpu.SMALL numbers of x, and
# more tokens than a layer is wide)
SHAPES = [(3, 5), (2, 9), (4, 40), (8, 300)]
# a size of one is a graph of its own in any model, a frozen one too: torch.compile specialises on 0 and 1
ONES = [(1, 12), (7, 1)]
ALL = [c for c in RECIPES + list(MORE) if c != "a mask, overlaid"]  # an overlay writes W in place, and says that it cannot be compiled
# a hook of the compiled model itself is a graph of its own: this one composes the update, once whatever the batch
HOOKS = {"superlora, one composition": 1}
# one of each way through the products; the others with make accept
FIRST = ("lora", "dora", "lokr", "rosa", "melora")


def counted(model, shapes):
    """The number of graphs after each shape; in fp64 output and gradients are those of the uncompiled model."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled, seen = torch.compile(model, backend=graphs, fullgraph=True), []
    dtype = next(model.parameters()).dtype
    for k, shape in enumerate(shapes):
        x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(k)).to(dtype)
        got = step(compiled, model, x)
        if dtype is F64:
            want = step(model, model, x)
            assert got.keys() == want.keys()
            for n in (n for n in want if want[n] is not None or got[n] is not None):
                assert_fp64(got[n], want[n], f"{n} at {shape}")
        seen.append(graphs.frame_count)
    return seen


def step(run, model, x):
    """Output and gradients."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.square().mean().backward()
    return {"y": y.detach(), "x": x.grad} | gradients(model)


def cases():
    """fp32 takes the C++ products where it is not traced, fp64 is exact; test_methods_in_models.py has every method in fp64."""
    yield pytest.param("dora", BF16, id="dora-bfloat16")  # whose dx starts with the base product (fastpeft.ops.lowrank.base_first)
    for case in ALL:
        for dtype in (F32, F64) if case in FIRST else (F32,):
            quick = case in FIRST and dtype is F32
            yield pytest.param(case, dtype, marks=[] if quick else pytest.mark.accept, id=f"{case}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize(("case", "dtype"), list(cases()))
def test_two_graphs(case, dtype):
    seen = counted(adapted(case, dtype), SHAPES)
    assert seen[-1] - HOOKS.get(case, 0) <= 2, f"graphs after {SHAPES}: {seen}"


@pytest.mark.accept
@pytest.mark.parametrize("case", FIRST[:2])
def test_a_size_of_one_is_as_in_a_frozen_model(case):
    frozen = Tower(F32)
    assert counted(adapted(case, F32), SHAPES + ONES) == counted(frozen, SHAPES + ONES)


def test_a_threshold_is_seen():
    """A layer that asks for the number of tokens makes a graph for either side."""

    class Asks(Tower):
        def forward(self, x):
            return super().forward(x) * (2.0 if x.shape[0] * x.shape[1] < 100 else 3.0)

    assert counted(Asks(F32), SHAPES)[-1] > 2
