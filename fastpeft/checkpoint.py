"""save_adapter and load_adapter: adapter_config.json + adapter_model.safetensors, in PEFT's layout where PEFT has the method.

How the two files come to be whole or absent stands in folder.py. Loading checks everything before the model keeps anything.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.adapter import is_conv1d
from fastpeft.folder import LIBRARY, PREFIX, CheckpointError, read_folder, read_gates, write_folder
from fastpeft.leave import unload
from fastpeft.patterns import check_pattern, exactly
from fastpeft.record import RECORD, SHARED, Adaptation, adaptation, holders_of
from fastpeft.registry import Method, PeftFormat, Recipe, get_recipe
from fastpeft.report import Report
from fastpeft.shards import gathered
from fastpeft.sites import saved_modules
from fastpeft.swap import build_and_attach
from fastpeft.targets import checked_targets, matches, output_head

_SETTINGS: dict[str, Any] = dict.fromkeys(
    ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "bias")
)
_PATTERNS = ("rank_pattern", "alpha_pattern")


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters, trained modules and trained biases of an adapted model into `folder` (made if absent).

    A method is written in PEFT's own layout where PEFT has it and can hold what was asked (METHODS.md, column PEFT), and then loads
    in stock PEFT; loha and lokr not where PEFT's cannot hold it (trained biases, Conv1D layers, LyCORIS options). ValueError if the model is not adapted, OSError if the folder cannot be
    written; the folder then still holds the checkpoint it held before.
    Where FSDP2 or ZeRO-3 shards the model, every process must call this: the adapter is gathered, and the first process writes it.
    """
    record = adaptation(model, "save_adapter")
    with gathered(model, record, "save_adapter") as holds:
        if holds:
            _save(model, record, Path(folder))


