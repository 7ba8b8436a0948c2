"""A model and three domains of text (bench.forms), for benches in which one adapter, or several, learn more than one thing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench import forms
from fastpeft.job.arms import FASTPEFT, FROZEN, Arm, build_arms
from fastpeft.job.data import Examples, encode
from fastpeft.job.evaluate import evaluate
from fastpeft.job.loop import train, trainee
from fastpeft.job.models import find_model, load_model, load_tokenizer
from fastpeft.job.settings import Settings

DOMAINS = forms.DOMAINS
ALL = "mixture"
# every linear layer of a block: the pooler lies in none, and MoA chooses per block
TARGETS = r".*\.layer\.\d+\..*(query|key|value|dense)"
QUICK_PER_CLASS = 24


class Bench:
    """Model source and data, loaded once per process. data, held: domain -> examples, and ALL of them."""

    def __init__(self, base: Settings):
        torch.set_num_threads(base.thread_count)
        self.base, self.source = base, find_model(base)
        tokenizer = load_tokenizer(self.source)
        self.pad = tokenizer.pad_token_id
        texts = forms.load(**({"per_class": QUICK_PER_CLASS} if base.quick else {}))
        self.classes = texts.classes
        sides = ((texts.train, texts.train_labels, texts.train_domains), (texts.evaluation, texts.evaluation_labels, texts.evaluation_domains))
        self.data, self.held = (_by_domain(encode(t, ys, tokenizer, base, ds)) for t, ys, ds in sides)

    def with_fixed_head(self, seed: int) -> Any:
        """The model with a head of orthonormal rows that never trains: what an answer is called, as in a shared vocabulary."""
        model, new = load_model(self.source, self.base, classes=self.classes, pad=self.pad, seed=seed)
        [head] = [model.get_submodule(name) for name in new]
        nn.init.orthogonal_(head.weight)
        nn.init.zeros_(head.bias)
        return model.requires_grad_(False)

    def with_trained_head(self, seed: int, lr: float) -> Any:
        """The model with a head trained on the mixture, nothing else; it does not train any further."""
        model, new = load_model(self.source, self.base, classes=self.classes, pad=self.pad, seed=seed)
        settings = replace(self.base, lr=lr)
        [arm] = build_arms([FROZEN], model, new, settings, seed=seed)
        train([trainee(arm, settings)], self.data[ALL], self.held[ALL], settings, seed=seed)
        return arm.model.requires_grad_(False)

    def arm(self, model: Any, method: str, options: Mapping[str, Any], lr: float, seed: int, epochs: int, **more: Any) -> tuple[Arm, Settings]:
        """A copy of the model, adapted, with the settings of its training; the head stays as it is."""
        targets = "all-linear" if "experts" in options else TARGETS  # folders say it themselves
        settings = replace(self.base, method=method, options=dict(options), target_modules=targets, lr=lr, adapter_lr=lr, epochs=epochs, **more)
        [arm] = build_arms([FASTPEFT], copy.deepcopy(model), [], settings, seed=seed)
        return arm, settings

    def fit(self, model: Any, method: str, options: Mapping[str, Any], data: Examples, held: Examples, lr: float, seed: int, epochs: int) -> Any:
        """A copy of the model, adapted and trained."""
        arm, settings = self.arm(model, method, options, lr, seed, epochs)
        train([trainee(arm, settings)], data, held, settings, seed=seed)
        return arm.model

    def judge(self, model: Any) -> dict[str, Any]:
        """accuracy and loss per domain and on the mixture, and the routers' accuracy where there are some."""
        scores = {name: evaluate(model, part, self.base) for name, part in self.held.items()}
        found: dict[str, Any] = {"accuracy": {n: s.accuracy for n, s in scores.items()}, "loss": {n: s.loss for n, s in scores.items()}}
        return found if scores[ALL].routed is None else found | {"router": {n: s.routed for n, s in scores.items()}}


def _by_domain(data: Examples) -> dict[str, Examples]:
    assert data.domains is not None
    parts = {name: data.part([k for k, d in enumerate(data.domains) if d == z]) for z, name in enumerate(DOMAINS)}
    return parts | {ALL: data}
