"""The arms of a comparison: one loaded model, frozen, under PEFT, and under fastpeft."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.job.data import DOMAIN
from fastpeft.job.errors import JobError
from fastpeft.job.procedures import build_procedures, check_fit, without_source
from fastpeft.job.settings import CLASSIFICATION, Settings
from fastpeft.routing_hooks import is_routed

FROZEN, PEFT, FASTPEFT = "frozen", "peft", "fastpeft"


@dataclass
class Arm:
    """name: FROZEN, PEFT or FASTPEFT.   title: for tables.   note: one sentence on what this arm is.

    procedures: fastpeft.train's, which the method needs around each step or the user has added.
    """

    name: str
    title: str
    note: str
    model: Any
    procedures: list[Any] = field(default_factory=list)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model is called with in training: a model with routers is told the domain of each text."""
        return {k: v for k, v in batch.items() if k != DOMAIN or is_routed(self.model)}

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def arm_names(settings: Settings) -> list[str]:
    return [FROZEN, PEFT, FASTPEFT] if settings.compare else [FASTPEFT]


def build_arms(names: list[str], model: Any, new: list[str], settings: Settings, *, seed: int) -> list[Arm]:
    """The named arms on copies of `model`, whose modules `new` train in every arm; the last arm takes `model`
    itself.

    fastpeft's adapter is initialised from `seed`; where PEFT has the same method its arm gets a copy of those
    values.
    """
    copies = {name: copy.deepcopy(model) for name in names[:-1]} | {names[-1]: model}
    arms: dict[str, Arm] = {}
    # fastpeft's comes first: what is wrong with the settings is then said in its own words and not in PEFT's
    for name in reversed(names):
        torch.manual_seed(seed)
        arms[name] = _BUILD[name](copies[name], new, settings)
    if PEFT in arms and FASTPEFT in arms:
        if peft_counterpart(settings.method, settings.options):
            copy_start(arms[FASTPEFT].model, arms[PEFT].model, settings.method)
            arms[PEFT].note += "; its adapter starts from the same values as fastpeft's"
            if arms[FASTPEFT].procedures:
                without = ", ".join(type(p).__name__ for p in arms[FASTPEFT].procedures)
                arms[PEFT].note += f", and trains without {without}"
        else:
            arms[
                PEFT
            ].note += f"; PEFT has no such {settings.method}, so this is a yardstick and not the same method"
    return [arms[name] for name in names]


def _frozen(model: Any, new: list[str], settings: Settings) -> Arm:
    model.requires_grad_(False)
    for name in new:
        model.get_submodule(name).requires_grad_(True)
    title = "frozen + head" if new else "frozen"
    note = (
        f"the model is frozen, only {', '.join(new)} trains"
        if new
        else "the model is frozen and nothing trains"
    )
    return Arm(FROZEN, title, note, model)


def _fastpeft(model: Any, new: list[str], settings: Settings) -> Arm:
    import fastpeft

    try:
        report = fastpeft.adapt(
            model,
            settings.method,
            target_modules=_own_targets(settings),
            modules_to_save=new or None,
            **settings.options,
        )
    except (ValueError, TypeError) as e:
        raise JobError(str(e)) from None
    names = [*report.procedures, *settings.procedures]
    procedures = build_procedures(names, settings.procedure_options)
    if procedures:
        check_fit(model, procedures)
    note = f"fastpeft {settings.method}, {len(report.adapted)} layers, adapter in {_adapter_dtype(model)}"
    if procedures:
        note += f", with {', '.join(names)}"
    for p in without_source(procedures):
        note += f"; {p.HOLDS_OUT:.0%} of the training examples are {type(p).__name__}'s alone, no arm trains on them"
    note = "; ".join([note, *report.notes])
    return Arm(FASTPEFT, f"fastpeft {settings.method}", note, model, procedures)


