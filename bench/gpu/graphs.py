"""A training step of a layer, captured once as a CUDA graph and replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.arms import Arm
from bench.gpu.common import Row, Run
from bench.oracle import SEED


def graph_check(run: Run, arm: Arm) -> Row:
    """A replay on another x gives eager's bits; with dropout, after the same manual_seed, and two replays
    differ.
    """
    if not run.cuda:
        return {"skipped": "CUDA only"}
    t, i, o = (33 if run.dry else 2048), arm.layer.in_features, arm.layer.out_features
    kw = {"dtype": run.dtype, "device": run.device}
    x = torch.randn(t, i, **kw).requires_grad_()
    dy, other = torch.randn(t, o, **kw), torch.randn(t, i, **kw)
    with arm.using():
        graph, held = capture(arm, x, dy)
        with torch.no_grad():
            x.copy_(other)
        torch.manual_seed(SEED)
        graph.replay()
        first = [h.clone() for h in held]
        torch.manual_seed(SEED)
        eager = step(arm, x, dy)
    found = [] if all(map(torch.equal, first, eager)) else ["replay differs from eager"]
    if arm.dropout:
        graph.replay()
        found += ["two replays drop the same"] if torch.equal(held[0], first[0]) else []
    return {"right": not found, "wrong": ", ".join(found)}


def step(arm: Arm, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and the adapter's gradients."""
    y = arm.forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *arm.parameters.values()], dy)]


def capture(arm: Arm, x: Tensor, dy: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of one step, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(arm, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(arm, x, dy)
    return graph, held
