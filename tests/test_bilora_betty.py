"""BiLoRA's two levels beside Betty 0.2.1's "darts" on the dense formula: each gradient of E, and A, B and E after several steps, in fp64.

0.1.1 has the same gradients and leaves A and B at V - e v after each (Betty's pull request 13).
"""

from __future__ import annotations

import functools

import pytest
import torch
from test_bilora_procedure import adapted, batch, dense, leaves, own, r1
from tolerance import assert_fp64
from torch import nn

from fastpeft import train
from fastpeft.method.bilora import VALUES, binary_entropy
from fastpeft.train.bilora import UPPER

pytest.importorskip("betty.hypergradient")
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem

STEPS, GAMMA1, GAMMA2, RADIUS, LR, LR_E = 6, 0.05, 0.02, 0.01, 0.05, 0.1
LOWER = functools.partial(torch.optim.AdamW, lr=LR, weight_decay=0.1)


def lower_batch(k):
    return batch(k)


def upper_batch(k):
    return batch(100 + k)


class Level(ImplicitProblem):
    """A problem of Betty's over named tensors: loss(batch); batches: k -> batch."""

    def __init__(self, name, parameters, optimizer, batches, loss, **config):
        super().__init__(name, Config(**config), nn.ParameterList(parameters), optimizer(parameters))
        self.batches, self.taken, self.training_step = batches, 0, loss

    def patch_optimizer(self):
        """Betty builds it anew from its defaults, some of which a newer torch's AdamW does not take: it stays."""

    def get_batch(self):
        self.taken += 1
        return self.batches(self.taken - 1)


class Upper(Level):
    """Keeps each gradient, and the direct part of it, which comes first."""

    def __init__(self, *args, **config):
        super().__init__(*args, **config)
        self.direct, self.found = [], []

    def set_grads(self, params, grads):
        if len(self.direct) == len(self.found):
            self.direct.append([g.clone() for g in grads])
        super().set_grads(params, grads)

    def optimizer_step(self):
        self.found.append([p.grad.clone() for p in self.module])
        super().optimizer_step()


def theirs(model, kind, unroll):
    """Betty's run of the paper's formula: the upper problem, E and V by name."""
    E, V = ({n: nn.Parameter(p.detach()) for n, p in group.items()} for group in leaves(model))

    def values(e):
        return e.softmax(0) if kind == "softmax" else e if kind == "real" else e.sigmoid()

    def upper_loss(b):
        entropy = sum(binary_entropy(values(e)) for e in E.values()) if kind == "sigmoid" else 0.0
        return dense(model, E | V, b) + GAMMA2 * entropy

    lower = Level("lower", list(V.values()), LOWER, lower_batch, lambda b: dense(model, E | V, b) + GAMMA1 * r1(V), darts_alpha=RADIUS,
                  unroll_steps=unroll)  # fmt: skip
    upper = Upper("upper", list(E.values()), functools.partial(UPPER, lr=LR_E), upper_batch, upper_loss, retain_graph=True)
    Engine([lower, upper], EngineConfig(train_iters=STEPS), {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}).run()
    return upper, E, V


def ours(model, kind, unroll):
    """The gradients that E stepped along; the model has taken the steps."""
    weights = {"gamma1": GAMMA1, "gamma2": GAMMA2 if kind == "sigmoid" else 0.0}
    bilevel, found = train.BiLoRABilevel(upper_batch, lower_steps=unroll, lr=LR_E, radius=RADIUS, **weights), []
    real = bilevel.hypergradient
    bilevel.hypergradient = lambda *a: found.append([g.clone() for g in real(*a)]) or found[-1]
    optimizer = train.build_optimizer(model.train(), [bilevel], torch.optim.AdamW, lr=LR, weight_decay=0.1)
    with train.attach(model, optimizer, [bilevel]) as runner:
        for k in range(STEPS):
            model(**lower_batch(k))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    return found


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("kind", VALUES)
def test_equals_betty(kind, unroll, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # Betty would move its tensors, and not the data
    model = adapted(values=kind)
    upper, E, V = theirs(model, kind, unroll)
    found = ours(model, kind, unroll)
    assert len(found) == len(upper.found) == STEPS // unroll
    for k, (got, want) in enumerate(zip(found, upper.found, strict=True)):
        for name, g, w in zip(E, got, want, strict=True):
            assert_fp64(g, w, f"gradient {k} of {name}")
    for whole, direct in zip(upper.found, upper.direct, strict=True):
        assert all((w - d).norm() > 1e-2 * d.norm() for w, d in zip(whole, direct, strict=True)), "the second term shows nothing"
    for now, want in zip(own(model), (E, V), strict=True):
        for name, p in now.items():
            assert_fp64(p.detach(), want[name].detach(), name)