def _save(model: nn.Module, record: Adaptation, folder: Path) -> None:
    tensors = {key: tensor.detach() for key, tensor in _state(model, record).items()}
    broken = [k for k, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        warnings.warn(f"save_adapter: these tensors are not finite: {some(broken)}; load_adapter will refuse this folder.", stacklevel=3)
    meta = {"methods": record.methods, "options": record.options}
    meta |= {key: getattr(record, key) for key in _PATTERNS if getattr(record, key)}
    if record.quantize:
        meta["quantize"] = record.quantize
    config, form = _config(model, record), _peft_format(model, record)
    if form is not None and form.pack is not None:
        config, tensors = form.pack(config, tensors)
    gates = {key: tensors.pop(key) for key in list(tensors) if form and form.gates and key.endswith(f".{form.gates}")}
    write_folder(folder, tensors, config, meta, gates)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Report:
    """Load a folder written by save_adapter or by PEFT (LoRA, rsLoRA, DoRA, AdaLoRA, LoHa, LoKr, SHiRA) into `model`; returns the Report.

    A .safetensors file in a folder's place is read as LyCORIS' (fastpeft.integrations.lycoris.load_lycoris).
    A model without adapters is adapted as the config says; an adapted one must have the same methods, options and shapes, but
    may be quantised otherwise (its base is the user's choice, as in PEFT).
    16-bit factors are widened to the adapter's fp32 without loss.
    A sharded model (FSDP2, ZeRO-3) must be adapted already; every process calls this, reads the folder and keeps its own part.
    Raises FileNotFoundError for a missing file, CheckpointError for anything that is wrong with it (truncated, missing,
    unexpected, misshapen, not finite, other dtype, other method, pickle); the model is then as it was before.
    """
    if Path(folder).suffix == ".safetensors" and not Path(folder).is_dir():
        from fastpeft.integrations.lycoris import load_lycoris

        return load_lycoris(model, folder)
    config, tensors, meta = read_folder(Path(folder))
    methods, settings, options = _plan(model, config, meta, folder)
    fresh = model.__dict__.get(RECORD) is None
    report = Report()
    if fresh:
        with torch.random.fork_rng():
            try:
                asked = _SETTINGS | settings | {"quantize": meta.get("quantize"), "blank": True}
                report = build_and_attach(model, methods, **asked, **options)
            except (ValueError, TypeError) as e:
                raise CheckpointError(f"load_adapter: {folder} does not fit this model: {e}") from e
    try:
        record = adaptation(model, "load_adapter")
        if not fresh:
            _check_same(model, record, methods, settings, options, folder)
        with torch.no_grad(), gathered(model, record, "load_adapter", write=True):
            live = _state(model, record)
            form = _peft_format(model, record)
            gates = read_gates(Path(folder), tensors)
            if gates and not (form and form.gates):
                report.notes.append(f"{folder} holds gates of PHATGOOSE too, for which {', '.join(record.methods)} has no place: they are not loaded.")
            tensors |= gates if form and form.gates else {}
            tensors = {k: v for k, v in tensors.items() if not _wrapper_bias(k, record)}
            tensors = _unpacked(form, config, tensors, folder)
            check_tensors(live, tensors, folder, _beside_methods(model, record))
            _check_states(model, record, tensors, folder)
            for method, keys in _methods_at(model, record):
                method.load({leaf: tensors[key] for leaf, key in keys.items()})
            for key, tensor in _beside_methods(model, record).items():
                tensor.copy_(tensors[key])
    except BaseException:
        if fresh:
            unload(model)
        raise
    return report.count(model)


def file_key(path: str, leaf: str) -> str:
    return f"{PREFIX}{path}.{leaf}" if path else f"{PREFIX}{leaf}"


def _state(model: nn.Module, record: Adaptation) -> dict[str, Tensor]:
    """File key -> live tensor of everything that the checkpoint holds."""
    state: dict[str, Tensor] = {}
    for method, keys in _methods_at(model, record):
        tensors = method.saved()
        state |= {key: tensors[leaf] for leaf, key in keys.items()}
    return state | _beside_methods(model, record)


def _beside_methods(model: nn.Module, record: Adaptation) -> dict[str, Tensor]:
    """What the checkpoint holds and no method owns: shared parameters, bases that a start replaced, trained modules and parameters."""
    state: dict[str, Tensor] = {}
    for name, holder in holders_of(model, record).items():
        state |= {file_key(f"{SHARED}.{name}", k): t for k, t in holder.state_dict(keep_vars=True).items()}
    for site in record.sites:
        stored = model.get_submodule(site).adapter._modules.get("base")
        if stored is not None and not record.quantize:  # which is made again from the weight, to the bit
            state |= {file_key(site, f"adapter.base.{k}"): t for k, t in stored.state_dict(keep_vars=True).items()}
    for name in record.trained:
        path, _, leaf = name.rpartition(".")
        state[file_key(path, f"base_layer.{leaf}" if path in record.sites else leaf)] = model.get_parameter(name)
    return state | beside_adapters(model, record)


def _methods_at(model: nn.Module, record: Adaptation) -> Iterator[tuple[Method, dict[str, str]]]:
    """Each method at each site, and the file key of each name in its state dict."""
    form = _peft_format(model, record)
    for site in record.sites:
        for name, method in model.get_submodule(site).adapter.methods().items():
            keys = form.keys if form else {}
            yield method, {leaf: file_key(site, keys[leaf] if form else f"adapter.{name}.{leaf}") for leaf in method.saved()}


def beside_adapters(model: nn.Module, record: Adaptation) -> dict[str, Tensor]:
    """Trained modules and biases, under PEFT's keys (an adapted layer's own bias is its base_layer's there)."""
    state = {}
    for name in record.originals:
        for leaf, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            state[file_key(name, leaf)] = tensor
    for name in record.biases:
        path = name.rpartition(".")[0]
        state[file_key(path, "base_layer.bias" if path in record.sites else "bias")] = model.get_parameter(name)
    return state


def _wrapper_bias(key: str, record: Adaptation) -> bool:
    """True for the copies of a trained module's bias that PEFT writes under its wrapper's names with bias="all"."""
    inside = (f"{PREFIX}{name}.{part}." for name in record.originals for part in ("modules_to_save", "original_module"))
    return record.bias == "all" and key.endswith("bias") and key.startswith(tuple(inside))


def _peft_format(model: nn.Module, record: Adaptation) -> PeftFormat | None:
    """PEFT's layout of the method, where the checkpoint is in it: PEFT has the method and can express all that was asked."""
    recipe = get_recipe(record.methods[0])
    form = recipe.cls.PEFT
    if form is None or len(record.methods) > 1 or form.config(_asked(recipe, record.options, vars(record))) is None:
        return None
    needs = {
        "bias": record.bias != "none",
        "fan_in_fan_out": _conv1d(model, record),
        "rank_pattern": bool(record.rank_pattern),
        "alpha_pattern": bool(record.alpha_pattern),
    }
    return None if any(needs[field] for field in form.lacks) else form


def _asked(recipe: Recipe, options: Mapping[str, Any], patterns: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options with the two patterns beside them: what a PeftFormat's config is made from."""
    return recipe.options | dict(options) | {key: patterns.get(key) or {} for key in _PATTERNS}


def _conv1d(model: nn.Module, record: Adaptation) -> bool:
    return any(is_conv1d(model.get_submodule(s)) for s in record.sites)


def _config(model: nn.Module, record: Adaptation) -> dict[str, Any]:
    recipe = get_recipe(record.methods[0])
    if form := _peft_format(model, record):
        return peft_config(model, record, form, _asked(recipe, record.options, vars(record))) | record.peft_fields
    # where PEFT has the method, its peft_type would make PEFT read a folder that it cannot read
    plain = len(record.methods) == 1 and recipe.cls.PEFT is None
    return {
        "peft_type": record.methods[0].upper() if plain else LIBRARY.upper(),
        "library": LIBRARY,
        "methods": record.methods,
        "options": record.options,
        "rank_pattern": record.rank_pattern,
        "alpha_pattern": record.alpha_pattern,
        "bias": record.bias,
        "target_modules": _targets(model, record),
        "modules_to_save": sorted(record.originals) or None,
    }


def peft_config(model: nn.Module, record: Adaptation, form: PeftFormat, options: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter_config.json of a method with these options, which PEFT can express."""
    fields = {
        "peft_type": form.peft_type,
        "task_type": _task(model, record),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "fan_in_fan_out": _conv1d(model, record),
        "target_modules": _targets(model, record),
        "modules_to_save": sorted(record.originals) or None,
        "rank_pattern": record.rank_pattern,
        "alpha_pattern": record.alpha_pattern,
        "bias": record.bias,
        **(form.config(options) or {}),
    }
    return {key: fields[key] for key in sorted(fields.keys() - form.lacks)}


def _task(model: nn.Module, record: Adaptation) -> str | None:
    kind = type(model).__name__
    if "ForSequenceClassification" in kind and output_head(model) in record.originals:
        return "SEQ_CLS"  # PEFT then expects the head in the file
    return "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None


def _targets(model: nn.Module, record: Adaptation) -> list[str] | str:
    """Full names; an anchored regex where a full name is also the dotted suffix of some other module."""
    names = [n for n, _ in model.named_modules() if n not in record.sites]
    if any(n.endswith("." + s) for n in names for s in record.sites):
        return exactly(record.sites)
    return sorted(record.sites)


def _plan(
    model: nn.Module, config: Mapping[str, Any], meta: Mapping[str, Any], folder: Any
) -> tuple[str | list[str], dict[str, Any], dict[str, Any]]:
    """Methods, adapt's settings and options that a config asks for."""
    from fastpeft.integrations.peft import from_dict

    try:
        for key in _PATTERNS:
            check_pattern(key, config.get(key) if config.get("peft_type") != "ADALORA" else None)  # where it is something else
        if config.get("library") == LIBRARY:
            return _own_plan(config)
        name, settings, options = from_dict(config, model)
        if (own := _method_of(config, meta, name)) != name:  # whose config is made from its options, and need not hold them
            return [own], settings | {k: meta.get(k) for k in _PATTERNS}, dict(meta.get("options", {}))
        extra = {k: v for k, v in meta.get("options", {}).items() if meta.get("methods") == [name]}
        return [name], settings, extra | {k: v for k, v in options.items() if k in get_recipe(name).options}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"load_adapter: the config in {folder} cannot be used: {e}") from e


def _own_plan(config: Mapping[str, Any]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The same of a config that only fastpeft reads; ValueError for what _config does not write."""
    keys = ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "bias")
    known = {"peft_type", "library", "methods", "options", *keys}
    problems = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("it lacks", {"methods", "options"} - config.keys()), ("it holds what is not known", config.keys() - known))
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))
    methods, options = config["methods"], config["options"]
    if not isinstance(methods, list) or not isinstance(options, dict):
        raise ValueError(f"its methods are {methods!r} and its options {options!r}; needed are a list of names and an object")
    for name in methods:
        get_recipe(name)
    if config["peft_type"] not in (LIBRARY.upper(), *(name.upper() for name in methods[:1])):
        raise ValueError(f"its peft_type {config['peft_type']!r} is not that of {', '.join(methods)}")
    return methods, {k: config.get(k) for k in keys}, options


def _method_of(config: Mapping[str, Any], meta: Mapping[str, Any], plain: str) -> str:
    """The method that saved a folder in PEFT's layout: `plain` (what the config says) or one stored just like it (lora_fa)."""
    saved = meta.get("methods")
    if not isinstance(saved, list) or len(saved) != 1 or saved == [plain]:
        return plain
    recipe = get_recipe(saved[0])
    own = recipe.cls.PEFT
    fields = {} if own is None else own.config(_asked(recipe, meta.get("options", {}), meta))
    return recipe.name if fields and all(config.get(k) == v for k, v in fields.items()) else plain


def _check_same(model: nn.Module, record: Adaptation, methods: Any, settings: Mapping[str, Any], options: Mapping[str, Any], folder: Any) -> None:
    if record.methods != list(methods):
        raise CheckpointError(f"load_adapter: {folder} holds {methods}, but the model was adapted with {record.methods}.")
    defaults: dict[str, Any] = {}
    for name in record.methods:
        defaults |= get_recipe(name).options
    # as JSON holds them: a pair is a list there
    mine, theirs = (json.loads(json.dumps(defaults | dict(own))) for own in (record.options, options))
    begin = {k for name in record.methods for k in get_recipe(name).cls.BEGIN}
    kept = [k for k in mine if not k.endswith("dropout") and k not in begin]
    wrong = {k: (theirs.get(k), mine[k]) for k in kept if mine[k] != theirs.get(k)}
    for key in _PATTERNS:
        if (settings.get(key) or {}) != getattr(record, key):
            wrong[key] = (settings.get(key), getattr(record, key))
    try:
        targets = checked_targets("target_modules", settings["target_modules"])
        excluded = checked_targets("exclude_modules", settings["exclude_modules"]) if settings.get("exclude_modules") else None
        inside = tuple(f"{site}.adapter" for site in record.sites)
        saved = [name for name in saved_modules(model, settings.get("modules_to_save")) if not name.startswith(inside)]
    except ValueError as e:
        raise CheckpointError(f"load_adapter: the config in {folder} cannot be used: {e}") from e
    if targets != "all-linear" and any(not matches(site, targets) for site in record.sites):
        wrong["target_modules"] = (targets, record.sites)
    if excluded and any(matches(site, excluded) for site in record.sites):
        wrong["exclude_modules"] = (excluded, record.sites)
    if saved != list(record.originals):
        wrong["modules_to_save"] = (saved, list(record.originals))
    if (settings.get("bias") or "none") != record.bias:
        wrong["bias"] = (settings.get("bias"), record.bias)
    if wrong:
        raise CheckpointError(f"load_adapter: {folder} was made with other options (file, model): {wrong}.")


def check_tensors(live: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Any, beside: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the file holds exactly the model's tensors, in shape, in a dtype that fits, and finite.

    beside: those that are no method's, which may have another dtype.
    """
    problems = []
    missing, unexpected = sorted(live.keys() - tensors.keys()), sorted(tensors.keys() - live.keys())
    if missing:
        problems.append(f"{len(missing)} missing: {some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {some(unexpected)}")
    both = [k for k in live if k in tensors]
    shapes = [f"{k} is {tuple(tensors[k].shape)}, needed {tuple(live[k].shape)}" for k in both if tensors[k].shape != live[k].shape]
    dtypes = [f"{k} is {tensors[k].dtype}, needed {live[k].dtype}" for k in both if not _fits(tensors[k], live[k])]
    floating = [k for k in both if _fits(tensors[k], live[k]) and tensors[k].dtype.is_floating_point]
    broken = [k for k in floating if not bool(tensors[k].isfinite().all())]
    kinds: dict[str, list[str]] = {}
    for k in floating:
        if k not in beside:
            kinds.setdefault(str(tensors[k].dtype), []).append(k)
    if len(kinds) > 1:
        listing = ", ".join(f"{dtype} ({some(names)})" for dtype, names in sorted(kinds.items()))
        dtypes.append(f"the adapter's tensors have several dtypes: {listing}")
    for what, found in (("wrong shape", shapes), ("wrong dtype", dtypes), ("NaN or Inf", broken)):
        if found:
            problems.append(f"{what}: {some(found)}")
    if problems:
        raise CheckpointError(f"load_adapter: {folder} does not belong to this model: {'; '.join(problems)}.")


def _unpacked(form: PeftFormat | None, config: Mapping[str, Any], tensors: dict[str, Tensor], folder: Any) -> dict[str, Tensor]:
    """The file's tensors under the keys and shapes that the form names."""
    if form is None or form.unpack is None:
        return tensors
    try:
        return form.unpack(config, tensors)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as e:
        raise CheckpointError(f"load_adapter: {folder}: {e}") from e


def _check_states(model: nn.Module, record: Adaptation, tensors: Mapping[str, Tensor], folder: Any) -> None:
    for method, keys in _methods_at(model, record):
        try:
            method.check_state({leaf: tensors[key] for leaf, key in keys.items()})
        except ValueError as e:
            raise CheckpointError(f"load_adapter: {folder}: {', '.join(keys.values())}: {e}") from e


def _fits(came: Tensor, needed: Tensor) -> bool:
    """Equal dtypes, or a floating dtype that widens without loss."""
    if came.dtype == needed.dtype:
        return True
    # of one byte and less: torch promotes none of them
    both_float = all(t.dtype.is_floating_point and t.dtype.itemsize > 1 for t in (came, needed))
    return both_float and torch.promote_types(came.dtype, needed.dtype) == needed.dtype


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
