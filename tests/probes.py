"""Does a method do X? One small run per method and column of docs/MATRIX.md, each held against a model that shows what is right.

A probe returns a remark ("" for none) where it works and lets the library's own error through where it does not; a wrong number is an
AssertionError, which is no cell but a defect.
"""

from __future__ import annotations

import copy
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from checks import DT, perturb, rand, with_masks
from test_methods import ON_FFN, adapted, effective, fresh, grads, method_of, small, trainable
from tolerance import assert_fp64

import fastpeft
from fastpeft.adapter import base_of, is_adapted
from fastpeft.registry import get_recipe

PACKAGE = str(Path(fastpeft.__file__).parent)
# what PEFT's layout of the method needs and the defaults do not have
IN_PEFT = {"random_masking": ("rank",)}


@dataclass(frozen=True)
class Outcome:
    """works, and a remark; or not, and the first clause of the error."""

    works: bool
    remark: str


def outcome(name: str, probe: Callable[[str], str]) -> Outcome:
    """What came of one probe. An error that was not raised by the package itself, or an AssertionError, goes through."""
    torch.manual_seed(0)
    try:
        return Outcome(True, probe(name))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as e:
        if not traceback.extract_tb(e.__traceback__)[-1].filename.startswith(PACKAGE):
            raise
        return Outcome(False, clause(str(e), name))


def clause(message: str, name: str) -> str:
    """The message up to its first stop, with METHOD for the method's name."""
    first = re.split(r"[;.](?=\s|$)|: options", message, maxsplit=1)[0]
    return re.sub(rf"(?<!\w){name}(?!\w)", "METHOD", first)


def state_of(model, into):
    """Load the adapter's values of `model` into another adapted model."""
    needed = {n for n in into.state_dict() if ".adapter." in n or n.startswith("adapter_shared.")}
    own = {n: t for n, t in model.state_dict().items() if n in needed}
    assert own.keys() == needed
    into.load_state_dict(own, strict=False)
    return into


def same(got, want, x):
    """Output and every gradient."""
    assert_fp64(got(x), want(x), "y")
    exact = grads(want(x), want, x)
    for n, g in grads(got(x), got, x).items():
        assert_fp64(g, exact[n], n)


def bias(name):
    """bias="all": every bias gets a gradient and moves, and is saved with the adapter."""
    model = fresh(name)
    plain = copy.deepcopy(model)
    always = get_recipe(name).cls.TRAINS_ALL
    fastpeft.adapt(model, name, bias=None if always else "all", **small(name))
    perturb(with_masks(model))
    own = {n: p for n, p in model.named_parameters() if n.endswith(("up.bias", "down.bias"))}
    before = {n: p.detach().clone() for n, p in own.items()}
    x = rand(5, 16)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    assert len(own) == 2 and all(not torch.equal(p, before[n]) for n, p in own.items())
    with tempfile.TemporaryDirectory() as folder:
        fastpeft.save_adapter(model, folder)
        fastpeft.load_adapter(plain, folder)
    assert torch.equal(plain.eval()(x), model.eval()(x))
    return "always" if always else ""


def dropout(name):
    """It acts in training, with finite gradients of every parameter; in evaluation it is off."""
    options = get_recipe(name).options
    option = next((o for o in ("dropout", "rank_dropout") if o in options), "dropout")
    model, x = adapted(name, **{option: 0.5}), rand(5, 16)
    assert not torch.equal(model.train()(x), model(x))
    got = grads(model(x), model, x)
    assert all(g.isfinite().all() and g.any() for g in got.values()), [n for n, g in got.items() if not g.any()]
    twin = state_of(model, adapted(name, copy.deepcopy(bare(model)))).eval()
    assert_fp64(model.eval()(x), twin(x), "y in evaluation")
    return "" if option == "dropout" else f"as `{option}`"


def bare(model):
    """A copy of the model that was adapted."""
    return fastpeft.unload(copy.deepcopy(model))


def four_bit(name):
    """quantize="nf4": output and gradients are those over the dense weight that the codes stand for; a step leaves the codes alone."""
    if get_recipe(name).options.get("bits") is not None:
        model, x = adapted(name), rand(5, 16)
        same_over_dense(model, x)
        return "quantises by itself (`bits=`)"
    model = fresh(name)
    fastpeft.adapt(model, name, quantize="nf4", **small(name))
    perturb(with_masks(model))
    x = rand(5, 16)
    dense = fresh(name)
    layers = [n for n, m in model.named_modules() if is_adapted(m) and "base" in m.adapter._modules]
    assert layers, "no weight was quantised"
    with torch.no_grad():
        for n, p in dense.named_parameters():
            p.copy_(model.get_parameter(n))
        for n in layers:
            dense.get_submodule(n).weight.copy_(base_of(model.get_submodule(n)).dense(DT))
    same(model, state_of(model, adapted(name, dense)), x)
    stepped_codes(model, x)
    return ""