def _peft(model: Any, new: list[str], settings: Settings) -> Arm:
    import peft

    method = settings.method if peft_counterpart(settings.method, settings.options) else "lora"
    config = peft_config(method, peft_options(settings), _targets(settings), new)
    config.task_type = "SEQ_CLS" if settings.task == CLASSIFICATION else "CAUSAL_LM"
    try:
        wrapped = peft.get_peft_model(model, config)
    except (ValueError, TypeError) as e:
        raise JobError(
            f"finetune: PEFT refuses these settings ({e}); run with --no-compare to train without it."
        ) from None
    note = f"stock PEFT {peft.__version__} {method}, adapter in {_adapter_dtype(wrapped)}"
    return Arm(PEFT, f"PEFT {method}", note, wrapped)


_BUILD = {FROZEN: _frozen, PEFT: _peft, FASTPEFT: _fastpeft}


def _targets(settings: Settings) -> str | list[str]:
    return (
        settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    )


def _own_targets(settings: Settings) -> str | list[str] | None:
    """None where the folders of trained experts say which layers are adapted, unless others were asked for."""
    folders = isinstance(settings.options.get("experts"), (Mapping, list, tuple))
    return None if folders and settings.target_modules == "all-linear" else _targets(settings)


def _adapter_dtype(model: nn.Module) -> str:
    """Dtypes of the adapters' parameters: those on a path with "adapter" or one of PEFT's prefixes in it."""
    marks = (".adapter.", "adapter_shared.", "lora_", "hada_", "lokr_", "shira_")
    own = {p.dtype for n, p in model.named_parameters() if p.requires_grad and any(m in n for m in marks)}
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in own)) or "no parameter"


def peft_counterpart(method: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether stock PEFT has this method with these options (None: its defaults)."""
    from fastpeft.registry import get_recipe

    recipe = get_recipe(method)
    stored = recipe.cls.PEFT
    return stored is not None and stored.config(recipe.options | dict(options or {})) is not None


def peft_options(settings: Settings) -> dict[str, Any]:
    """The options of PEFT's arm: the method's own, or for a yardstick the rank, alpha and dropout that the
    method shares."""
    if peft_counterpart(settings.method, settings.options):
        return dict(settings.options)
    return {k: v for k, v in settings.options.items() if k in ("rank", "alpha", "dropout") and v is not None}


def peft_config(method: str, options: Mapping[str, Any], targets: str | list[str], new: list[str]) -> Any:
    """PEFT's config object for a method that PEFT has, with the method's defaults where `options` says
    nothing."""
    import peft

    from fastpeft.registry import get_recipe

    recipe = get_recipe(method)
    stored = recipe.cls.PEFT
    fields = None if stored is None else stored.config(recipe.options | dict(options))
    if stored is None or fields is None:
        raise ValueError(f"peft_config: PEFT has no such {method!r}; ask peft_counterpart first.")
    # a list of its own: PEFT appends "classifier" and "score" to the one it is given
    make = getattr(peft, stored.config_class)
    return make(target_modules=targets, modules_to_save=list(new) or None, **fields)


@torch.no_grad()
def copy_start(ours: nn.Module, theirs: nn.Module, method: str) -> None:
    """Give PEFT's adapter the values of fastpeft's, parameter by parameter; ValueError where a layer or shape
    differs."""
    from fastpeft.record import adapted_modules
    from fastpeft.registry import get_recipe

    stored = get_recipe(method).cls.PEFT
    assert stored is not None
    live = dict(theirs.named_parameters())
    modules: dict[str, Any] = dict(adapted_modules(ours))
    for site, module in modules.items():
        for name, parameter in module.adapter.get_submodule(method).named_parameters():
            stem, dot, leaf = stored.keys[name].partition(".")
            # in memory PEFT puts the adapter's name between: lora_A.default.weight,
            # lora_magnitude_vector.default.weight, hada_w1_a.default
            key = f"base_model.model.{site}.{stem}.default"
            key = key if key in live else f"{key}.{leaf if dot else 'weight'}"
            if key not in live or live[key].shape != parameter.shape:
                raise ValueError(f"copy_start: PEFT's model has no {key} of shape {tuple(parameter.shape)}.")
            live[key].copy_(parameter)
