"""accelerate in the dtypes that PEFT models have: no further from fp64 than stock PEFT in the same dtypes, value by value."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastpeft

peft = pytest.importorskip("peft")

from accelerated import (  # noqa: E402
    FAMILIES,
    accelerated,
    assert_rule,
    assert_same,
    counted,
    inputs,
    outcome,
    stock,
)
from checks import seed_after  # noqa: E402
from peft_layers import Mask as WideMask  # noqa: E402

from fastpeft.base import Plain  # noqa: E402
from fastpeft.linear import run_terms  # noqa: E402
from fastpeft.terms import Gain, Kron, LowRank, Sparse  # noqa: E402

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# base, adapters, autocast
KINDS = {
    "fp32": (F32, F32, None),
    "bf16 base": (BF16, F32, None),
    "fp16 base": (F16, F32, None),
    "bf16": (BF16, BF16, None),
    "bf16 adapters": (F32, BF16, None),
    "autocast": (F32, F32, BF16),
    "autocast, bf16 base": (BF16, F32, BF16),
}
ONE = [f for f in FAMILIES if f not in ("pissa", "rslora", "lokr_both")]


class Wider(nn.Module):
    """One linear wide enough for rounding to show."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(96, 64)

    def forward(self, x):
        return self.up(x)


def built(family, base, adapters, **changes):
    """A stock model with its base and its adapters in these dtypes, and the same values in fp64."""
    theirs = stock(family, Wider(), ["up"], dtype=F32, **changes)
    for name, p in theirs.named_parameters():
        p.data = p.data.to(base if "base_layer" in name else adapters)
    return theirs, copy.deepcopy(theirs).double()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("family", ONE)
def test_as_good_as_peft(family, kind):
    base, adapters, autocast = KINDS[kind]
    if family == "shira" and adapters is not base and adapters is BF16:
        pytest.skip("PEFT adds sparse entries of another dtype to no weight")
    theirs, exact = built(family, base, adapters)
    ours = accelerated(theirs)
    x = inputs(64, features=96, dtype=base)
    got, plain = outcome(ours, x, autocast=autocast), outcome(theirs, x, autocast=autocast)
    assert_rule(got, outcome(exact, x.double()), plain)
    assert fastpeft.fused_calls() == {counted(family): 1}, fastpeft.peft_calls()


@pytest.mark.parametrize("family", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["fp32", "bf16 base", "autocast"])
def test_dropout_as_good_as_peft(family, kind):
    base, adapters, autocast = KINDS[kind]
    theirs, exact = built(family, base, adapters, lora_dropout=0.3)
    ours = accelerated(theirs)
    x = inputs(64, features=96, dtype=base)
    mask = fastpeft.dropout_mask(seed_after(5), x.shape, 0.3)
    for model in (theirs, exact):
        model.base_model.model.up.lora_dropout["default"] = Mask(mask)
    seed_after(5)
    got = outcome(ours, x, autocast=autocast)
    if (family, kind) == ("dora", "bf16 base"):
        assert not fastpeft.fused_calls() and all("second base product" in why for _, why in fastpeft.peft_calls())
        assert "1: fused under autocast only" in str(fastpeft.accelerate(ours))
        return
    assert_rule(got, outcome(exact, x.double()), outcome(theirs, x, autocast=autocast))
    assert fastpeft.fused_calls() == {family: 1}


class Mask(WideMask):
    """In x's dtype, as torch's dropout computes."""

    def forward(self, x):
        return x * self.mask.to(x.dtype)


WIDE = pytest.mark.parametrize("family", ["lora", "lora_bias", "dora", "adalora", "loha", "lokr"])


@WIDE
@pytest.mark.parametrize("rows", [1, 700])
def test_fp64_adapters_on_an_fp32_base_are_computed_in_fp64(family, rows):
    """The wide products, over one slab and several: nothing rounds dA and dB, which equal PEFT's to fp64's last digits."""
    theirs, exact = built(family, F32, F64)
    ours = accelerated(theirs)
    x = inputs(rows, features=96, dtype=F32)
    got, want, true = outcome(ours, x), outcome(theirs, x), outcome(exact, x.double())
    assert fastpeft.fused_calls() == {counted(family): 1}, fastpeft.peft_calls()
    own = [n for n in want if n not in ("y", "x") and "magnitude" not in n]  # a magnitude's meets the rounded base product
    assert own and all(want[n].dtype is F64 for n in own)
    assert_same({n: got[n] for n in own}, {n: want[n] for n in own})
    assert_rule(*({n: v for n, v in seen.items() if n not in own} for seen in (got, true, want)))


@WIDE
@pytest.mark.parametrize("base, adapters", [(F32, F64), (F32, F32)], ids=str)
def test_no_rows(family, base, adapters):
    theirs, _ = built(family, base, adapters)
    got = outcome(accelerated(theirs), inputs(0, features=96, dtype=base))
    for name, value in outcome(theirs, inputs(0, features=96, dtype=base)).items():
        assert got[name].shape == value.shape and got[name].dtype is value.dtype and not got[name].any(), name


def test_what_is_not_computed_in_a_wider_dtype_is_refused():
    W, A, B = torch.randn(6, 8, dtype=BF16), torch.randn(2, 8), torch.randn(6, 2)
    x, index = torch.randn(3, 8, dtype=BF16), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    for terms, what in (
        ([LowRank(A, B, mid=lambda u, p, x: u)], "mid"),
        ([Sparse(torch.randn(2), index)], "Sparse"),
        ([Kron(torch.randn(2, 2), torch.randn(3, 4)), Gain(torch.rand(6))], "beside a gain"),
    ):
        with pytest.raises(ValueError, match=what):
            run_terms(x, Plain(W), None, terms, inner=F32)


def test_no_cast_of_the_input():
    """With casting disabled and other dtypes PEFT's own forward runs, and says what is wrong."""
    theirs, _ = built("lora", F32, F64)
    ours = accelerated(theirs)
    with peft.helpers.disable_input_dtype_casting(ours):
        with pytest.raises(RuntimeError, match="dtype"):
            ours(inputs(4, features=96, dtype=F32))
        ours.float()
        ours(inputs(4, features=96, dtype=F32))
    assert fastpeft.fused_calls() == {"lora": 1}


def test_an_input_that_fits_nothing_is_pefts_to_refuse():
    theirs, _ = built("lora", F32, F32)
    ours = accelerated(theirs)
    for x in (inputs(4, features=96), inputs(4, features=95, dtype=F32)):
        with pytest.raises(RuntimeError) as error:
            theirs(x)
        with pytest.raises(RuntimeError, match=str(error.value)[:20]):
            ours(x)


def test_no_wide_copy_of_x_is_kept():
    """bf16 base, fp32 adapters: backward keeps x as it came, where PEFT keeps it in fp32."""
    theirs, _ = built("lora", BF16, F32)
    ours = accelerated(theirs)
    x = inputs(64, features=96, dtype=BF16).requires_grad_()

    def kept(model):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
            model(x)
        return {t.dtype for t in found if t.shape == x.shape}

    assert kept(ours) == {BF16} and F32 in kept(theirs)
