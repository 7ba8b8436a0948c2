"""adapt, unload, merge, adapters_off: changing a model's layers in place, and back.

The class of each targeted layer is changed; its weight, bias, hooks, ties and base state-dict keys stay where they are.
What was before (classes, requires_grad, trained copies of other modules) is written down on the adapted root, so that
unload restores the model bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft.adapter import (
    Adapter,
    adapted_class,
    build_adapter,
    build_methods,
    is_adapted,
    is_conv1d,
    recipes,
    release,
    weight_of,
)
from fastpeft.base import Plain
from fastpeft.beside import FFNAdapter, attach, detach
from fastpeft.ffn import FFN, find_ffns
from fastpeft.registry import Recipe
from fastpeft.report import Report, Route
from fastpeft.targets import (
    Targets,
    by_pattern,
    checked_targets,
    fast_path_owners,
    is_all,
    is_linear_layer,
    matches,
    output_head,
    refusal,
    select,
    shared_weights,
)
from fastpeft.terms import Term, effective_bias, effective_weight, refuse_tokenwise

_RECORD = "_fastpeft_adaptation"
_BIAS = ("none", "all", "lora_only")


@dataclass
class Adaptation:
    """What adapt did to a model: kept on the adapted root for checkpoint, adapters_off and unload.

    sites: names of adapted layers and FFNs.   options: as given to adapt.   originals: name -> untouched copy of a module of
    modules_to_save.   biases: parameter name -> untouched copy of a bias that trains.   flags: requires_grad before.
    classes: of adapted layers.   ffns, hooks: of FFNs with an adapter beside them.
    """

    methods: list[str]
    options: dict[str, Any]
    rank_pattern: dict[str, Any]
    alpha_pattern: dict[str, Any]
    bias: str
    sites: list[str] = field(default_factory=list)
    classes: dict[str, type] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    ffns: dict[str, FFN] = field(default_factory=dict)
    hooks: dict[str, list[RemovableHandle]] = field(default_factory=dict)
    input_grads: bool = False


def adaptation(model: nn.Module, who: str) -> Adaptation:
    """The record of an adapted model; ValueError if the model is not adapted."""
    record = model.__dict__.get(_RECORD)
    if record is None:
        raise ValueError(
            f"{who}: this {type(model).__name__} was not adapted; call fastpeft.adapt on it, and pass the same module here."
        )
    return record


def adapt(
    model: nn.Module,
    method: Any,
    *,
    target_modules: Targets | None = None,
    exclude_modules: Targets | None = None,
    modules_to_save: list[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bias: str | None = None,
    **options: Any,
) -> Report:
    """Give the model's linear layers or FFNs adapters, in place; freeze everything else.

    method: a recipe name, a list of names (their terms add up at each layer), or a peft config object (LoraConfig, LoHaConfig).
    target_modules: list of names or dotted suffixes, a regex for the whole name, or "all-linear" (the default): every
        nn.Linear and Transformers Conv1D but the output head. A method that sits beside an FFN takes it as a filter of the
        model's FFNs.   exclude_modules: list or regex, checked first.
    modules_to_save: suffixes of further modules that train and are saved whole, such as a new classification head.
    rank_pattern, alpha_pattern: name or regex -> rank or alpha of the layers it ends; first hit wins.
    bias: "none" (default), "all" (every bias of the model trains) or "lora_only" (those of adapted layers).
    options: the method's own; fastpeft.methods() lists them.
    Returns a Report: the route of each layer, parameter counts.
    Raises ValueError / TypeError, leaving the model as it was, on unknown methods, options or targets, on values that do
    not fit a layer, and on a model that is adapted already.
    """
    asked = dict(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        modules_to_save=modules_to_save,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias=bias,
    )
    if not isinstance(method, (str, list, tuple)):
        from fastpeft.integrations.peft import from_config

        name, settings, own = from_config(method, model)
        for key, value in asked.items():
            if value is not None:
                raise ValueError(f"adapt: {key} was given beside a peft config, which holds it; set it in the config.")
        return _adapt(model, name, **settings, **(own | options))
    return _adapt(model, list(method) if not isinstance(method, str) else method, **asked, **options)


def _adapt(
    model: nn.Module,
    method: str | list[str],
    *,
    target_modules: Targets | None,
    exclude_modules: Targets | None,
    modules_to_save: list[str] | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    bias: str | None,
    **options: Any,
) -> Report:
    bias = "none" if bias is None else bias
    if bias not in _BIAS:
        raise ValueError(f"adapt: bias={bias!r}; it must be one of {', '.join(_BIAS)}.")
    _refuse_second(model)
    found = recipes(method, options)
    on_linear, on_ffn = ([r for r in found if r.site == site] for site in ("linear", "ffn"))
    record = Adaptation([r.name for r in found], options, dict(rank_pattern or {}), dict(alpha_pattern or {}), bias)
    saved = _saved_modules(model, modules_to_save)
    report = Report(saved_modules=list(saved), procedures=[r.cls.PROCEDURE for r in found if r.cls.PROCEDURE])
    targets = "all-linear" if target_modules is None else target_modules
    ffns, ffn_adapters = _ffn_adapters(model, targets, exclude_modules, saved, on_ffn, options, report)
    modules = _sites(model, targets, exclude_modules, saved, report, ffns) if on_linear else {}
    if not on_linear and bias == "lora_only":
        raise ValueError(f"adapt: bias='lora_only' means adapted linear layers, and {', '.join(record.methods)} has none.")
    for key, pattern in (("rank", rank_pattern), ("alpha", alpha_pattern)):
        if pattern and not any(key in r.options for r in found):
            raise ValueError(f"adapt: {key}_pattern was given, but {', '.join(record.methods)} has no option {key!r}.")
    layers = [n for n, m in model.named_modules() if is_linear_layer(m)] if on_linear else []
    _notes(model, targets, saved, report, [*layers, *ffns])

    adapters: dict[str, Adapter] = {}
    for name, module in modules.items():
        own = options | {
            key: by_pattern(name, pattern, options.get(key))
            for key, pattern in (("rank", rank_pattern), ("alpha", alpha_pattern))
            if by_pattern(name, pattern, None) is not None
        }
        adapters[name] = build_adapter(name, Plain(weight_of(module).detach()), on_linear, own)
    for other, partner in shared_weights(model, adapters).items():
        if any(m.overlay for m in adapters[other].children()):
            raise ValueError(
                f"adapt: overlay=True at {other!r}, whose weight {partner!r} shares and would read changed; use apply='copy'."
            )
        report.notes.append(f"{other} shares its weight with {partner}: the adapter acts on {other} only, and merge refuses.")

    _attach(model, record, adapters, ffns, ffn_adapters, saved)
    for name, adapter in (adapters | ffn_adapters).items():
        width = ffns[name].width if name in ffns else None
        shape = (
            f"{width.dtype} ffn {width.features} -> {width.features}"
            if width
            else f"{modules[name].weight.dtype} {tuple(modules[name].weight.shape)}"
        )
        trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        report.layers[name] = Route(tuple(adapter._modules), shape.removeprefix("torch."), trainable)
    return report.count(model)


def _ffn_adapters(
    model: nn.Module,
    target_modules: Targets,
    exclude_modules: Targets | None,
    saved: Mapping[str, nn.Module],
    found: list[Recipe],
    options: Mapping[str, Any],
    report: Report,
) -> tuple[dict[str, FFN], dict[str, FFNAdapter]]:
    """The FFNs to adapt and an adapter for each, if some recipe sits beside an FFN; what is left alone goes into the report."""
    if not found:
        return {}, {}
    who = f"adapt: {', '.join(r.name for r in found)}"
    ffns, alone = find_ffns(model, target_modules, exclude_modules, saved, who)
    for name, reason in alone.items():
        report.layers[name] = Route((), "experts", 0, reason)
    return ffns, {n: FFNAdapter(build_methods(n, f.width, found, options), f) for n, f in ffns.items()}


def _notes(
    model: nn.Module, targets: Targets, saved: Mapping[str, nn.Module], report: Report, sites: list[str]
) -> None:
    """Notes on targets that match none of `sites`, and on the output head."""
    if isinstance(targets, (list, tuple, set)):
        unused = [t for t in targets if not any(matches(n, [t]) for n in sites)]
        if unused:
            report.notes.append(f"target_modules entries that match no layer: {', '.join(unused)}.")
    head = output_head(model)
    if is_all(targets) and head and head not in saved:
        report.notes.append(f"the output head {head!r} is frozen; name it in modules_to_save to train it.")


def _refuse_second(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_adapted(module):
            raise ValueError(
                f"adapt: {name!r} is adapted already; call fastpeft.unload first, or pass several methods as one list."
            )
        if type(module).__module__.startswith("peft.tuners."):
            raise ValueError(
                f"adapt: {name!r} carries a PEFT adapter ({type(module).__name__}); merge or unload it with PEFT first."
            )


def _saved_modules(model: nn.Module, names: list[str] | None) -> dict[str, nn.Module]:
    """Modules of modules_to_save by name; ValueError if an entry matches none."""
    if not names:
        return {}
    wanted = checked_targets("modules_to_save", names)
    found = {n: m for n, m in model.named_modules() if n and matches(n, wanted)}
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        if not any(matches(n, entry if isinstance(wanted, str) else [entry]) for n in found):
            raise ValueError(f"adapt: modules_to_save entry {entry!r} matches no module of {type(model).__name__}.")
    return {n: m for n, m in found.items() if not any(n.startswith(o + ".") for o in found)}


def _sites(
    model: nn.Module,
    target_modules: Targets,
    exclude_modules: Targets | None,
    saved: Mapping[str, nn.Module],
    report: Report,
    ffns: Mapping[str, FFN],
) -> dict[str, nn.Module]:
    """The layers to adapt; what is left alone goes into the report with its reason."""
    found, named = select(model, target_modules, ffns)
    excluded = checked_targets("exclude_modules", exclude_modules) if exclude_modules else None
    sites: dict[str, nn.Module] = {}
    for name, module in found.items():
        if excluded is not None and matches(name, excluded):
            continue
        if any(name == s or name.startswith(s + ".") for s in saved):
            continue
        reason = refusal(model, name, module)
        if reason is None:
            sites[name] = module
        elif named:
            raise ValueError(f"adapt: cannot adapt {name!r}: {reason}. Leave it out of target_modules.")
        else:
            report.layers[name] = Route((), str(tuple(getattr(module, "weight", torch.empty(0)).shape)), 0, reason)
    if not sites:
        reasons = "; ".join(f"{n}: {r}" for n, r in report.skipped.items())
        raise ValueError(
            f"adapt: no layer is left to adapt with target_modules={target_modules!r}, exclude_modules={exclude_modules!r}"
            f"{' (' + reasons + ')' if reasons else ''}."
        )
    return sites


def _attach(
    model: nn.Module,
    record: Adaptation,
    adapters: Mapping[str, Adapter],
    ffns: Mapping[str, FFN],
    ffn_adapters: Mapping[str, FFNAdapter],
    saved: Mapping[str, nn.Module],
) -> None:
    """The only place that changes the model; nothing in it depends on the user's input any more."""
    record.flags = {n: p.requires_grad for n, p in model.named_parameters()}
    record.originals = {n: copy.deepcopy(m) for n, m in saved.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in saved.values():
        for parameter in module.parameters():
            if parameter.dtype.is_floating_point:
                parameter.requires_grad_(True)
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        record.sites.append(name)
        record.classes[name] = type(module)
        module.__class__ = adapted_class(type(module))
        module.adapter = adapter.train(module.training)
    for name, ffn in ffns.items():
        record.sites.append(name)
        record.ffns[name] = ffn
        record.hooks[name] = attach(model, ffn, ffn_adapters[name])
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        adapted = record.bias == "all" or path in adapters
        if leaf == "bias" and record.bias != "none" and adapted and not parameter.requires_grad and ".adapter." not in name:
            record.biases[name] = parameter.detach().clone()
            parameter.requires_grad_(True)
    for module, attribute, value in fast_path_owners(model, [*adapters, *(n for f in ffns.values() for n in f.linears)]):
        owner = next(n for n, m in model.named_modules() if m is module)
        record.attributes.append((owner, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)
    checkpointing = "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
    if getattr(model, checkpointing, False) and hasattr(model, "enable_input_require_grads"):
        # reentrant checkpointing gives no gradient at all when no input of a block requires one (frozen embeddings)
        model.enable_input_require_grads()
        record.input_grads = True
    model.__dict__[_RECORD] = record


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Adapted layers and FFNs by name."""
    return {n: m for n, m in model.named_modules() if is_adapted(m)}


def unload(model: nn.Module) -> nn.Module:
    """Remove every adapter and restore the model as it was before adapt, bit for bit. Returns the model.

    ValueError if the model is not adapted (also after merge, which gave up the original weights).
    """
    record = adaptation(model, "unload")
    for name in record.classes:
        release(model.get_submodule(name))
    for name, cls in record.classes.items():
        _strip(model.get_submodule(name), cls)
    for name, ffn in record.ffns.items():
        detach(model, ffn, record.hooks[name])
    for name, original in record.originals.items():
        _restore_module(model, name, original)
    for name, value in record.biases.items():
        with torch.no_grad():
            model.get_parameter(name).copy_(value)
    _restore_flags(model, record)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its weight and bias, in place, and remove it. Returns the model.

    W + delta is formed in fp32 (fp64 for an fp64 base) and rounded once. Modules of modules_to_save and trained biases keep
    their trained values. Not reversible: keep a copy, or the saved adapter, if the original weights are needed again.
    Raises ValueError, changing nothing, where a method has no single weight, a weight is shared with another module, or a
    merged weight would not be finite.
    """
    record = adaptation(model, "merge")
    refuse_ffns(model, record, "merge")
    shared = shared_weights(model, record.sites)
    if shared:
        name, partner = next(iter(shared.items()))
        raise ValueError(f"merge: {name!r} shares its weight with {partner!r}, which would change too; untie them first.")
    modules = {name: model.get_submodule(name) for name in record.sites}
    for module in modules.values():
        release(module)
    # twice over the layers and not a second copy of all weights: an error found at the last layer must change nothing
    for name, module in modules.items():
        for merged in _merged(module):
            if merged is not None and not bool(merged.isfinite().all()):
                raise ValueError(f"merge: the merged weight or bias of {name!r} is not finite; the model is unchanged.")
    for name, module in modules.items():
        weight, bias = _merged(module)
        with torch.no_grad():
            module.weight.copy_(weight.t() if is_conv1d(module) else weight)
            if bias is not None and module.bias is not None:
                module.bias.copy_(bias)
        if bias is not None and module.bias is None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        _strip(module, record.classes[name])
    _restore_flags(model, record)
    return model


def refuse_ffns(model: nn.Module, record: Adaptation, who: str) -> None:
    """Raise ValueError for `who` (merge, export_lora) if some adapter stands beside an FFN, which has no weight to fold it into."""
    for name in record.ffns:
        methods = "+".join(n for n, _ in model.get_submodule(name).adapter.named_children())
        raise ValueError(
            f"{who}: {methods} at {name!r} stands beside a non-linear FFN, so no weight can take it in; keep it unmerged, and "
            "use save_adapter."
        )


@torch.no_grad()
def static_terms(module: nn.Module, who: str) -> list[Term]:
    """The terms of an adapted layer for `who` (merge, export_lora): no dropout, true ranks; ValueError if token-dependent."""
    adapter: Any = module.adapter
    base, training = Plain(weight_of(module)), adapter.training
    try:
        terms = [term for method in adapter.eval().children() for term in method.static_terms(base)]
    finally:
        adapter.train(training)
    refuse_tokenwise(terms, who)
    return terms


@torch.no_grad()
def _merged(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of the merged layer, in the layer's dtype; dropout plays no part."""
    weight, terms = weight_of(module), static_terms(module, "merge")
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged, bias = effective_weight(weight, terms, wide), effective_bias(module.bias, terms, wide)
    return merged.to(weight.dtype), None if bias is None else bias.to(weight.dtype)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model computes as before adapt: adapters, trained modules and trained biases step aside.

    No tensor is written, so it may stand between a forward and its backward (a DPO reference pass). It can be nested.
    With overlay=True the weights are put back first, and RuntimeError says so where a backward is still to come.
    """
    record = adaptation(model, "adapters_off")
    adapters = [model.get_submodule(name).adapter for name in record.sites]
    for name in record.classes:
        module: Any = model.get_submodule(name)
        if any(m.overlay and m.overlay.alive for m in module.adapter.children()):
            raise RuntimeError(
                f"adapters_off: {name!r} has overlay=True and a forward whose backward has not run; its weight cannot be put back "
                "now. Run that backward first (or drop its output), or adapt with apply='copy'."
            )
        release(module)
    enabled = [a.enabled for a in adapters]
    modules = {name: model.get_submodule(name) for name in record.originals}
    biases = {name: model.get_parameter(name) for name in record.biases}
    try:
        for a in adapters:
            a.enabled = False
        for name, original in record.originals.items():
            live = next(modules[name].parameters(), None)
            stand_in = original.train(modules[name].training)
            _place(model, name, stand_in if live is None else stand_in.to(live.device, live.dtype))
        for name, value in record.biases.items():
            owner, _, leaf = name.rpartition(".")
            stand_in = value.to(biases[name].device, biases[name].dtype)
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(stand_in, requires_grad=False)
        yield model
    finally:
        for a, flag in zip(adapters, enabled, strict=True):
            a.enabled = flag
        for name, module in modules.items():
            _place(model, name, module)
        for name, parameter in biases.items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = parameter


def _strip(module: nn.Module, cls: type) -> None:
    del module.adapter
    module.__class__ = cls


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def _restore_module(model: nn.Module, name: str, original: nn.Module) -> None:
    """Write the untouched values back into the live module: whoever holds it keeps the same object."""
    live = model.get_submodule(name)
    with torch.no_grad():
        kept = dict(original.state_dict(keep_vars=True))
        for key, tensor in live.state_dict(keep_vars=True).items():
            tensor.copy_(kept[key])


def _restore_flags(model: nn.Module, record: Adaptation) -> None:
    for name, parameter in model.named_parameters():
        if name in record.flags:
            parameter.requires_grad_(record.flags[name])
            if not record.flags[name]:
                parameter.grad = None
    for owner, attribute, value in record.attributes:
        setattr(model.get_submodule(owner), attribute, value)
    if record.input_grads:
        model.disable_input_require_grads()
    del model.__dict__[_RECORD]
