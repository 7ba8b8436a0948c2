"""PEFT's config objects as a recipe and its options. PEFT itself is not imported: a config object or its JSON is enough.

Which fields mean which option stands with each method (PeftFormat).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastpeft.registry import PeftFormat, get_recipe, peft_reader
from fastpeft.targets import matches

Settings = dict[str, Any]

_HEAD_TASKS, _HEADS = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")

_SETTINGS = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "bias")
# fields that say where a config came from or how it was made, not what the adapter computes
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type", "mask_type",
}  # fmt: skip
_SILENT_LORA = {"fan_in_fan_out", "use_dora", "ephemeral_gpu_offload", "runtime_config"}
# values that PEFT writes when a feature is off
_OFF: dict[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16, "corda_config": None, "eva_config": None,
                        "bias": "none"}  # fmt: skip
_PLAIN_STARTS = (True, "true", "True")
_REPLACE_BASE = ("pissa", "olora", "corda", "loftq", "mica")


def from_config(config: Any, model: nn.Module) -> tuple[str, Settings, dict[str, Any]]:
    """(recipe, adapt's settings, the method's options) of a peft config object, for `model`.

    As get_peft_model does, a task_type of SEQ_CLS or TOKEN_CLS trains the model's classification head.

    Raises TypeError for what is no config, ValueError for fields that would change the result and are not supported.
    """
    if not hasattr(config, "to_dict") or not hasattr(config, "peft_type"):
        raise TypeError(
            f"adapt: method is a {type(config).__name__}; give a recipe name, a list of names, or a peft config object."
        )
    fields = config.to_dict()
    form = _reader(fields)[1]
    instead, own = _begin(fields, form)
    fields = fields | {form.start: True}
    if fields.get("mask_type") not in (None, "random"):
        raise ValueError(f"adapt: mask_type={fields['mask_type']!r} of the peft config is not supported; only 'random' is.")
    if getattr(fields.get("task_type"), "value", fields.get("task_type")) in _HEAD_TASKS:
        fields = fields | {"modules_to_save": sorted({*(fields.get("modules_to_save") or ()), *_HEADS})}
    name, settings, options = from_dict(fields, model)
    if instead is not None:
        name, options = instead, {k: v for k, v in options.items() if k in get_recipe(instead).options}
    return name, settings, options | own


def _begin(fields: Mapping[str, Any], form: PeftFormat) -> tuple[str | None, dict[str, Any]]:
    """The recipe (None: the one that peft_type means) and options that say how the values begin; ValueError if nothing here does."""
    start = fields.get(form.start, True)
    word = start.lower() if isinstance(start, str) and form.peft_type == "LORA" else ""
    if start in _PLAIN_STARTS:
        return None, {}
    if word in ("gaussian", "orthogonal"):
        return None, {"start": word}
    if pissa := re.fullmatch(r"pissa(?:_niter_(\d+))?", word):
        refused = {k: fields[k] for k in ("use_dora", "lora_bias", "lora_dropout") if fields.get(k)}
        if refused:
            raise ValueError(f"adapt: {form.start}={start!r} of the peft config with {refused} is not supported; reset them.")
        return "pissa", {} if pissa[1] is None else {"niter": int(pissa[1])}
    known = ", 'gaussian', 'orthogonal', 'pissa' or 'pissa_niter_N'" if form.peft_type == "LORA" else ""
    raise ValueError(f"adapt: {form.start}={start!r} of the peft config is not supported; use True{known}.")


def _reader(fields: Mapping[str, Any]) -> tuple[str, PeftFormat]:
    """The method that these fields belong to by peft_type, and its format."""
    found = peft_reader(getattr(fields.get("peft_type"), "value", fields.get("peft_type")))
    assert found.cls.PEFT is not None
    return found.name, found.cls.PEFT


def from_dict(fields: Mapping[str, Any], model: nn.Module) -> tuple[str, Settings, dict[str, Any]]:
    """The same from the JSON of an adapter_config.json; ValueError names what is unknown or unsupported."""
    name, form = _reader(fields)
    flags = {theirs for theirs, ours in form.reads.items() if isinstance(get_recipe(name).options.get(ours), bool)} | {"use_dora"}
    fields = {k: v for k, v in fields.items() if k not in flags or v is not None}
    texts = {k: fields[k] for k in sorted(flags & fields.keys()) if not isinstance(fields[k], bool)}
    if texts:  # the text "false" would count as true
        raise ValueError(f"peft config: these fields must be true or false: {texts}.")
    known = {*_SETTINGS, *form.reads, *_SILENT, form.start, *(_SILENT_LORA if form.peft_type == "LORA" else ())} - form.lacks
    known |= form.silent
    active = {k: v for k, v in fields.items() if k not in known and v not in (None, False, {}, [], _OFF.get(k))}
    if active:
        raise ValueError(f"peft config: these fields are set and not supported: {active}. Reset them, or use PEFT for it.")
    start = fields.get(form.start, True)
    if isinstance(start, str) and start.lower().startswith(_REPLACE_BASE):
        raise ValueError(
            f"peft config: {form.start}={start!r} belongs to a changed base weight, which is not in the adapter file; "
            "convert it with PEFT's path_initial_model_for_weight_conversion first."
        )
    if form.peft_type == "LORA" and fields.get("use_dora"):
        name = "dora"
    if name == "dora" and fields.get("lora_bias"):
        raise ValueError("peft config: lora_bias with use_dora is not defined (PEFT refuses it too).")
    options = {ours: fields[theirs] for theirs, ours in form.reads.items() if theirs in fields}
    if name == "dora":
        options.pop("lora_bias", None)
    settings = {key: None if key in form.silent else fields.get(key) for key in _SETTINGS}
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(settings[key], (set, tuple, list)):
            settings[key] = sorted(settings[key])
    if settings["modules_to_save"]:
        # PEFT lists both names of a head, whichever the model has
        names = [n for n, _ in model.named_modules()]
        kept = [s for s in settings["modules_to_save"] if s not in _HEADS or any(matches(n, [s]) for n in names)]
        settings["modules_to_save"] = kept or None
    return name, settings, options
