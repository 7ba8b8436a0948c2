"""One arm at a time: a job's model and data, loaded once, and arms of any recipe made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpeft.job.arms import FASTPEFT, PEFT, Arm, build_arms
from fastpeft.job.data import encode, load_texts
from fastpeft.job.kinds import with_experts
from fastpeft.job.loop import is_own
from fastpeft.job.models import find_model, load_model, load_tokenizer
from fastpeft.job.settings import Settings
from fastpeft.registry import get_recipe


class Bench:
    """The job's model and data. base: its settings; a routed method's have domains in the data. Raises JobError."""

    def __init__(self, base: Settings):
        torch.set_num_threads(base.thread_count)
        self.base, self.source, self.texts = base, find_model(base), load_texts(base)
        self.classes, self.tokenizer = self.texts.classes, load_tokenizer(self.source)
        t = self.texts
        self.data = encode(t.train, t.train_labels, self.tokenizer, base, t.train_domains)
        self.held = encode(t.evaluation, t.evaluation_labels, self.tokenizer, base, t.evaluation_domains)

    def arm(self, name: str, settings: Settings, seed: int) -> Arm:
        """A fresh arm. self.heads: the names of its modules that are new."""
        pad = self.tokenizer.pad_token_id
        model, self.heads = load_model(self.source, settings, classes=self.classes, pad=pad, seed=seed)
        [arm] = build_arms([name], model, self.heads, settings, seed=seed)
        return arm

    def settings(self, method: str, options: Mapping[str, Any], lr: float | None) -> Settings:
        """The job's with this method; lr: of the adapter's own parameters."""
        settings = replace(self.base, method=method, options=options, adapter_lr=lr)
        return with_experts(settings, self.texts.domains)

    def longest(self) -> dict[str, Tensor]:
        """A batch of the longest training texts."""
        order = sorted(range(len(self.data)), key=lambda k: -len(self.data.ids[k]))
        return self.data.batch(order[: self.base.batch_size])

    def own(self, arm: Arm, method: str) -> int:
        """How many numbers of an arm that `arm` made train beside the new head."""
        if arm.name == FASTPEFT and get_recipe(method).cls.TRAINS_ALL:
            return arm.trainable - sum(p.numel() for h in self.heads for p in arm.model.get_submodule(h).parameters())
        live = [(n, p) for n, p in arm.model.named_parameters() if p.requires_grad]
        return sum(p.numel() for n, p in live if is_own(n) or (arm.name == PEFT and "lora_" in n))