def stepped_codes(model, x):
    """A step of an optimiser over all that trains leaves the codes as they are."""
    codes = {n: b.clone() for n, b in model.named_buffers() if n.endswith("base.codes")}
    assert codes
    model(x).square().sum().backward()
    torch.optim.SGD(trainable(model).values(), lr=0.01).step()
    assert all(torch.equal(model.get_buffer(n), c) for n, c in codes.items())


def same_over_dense(model, x):
    assert_fp64(model(x), effective(model, x), "y")
    want = grads(effective(model, x), model, x)
    for n, g in grads(model(x), model, x).items():
        assert_fp64(g, want[n], n)
    stepped_codes(model, x)


def several(name):
    """A second method at the same layers: both train, and with the second one's B at zero the first is what it is alone."""
    other = "melora" if name == "lora" else "lora"
    options = small(name)
    model, x = fresh(name), rand(5, 16)
    alone = copy.deepcopy(model)
    fastpeft.adapt(model, [other, name], **options)
    perturb(with_masks(model))
    if name not in ON_FFN:
        assert method_of(model, other) is not method_of(model, name)
    got = grads(model(x), model)
    assert all(g.any() for g in got.values()), [n for n, g in got.items() if not g.any()]
    with torch.no_grad():
        for n, p in model.named_parameters():
            if f".adapter.{other}." in n and n.endswith("B"):
                p.zero_()
    own = {n: t for n, t in model.state_dict().items() if f".adapter.{other}." not in n}
    fastpeft.adapt(alone, name, **options)
    with_masks(alone)
    alone.load_state_dict(own)
    assert_fp64(model(x), alone(x), "y")
    return ""


def merge(name):
    """Merged weights compute the same; an unmerged copy unloads to the old weights, bit for bit."""
    model = fresh(name)
    before = copy.deepcopy(model.state_dict())
    adapted(name, model).eval()
    x = rand(5, 16, grad=False)
    want, twin = model(x), copy.deepcopy(model)
    assert_fp64(fastpeft.merge(twin)(x), want, "y")
    assert not any(is_adapted(m) for m in twin.modules())
    after = fastpeft.unload(model).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    return ""


def export(name):
    """A folder that stock PEFT loads and computes the same from: in PEFT's own layout of the method, or else as a plain LoRA."""
    from peft_layers import peft_logits

    # (a scale of 8 / 2 is exact in the fp32 that PEFT's LoHa rounds it to)
    options = small(name, **({"rank": 2} if "rank" in get_recipe(name).options else {}))
    form = get_recipe(name).cls.PEFT
    config = form.config(get_recipe(name).options | options) if form is not None else None
    model = fresh(name)
    plain = copy.deepcopy(model)
    adapted(name, model, **options).eval()
    x = rand(5, 16, grad=False)
    with tempfile.TemporaryDirectory() as folder:
        (fastpeft.export_lora if config is None else fastpeft.save_adapter)(model, folder)
        assert_fp64(peft_logits(plain, folder, x), model(x), "y in PEFT")
    if config is None:
        return "as a plain LoRA"
    return " ".join([f"as {form.peft_type}", *(f"with `{k}=`" for k in IN_PEFT.get(name, ()))])


def compiled(name):
    """torch.compile(fullgraph=True): output and gradients of a training step, and evaluation."""
    torch._dynamo.reset()
    model, x = adapted(name).train(), rand(5, 16)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = fast(x), model(x)
    assert_fp64(got, want, "y")
    exact = grads(want, model, x)
    for n, g in grads(got, model, x).items():
        assert_fp64(g, exact[n], n)
    assert_fp64(torch.compile(model.eval(), backend="aot_eager", fullgraph=True)(x), model(x), "eval")
    return ""


def checkpointing(name):
    """Both kinds of torch.utils.checkpoint give output and gradients bit for bit, dropout included."""
    options = {"dropout": 0.3} if "dropout" in get_recipe(name).options else {}
    model, x, seen = adapted(name, **options).train(), rand(5, 16), []
    for reentrant in (None, True, False):
        torch.manual_seed(3)
        y = model(x) if reentrant is None else torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        seen.append({"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in trainable(model).items()})
        x.grad = None
        model.zero_grad()
    for other in seen[1:]:
        for n in seen[0]:
            assert torch.equal(seen[0][n], other[n]), n
    return ""


# column -> probe; those of FAST run in every test run, the others with make accept, as FSDP2 does (tests/sharding.py)
FAST = {
    "bias": bias,
    "dropout": dropout,
    "4-bit base": four_bit,
    "two adapters": several,
    "merge": merge,
    "export": export,
    "checkpointing": checkpointing,
}
PROBES = FAST | {"compile": compiled}
