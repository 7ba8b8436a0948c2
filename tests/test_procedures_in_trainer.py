"""PeriodicLoRA, Delta-LoRA, LISA and GaLore under Transformers' Trainer: the bits of a plain loop, and those of an uninterrupted run."""

from __future__ import annotations

import copy

import pytest
import torch
from loops import Case, Net, assert_same, plain, trainer_of

import fastpeft
from fastpeft import train

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Own(Case):
    """A Case of a method that may have no rank."""

    def begin(self, base=None):
        torch.manual_seed(1)
        model = Net()
        fastpeft.adapt(model, self.method, **self.options)
        procedures = self.procedures()
        return model, procedures, train.build_optimizer(model, procedures, self.optimizer, lr=0.02, weight_decay=0.1)


# GaLore's steps 0, 8 and 16 refresh, of which none is the shorter one at an epoch's end: there the loops clip other gradients
CASES = {
    "periodic_lora": Own("periodic_lora", lambda: [train.PeriodicLoRASchedule(6, 0.25)], {"rank": 3}),
    "delta_lora": Own("delta_lora", lambda: [train.DeltaLoRASchedule(3)], {"rank": 3}),
    "delta_lora in place": Own("delta_lora", lambda: [train.DeltaLoRASchedule(3)], {"rank": 3, "inplace": True}),
    "lisa": Own("lisa", lambda: [train.LISASchedule(1, 3, blocks=["up", "down"])]),
    "galore": Own("galore", lambda: [train.GaLoreProjection()], {"rank": 3, "gap": 8}, optimizer=train.GaLoreAdamW),
}
every = pytest.mark.parametrize("name", list(CASES))


@every
@pytest.mark.parametrize("accumulation", [1, 3])
def test_same_bits_as_in_a_plain_loop(name, accumulation, tmp_path):
    """20 steps over epochs of 13 batches: with accumulation 3 the last step of each has one micro-batch."""
    parts = CASES[name].begin()
    model, start = parts[0], copy.deepcopy(parts[0])
    trainer_of(parts, tmp_path, accumulation).train()
    assert_same(model, plain(CASES[name], 20, accumulation))
    with pytest.raises(AssertionError):
        assert_same(model, start)


@every
@pytest.mark.parametrize("cut", [7, 9])
def test_a_resumed_run_ends_with_the_same_bits(name, cut, tmp_path):
    arguments = dict(save_strategy="steps", save_steps=cut, train_sampling_strategy="random")
    whole, resumed = CASES[name].begin(), CASES[name].begin()
    trainer_of(whole, tmp_path, 3, **arguments).train()
    trainer_of(resumed, tmp_path, 3, **arguments).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    assert_same(resumed[0], whole[0])
