"""Faults planted into accelerate one at a time; each must fail the test that guards it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

import test_accelerate as whole
import test_accelerate_dtypes as dtypes
import test_accelerate_families as families

from fastpeft.accelerated import adalora, base, classes, lora, lycoris, reading, shira
from fastpeft.ops import wide
from fastpeft.terms import Bias, Gain, Kron, LowRank, Sparse


def outputs(family):
    return lambda: families.test_outputs_and_gradients(family, (3, 5), True)


def replaced(module, name, made):
    return lambda patch: patch.setattr(module, name, made, raising=False)


def no_state(attribute):
    """A forward that does not look whether adapters are merged or disabled."""

    def plant(patch):
        real = classes.state

        def state(layer, read):
            kept = getattr(layer, attribute)
            layer.__dict__[attribute] = type(kept)()
            try:
                return real(layer, read)
            finally:
                layer.__dict__[attribute] = kept

        patch.setattr(classes, "state", state)

    return plant


def remembered(patch):
    """What was found once is taken again: no change of adapters, scales or states is seen."""
    real, known = classes.state, {}

    def state(layer, read):
        if id(layer) not in known:
            known[id(layer)] = layer, real(layer, read)
        return known[id(layer)][1]

    patch.setattr(classes, "state", state)


def rounded_inside(patch):
    """fp32 adapters on a bf16 layer without autocast are computed in bf16."""
    real = classes.run_terms
    patch.setattr(classes, "run_terms", lambda *a, inner=None: real(*a))


def mask_of_the_first_slab(patch):
    real = wide.dropout
    patch.setattr(wide, "dropout", lambda x, seed, p, row0: real(x, seed, p, 0))


def wide_db_unscaled(patch):
    real = wide.LowRank.back

    def back(self, dz, x, tensors, scale, *rest):
        dx, grads = real(self, dz, x, tensors, scale, *rest)
        return dx, (grads[0], grads[1] / scale, *grads[2:])

    patch.setattr(wide.LowRank, "back", back)


def dtype_of_the_base(patch):
    real = base.ready

    def ready(layer, found, x):
        call = real(layer, found, x)
        return call if type(call) is reading.Why else call._replace(out=call.base.dtype)

    patch.setattr(classes, "ready", ready)


def hooks_unseen(patch):
    for module in (reading, lora, base):
        patch.setattr(module, "observed", lambda m: False)


def eval_drops(patch):
    for module in (lora, adalora):
        patch.setattr(module, "dropout", lambda m: getattr(m, "p", 0.0))


def slabs_small(check):
    """The check, with slabs of a few rows."""

    def run():
        from fastpeft.ops import slabs

        old, slabs.SLAB_BYTES = slabs.SLAB_BYTES, 4096
        try:
            check()
        finally:
            slabs.SLAB_BYTES = old

    return run


def lycoris_pair(a, b):
    from fastpeft.terms import KhatriRao

    return KhatriRao(b, a) if a.shape[0] < a.shape[1] else KhatriRao(a, b)


def uncast(layer, found, x):
    layer.cast_input_dtype_enabled = True
    return base.ready(layer, found, x)


FAULTS = {
    "scale missing": (replaced(lora, "LowRank", lambda a, b, s, dropout: LowRank(a, b, 1.0, dropout=dropout)), outputs("lora")),
    "bias unscaled": (replaced(lora, "Bias", lambda b: Bias(b * 2)), outputs("lora_bias")),
    "DoRA's base product not dropped": (
        replaced(lora, "Gain", lambda g, p, over: Gain(g, 0.0, over)), lambda: families.test_dropout_is_pefts_law("dora", 0.5)),
    "eval drops": (eval_drops, lambda: families.test_dropout_is_pefts_law("lora", 0.5)),
    "AdaLoRA's rank missing": (replaced(adalora, "LowRank", lambda a, b, dropout: LowRank(a * 5, b, dropout=dropout)), outputs("adalora")),
    "LoHa's pairs crossed": (replaced(lycoris, "KhatriRao", lycoris_pair), outputs("loha")),
    "LoKr's scale missing": (replaced(lycoris, "Kron", lambda c, d, s: Kron(c, d)), outputs("lokr")),
    "SHiRA's scale missing": (
        lambda patch: patch.setattr(shira, "Sparse", lambda v, i: Sparse(v / 3, i)), lambda: whole.test_a_changed_scale_is_seen("shira")),
    "SHiRA's order unchecked": (replaced(shira, "_ordered", lambda *a: True), whole.test_shira_with_a_support_out_of_order_is_pefts),
    "merged ignored": (no_state("merged_adapters"), lambda: families.test_merged_disabled_and_back("lora")),
    "disabled ignored": (no_state("_disable_adapters"), lambda: families.test_merged_disabled_and_back("lokr")),
    "remembered adapters": (remembered, whole.test_adapters_come_and_go),
    "remembered scales": (remembered, lambda: whole.test_a_changed_scale_is_seen("lora")),
    "one mask for two adapters": (replaced(lora, "any", lambda found: False), families.test_adapters_of_two_families_at_once),
    "hooks unseen": (hooks_unseen, whole.test_what_is_not_fused_is_listed_with_its_reason),
    "adapter_names unseen": (replaced(classes, "arguments", lambda a, k: None), families.test_a_batch_of_several_adapters),
    "functorch unseen": (replaced(base, "_transformed", lambda: False), whole.test_functional_transforms_and_traces_run_peft),
    "LyCORIS' dropouts unseen": (replaced(lycoris, "_drops", lambda *a: None), families.test_dropouts_of_lycoris_are_pefts),
    "a second base product rounded": (
        replaced(lora, "Found", lambda *a, second=False: reading.Found(*a)), lambda: dtypes.test_dropout_as_good_as_peft("dora", "bf16 base")),
    "rounded inside": (rounded_inside, lambda: dtypes.test_as_good_as_peft("lora", "bf16 base")),
    "mask of the first slab": (
        mask_of_the_first_slab, slabs_small(lambda: dtypes.test_dropout_as_good_as_peft("lora", "bf16 base"))),
    "dB unscaled where it is wide": (wide_db_unscaled, lambda: dtypes.test_fp64_adapters_on_an_fp32_base_are_computed_in_fp64("lora", 700)),
    "dtype of the base": (dtype_of_the_base, lambda: dtypes.test_as_good_as_peft("lora", "autocast")),
    "input cast although it is disabled": (
        replaced(classes, "ready", uncast), dtypes.test_no_cast_of_the_input),
    "Conv1D not transposed": (replaced(base, "is_conv1d", lambda m: False), lambda: families.test_conv1d("lora")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FAULTS))
def test_planted_fault_is_found(name, monkeypatch):
    plant, check = FAULTS[name]
    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, pytest.fail.Exception)):
        check()
    monkeypatch.undo()
    torch.manual_seed(0)
    check()
