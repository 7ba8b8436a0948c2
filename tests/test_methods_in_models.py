"""Every method under torch.compile and in generate()."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from checks import DT, perturb, rand, with_masks
from test_methods import DROPPING, METHODS, ON_FFN, adapted, every, fresh, grads, small
from tolerance import assert_fp64

import fastpeft

# one of each way through the products and of each kind of hook; the others with make accept
FIRST = {"lora", "dora", "lokr", "loha", "rosa", "hydralora", "moa", "lotr", "krona_b"}


def first(names):
    return pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.accept) for n in names])


def counted():
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


@first(METHODS)
def test_compile_fullgraph(name):
    """Training with gradients, then eval; at most two graphs over four batch sizes."""
    model, graphs = adapted(name).train(), counted()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for rows in (3, 5, 7, 11):
        x = rand(rows, 16)
        got, want = compiled(x), model(x)
        assert_fp64(got, want, "y")
        exact = grads(want, model, x)
        for n, g in grads(got, model, x).items():
            assert_fp64(g, exact[n], n)
    # (the hook of a model that is a block itself is compiled apart)
    assert graphs.frame_count <= (4 if name == "moa" else 2), f"{graphs.frame_count} graphs for four batch sizes"
    model.eval()
    with torch.no_grad():
        assert_fp64(compiled(x), model(x), "eval")


@first(METHODS)
def test_compile_with_everything_frozen(name):
    model, x = adapted(name).requires_grad_(False), rand(5, 16, grad=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        model.train(mode)
        assert_fp64(compiled(x), model(x), f"train={mode}")
    x.requires_grad_()
    got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model))
    assert_fp64(got, want, "dx")


@first(DROPPING)
def test_compile_with_dropout(name):
    """A compiled step draws a mask, and a new one at the next step; its gradient is that of its own mask."""
    model, x = adapted(name, fresh(name), dropout=0.5).train(), rand(5, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))
    torch.manual_seed(1)
    (dx,) = torch.autograd.grad(compiled(x).sum(), x)
    step, direction, values = 1e-4, torch.randn_like(x), []
    for sign in (1, -1):
        torch.manual_seed(1)
        values.append(compiled((x + sign * step * direction).detach().requires_grad_()).sum())
    # a central difference is off by O(step^2) = 1e-8; another mask would be off by O(1)
    assert abs((values[0] - values[1]) / (2 * step) - (dx * direction).sum()) < 1e-4


@every
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generate_with_and_without_cache(name, architecture, request):
    model = request.getfixturevalue(architecture).to(DT)
    prompt = torch.tensor([[5, 9, 2, 33]])

    def generate(**options):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False,
                              pad_token_id=0, return_dict_in_generate=True, output_logits=True, **options)  # fmt: skip

    before = generate()
    report = fastpeft.adapt(model, name, **small(name))
    sites = 2 if name in ON_FFN else {"gpt2": 8, "llama": 14}[architecture]
    assert len(report.adapted) == sites and not report.skipped
    perturb(with_masks(model))
    with_cache, without = generate(use_cache=True), generate(use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    for a, b in zip(with_cache.logits, without.logits, strict=True):
        assert_fp64(a.double(), b.double(), "logits")
    assert not torch.equal(with_cache.logits[0], before.logits[0]), "the adapter does nothing"


def test_registry_is_not_empty():
    assert set(METHODS) >= FIRST
