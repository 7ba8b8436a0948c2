"""The kernels of stored weights built for four GPUs without a GPU."""

from __future__ import annotations

import re

import gates
import pytest
import torch
from triton.backends.compiler import GPUTarget

from bench import gate

targets = pytest.mark.parametrize("target", gate.TARGETS)


@targets
def test_default(target):
    assert isinstance(gate.TARGETS[target], GPUTarget)
    gates.assert_builds("nf4", gate.NF4_DEFAULT, target)


@targets
def test_fp32(target):
    assert not [r for r in gate.rows("nf4", gate.NF4_DEFAULT, [target], dtype=torch.float32) if r.faults()]


@pytest.mark.accept
@targets
def test_every_width(target):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bad = [r for r in gate.rows("nf4", gate.NF4_EVERY, [target], dtype=dtype) if r.faults()]
        assert not bad, gate.markdown(bad)


def test_a_nested_scale_is_not_fused():
    """Two roundings, as bitsandbytes has them: an fma would have one."""
    for target, fused in (("sm_90", r"\bfma\.rn"), ("gfx942", r"\bv_(?:pk_)?fma")):
        (launch,) = gate.launches(gate.nf4_cases(4)["codes, nested scales"], target)
        text = gate.build(launch, target).asm["ptx" if target == "sm_90" else "amdgcn"]
        assert re.search(r"\bmul\.f32|\bmul\.rn\.f32|\bv_(?:pk_)?mul_f32", text) and not re.search(fused, text)
        launch.options["enable_fp_fusion"] = True
        text = gate.build(launch, target).asm["ptx" if target == "sm_90" else "amdgcn"]
        assert re.search(fused, text), "what is asked for changes nothing"


def test_a_thread_writes_16_bytes_at_once():
    (launch,) = gate.launches(gate.nf4_cases(4)["codes"], "sm_90")
    stores = re.findall(r"st\.global\S*", gate.build(launch, "sm_90").asm["ptx"])
    assert stores == ["st.global.v4.b32"]


def test_offsets_have_64_bits():
    for name, case in gate.nf4_cases(4).items():
        for launch in gate.launches(case, "sm_90"):
            ttir = gate.build(launch, "sm_90").asm["ttir"]
            flat = re.findall(r"tt\.addptr %(?:out|codes)\S* .*tensor<(?:\d+x)+i32>", ttir)
            assert not gates.narrow_offsets(ttir) and not flat, name
