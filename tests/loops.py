"""One training twice: in a plain loop, and under Transformers' Trainer. What both end with must be the same bits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from checks import DT, MLP

import fastpeft
from fastpeft import train

CLIP = 1.0


class Net(MLP):
    """An MLP that returns its loss, as a model for the Trainer does."""

    accepts_loss_kwargs = False

    def forward(self, x, labels=None):
        y = super().forward(x)
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def examples(count=25, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(16, dtype=DT, generator=generator) for k in ("x", "labels")} for _ in range(count)]


def collate(rows):
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}


def held_out():
    """Batches beside those of the loop."""
    return train.Batches(examples(5, seed=9), 2, collate=collate)


@dataclass
class Case:
    """A method, the procedures to train it with, and the optimiser."""

    method: str
    procedures: Callable[[], Sequence[train.Procedure]]
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = torch.optim.AdamW

    def begin(self, base=None):
        """(model, procedures, optimizer), the same in each call with the same base."""
        torch.manual_seed(1)
        model = Net() if base is None else copy.deepcopy(base)
        fastpeft.adapt(model, self.method, **({"rank": 3} | self.options))
        procedures = self.procedures()
        return model, procedures, train.build_optimizer(model, procedures, self.optimizer, lr=0.02, weight_decay=0.1)


CASES = {
    "rosa": Case("rosa", lambda: [train.RoSASchedule("wl5", 5)], {"density": 0.2}),
    "lora_plus": Case("lora_plus", lambda: [train.LoRAPlus(8.0)]),
    "lora_fa": Case("lora_fa", lambda: [train.LoRAFAPreconditioner()], optimizer=train.HFAdamW),
    "dylora": Case("dylora", lambda: [train.DyLoRASampling()]),
    "dylora frozen, geometric, with LoRA+": Case(
        "dylora", lambda: [train.DyLoRASampling("geometric", seed=3), train.LoRAPlus(4.0)], {"mode": "frozen"}
    ),
}
MORE = {
    "adalora": Case("adalora", lambda: [train.AdaLoRASchedule()]),
    "sora": Case("sora", lambda: [train.SoRASchedule()]),
    "delta_lora": Case("delta_lora", lambda: [train.DeltaLoRASchedule(start=3)]),
    "periodic_lora": Case("periodic_lora", lambda: [train.PeriodicLoRASchedule()]),
    "alora_alloc": Case("alora_alloc", lambda: [train.ALoRAAllocation(held_out(), interval=4)]),
    "aflora": Case("aflora", lambda: [train.AFLoRAFreezing(4, 0.3, deltaT=2)]),
    "bilora": Case("bilora", lambda: [train.BiLoRABilevel(held_out(), hypergrad="darts", lr=0.1)]),
    "o_lora": Case("o_lora", lambda: [train.OLoRAPenalty()], {"previous": 1}),
}


def micro_batches(data, accumulation, size=2):
    """The steps of one epoch in order: lists of micro-batches; the last of each may be shorter."""
    batches = [collate(data[k : k + size]) for k in range(0, len(data), size)]
    return [batches[k : k + accumulation] for k in range(0, len(batches), accumulation)]


def plain(case, steps, accumulation, data=None, scaler=None):
    """The model after so many steps of an ordinary loop."""
    model, procedures, optimizer = case.begin()
    epoch = micro_batches(data or examples(), accumulation)
    with train.attach(model, optimizer, procedures, accumulation=accumulation, total_steps=steps) as runner:
        for k, micros in enumerate(itertools.islice(itertools.cycle(epoch), steps), 1):
            model.train()
            for batch in micros:
                loss = model(**batch)["loss"] / len(micros)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            runner.step_end()
            if k % len(epoch) == 0:
                runner.epoch_end()
    return model


def trainer_of(parts, folder, accumulation, steps=20, data=None, held=None, callback=None, **arguments):
    """A Trainer over (model, procedures, optimizer) as `plain` trains; arguments: further TrainingArguments."""
    import transformers

    from fastpeft.integrations.transformers import ProcedureCallback

    model, procedures, optimizer = parts
    settings = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**(settings | arguments)),
        data_collator=collate,
        train_dataset=examples() if data is None else data,
        eval_dataset=held,
        optimizers=(optimizer, None),
        callbacks=[callback or ProcedureCallback(procedures)],
    )


def assert_same(first, second):
    """Every tensor of both state dicts, bit for bit."""
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    wrong = [n for n in one if not torch.equal(one[n], two[n])]
    assert not wrong, f"{len(wrong)} of {len(one)} tensors differ: {wrong[:4]}"
