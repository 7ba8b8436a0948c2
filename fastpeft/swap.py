"""adapt: changing a model's layers in place.

The class of each targeted layer is changed; its weight, bias, hooks, ties and base state-dict keys stay where they are.
What was before (classes, requires_grad, trained copies of other modules) is written down on the adapted root, so that
unload restores the model bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastpeft import routing_hooks
from fastpeft.adapter import (
    Adapter,
    Build,
    adapted_class,
    build_adapter,
    build_methods,
    free,
    own_base,
    recipes,
    shared_holders,
    site_of,
)
from fastpeft.beside import FFNAdapter, attach
from fastpeft.experts import Expert, absences, experts_by_site, layout, read_experts, stacked
from fastpeft.ffn import FFN, find_ffns
from fastpeft.packed import is_packed
from fastpeft.patterns import by_pattern, check_pattern, exactly
from fastpeft.record import CONTAINERS, RECORD, SHARED, Adaptation, opened
from fastpeft.registry import Recipe
from fastpeft.report import Report, Route
from fastpeft.sites import blocks_around, note_targets, refuse_second, saved_modules, sites_of
from fastpeft.targets import (
    Targets,
    fast_path_owners,
    is_all,
    is_linear_layer,
    shared_weights,
)
from fastpeft.trained import begin, check_own, own_parameters, written

_BIAS = ("none", "all", "lora_only")
_REENTRANT = (
    "several layers share parameters: reentrant checkpoints under DistributedDataParallel raise; use_reentrant=False works, and "
    "so does static_graph=True."
)


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
    quantize: str | None = None,
    keep_base: bool = True,
    experts: Any = None,
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
    quantize: "nf4" (also "nf2", "nf3", ...) or "int8": the base of each adapted layer is quantised and computes dequantised.
    keep_base: False lets go of the weights that `quantize` or a start (loftq, ...) replaced, and keeps no copy (on the CPU) of the
        parameters that galore, lisa or delta_lora in place train; unload and adapters_off then raise.
    experts: for moa and phatgoose: folders of trained LoRAs (a list, or name -> folder), which then say which layers are adapted;
        or a number of fresh experts. See fastpeft.experts.
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
        asked, method, options = settings, name, own | options
    names = list(method) if not isinstance(method, str) else method
    trained: list[Expert] = []
    if experts is not None:
        plan, trained = _trained(model, names, experts, asked | options)
        options["experts"] = plan
    if trained:
        asked["target_modules"] = exactly(experts_by_site(plan))
    return build_and_attach(model, names, **asked, quantize=quantize, keep_base=keep_base, given=trained, **options)


def _trained(model: nn.Module, names: str | list[str], experts: Any, asked: Mapping[str, Any]) -> tuple[Any, list[Expert]]:
    """What the option `experts` is to be, a number or a layout, and the experts read from folders, if any."""
    recipes(names, {"experts": experts})  # which says so where no method takes experts
    if isinstance(experts, int):
        return experts, []
    beside = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "rank", "alpha"]
    given = [key for key in beside if asked.get(key) is not None]
    if given:
        raise ValueError(f"adapt: {', '.join(given)} beside experts={experts!r}, whose folders say which layers, ranks and scales; leave it out.")
    if asked.get("stage") == "gate" and (asked.get("modules_to_save") or asked.get("bias") not in (None, "none")):
        raise ValueError("adapt: stage='gate' trains gates only, and the folder becomes an expert's; leave out modules_to_save and bias.")
    refuse_second(model)
    found = read_experts(model, experts)
    return layout(model, found), found


def build_and_attach(
    model: nn.Module,
    method: str | list[str],
    *,
    target_modules: Targets | None,
    exclude_modules: Targets | None,
    modules_to_save: list[str] | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    bias: str | None,
    quantize: str | None = None,
    keep_base: bool = True,
    blank: bool = False,
    given: Sequence[Expert] = (),
    **options: Any,
) -> Report:
    """adapt for a method by name. blank: load_adapter's: a checkpoint's values follow, so starts need not look at weights.

    given: the trained experts whose layout is options["experts"].
    """
    for option, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        check_pattern(option, pattern)
    bias = "none" if bias is None else bias
    if bias not in _BIAS:
        raise ValueError(f"adapt: bias={bias!r}; it must be one of {', '.join(_BIAS)}.")
    refuse_second(model)
    found = recipes(method, options)
    on_linear, on_ffn = ([r for r in found if r.site == site] for site in ("linear", "ffn"))
    record = Adaptation(
        [r.name for r in found], options, dict(rank_pattern or {}), dict(alpha_pattern or {}), bias, quantize, keep_base
    )
    saved = saved_modules(model, modules_to_save)
    report = Report(saved_modules=list(saved), procedures=[r.cls.PROCEDURE for r in found if r.cls.PROCEDURE])
    targets = "all-linear" if target_modules is None else target_modules
    ffns, ffn_adapters = _ffn_adapters(model, targets, exclude_modules, saved, on_ffn, options, report)
    modules = sites_of(model, targets, exclude_modules, saved, report, ffns) if on_linear else {}
    blocks = blocks_around(model, modules, found, options, report, is_all(targets))
    if not on_linear and bias == "lora_only":
        raise ValueError(f"adapt: bias='lora_only' means adapted linear layers, and {', '.join(record.methods)} has none.")
    if not on_linear and quantize is not None:
        raise ValueError(
            f"adapt: quantize={quantize!r} quantises the weights of adapted linear layers, and {', '.join(record.methods)} has none."
        )
    for key, pattern in (("rank", rank_pattern), ("alpha", alpha_pattern)):
        if pattern and not any(key in r.options for r in found):
            raise ValueError(f"adapt: {key}_pattern was given, but {', '.join(record.methods)} has no option {key!r}.")
    layers = [n for n, m in model.named_modules() if is_linear_layer(m)] if on_linear else []
    note_targets(model, targets, saved, report, [*layers, *ffns])

    plan = options.get("experts")
    at = experts_by_site(plan) if isinstance(plan, Mapping) else {}
    if at and set(at) != set(modules):
        raise ValueError(f"adapt: the experts' layers are not those that are adapted; only one has {sorted(set(at) ^ set(modules))[:6]}.")
    sites: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, module in modules.items():
        own = options | {
            key: by_pattern(name, pattern, options.get(key))
            for key, pattern in (("rank", rank_pattern), ("alpha", alpha_pattern))
            if by_pattern(name, pattern, None) is not None
        }
        if at:
            own["experts"] = at[name]
        sites[name] = (own_base(module), own)
    holders, by_site = shared_holders(on_linear, sites, blank, blocks)
    build = Build(on_linear, quantize, blank)
    adapters = {name: build_adapter(name, base, build, own, by_site[name]) for name, (base, own) in sites.items()}
    for name, adapter in adapters.items() if given else ():
        for m in adapter.methods().values():
            if m.EXPERTS:
                m.take(*stacked(given, name, at[name], site_of(name, sites[name][0])))
    replaced = [name for name, a in adapters.items() if "base" in a._modules]
    trained = own_parameters(model, found, adapters, saved)
    if not keep_base and not replaced and not trained:
        raise ValueError(f"adapt: keep_base=False, but {', '.join(record.methods)} replaces no base weight; leave it out.")
    shared = shared_weights(model, adapters)
    check_own(record, found, adapters, {name: base for name, (base, _) in sites.items()}, shared)
    for other, partner in shared.items():
        if other in replaced and not keep_base:
            raise ValueError(f"adapt: keep_base=False at {other!r}, whose weight {partner!r} shares; untie them, or keep it.")
        if any(m.overlay for m in adapters[other].methods().values()):
            raise ValueError(
                f"adapt: overlay=True at {other!r}, whose weight {partner!r} shares and would read changed; use apply='copy'."
            )
        report.notes.append(f"{other} shares its weight with {partner}: the adapter acts on {other} only, and merge refuses.")

    shapes = {name: _shape(m, sites[name][0]) for name, m in modules.items()}
    _attach(model, record, adapters, holders, ffns, ffn_adapters, saved, trained)
    if not keep_base:
        for name in replaced:
            free(modules[name])
    for name, adapter in (adapters | ffn_adapters).items():
        width = ffns[name].width if name in ffns else None
        shape = (
            f"{width.dtype} ffn {width.features} -> {width.features}"
            if width
            else shapes[name]
        )
        trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        report.layers[name] = Route(adapter.names, shape.removeprefix("torch."), trainable)
    for key, holder in holders.items():
        users = sum(holder in used.values() for used in by_site.values())
        report.shared[f"{record.shared_at}.{SHARED}.{key}".lstrip(".")] = (users, sum(p.numel() for p in holder.parameters() if p.requires_grad))
    if any(h.in_layers for h in holders.values()):
        report.notes.append(_REENTRANT)
    if trained:
        kept = "kept on the CPU, for unload" if keep_base else "not kept"
        report.notes.append(f"{len(trained)} of the model's own parameters train; what they were is {kept}.")
    if at:
        report.notes += absences(plan)
        if not any(p.requires_grad for p in model.parameters()):
            report.notes.append("nothing trains: the experts and what chooses among them are frozen; training mode computes as evaluation does.")
    return report.count(model)


def _shape(module: Any, base: Any) -> str:
    if is_packed(type(module)):
        return f"{type(module).__name__} {(base.out_features, base.in_features)}"
    return f"{module.weight.dtype} {tuple(module.weight.shape)}"


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


def _attach(
    model: nn.Module,
    record: Adaptation,
    adapters: Mapping[str, Adapter],
    holders: nn.ModuleDict,
    ffns: Mapping[str, FFN],
    ffn_adapters: Mapping[str, FFNAdapter],
    saved: Mapping[str, nn.Module],
    trained: list[str],
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
    begin(model, record, trained, written(adapters))
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        record.sites.append(name)
        record.classes[name] = type(module)
        module.__class__ = adapted_class(type(module))
        module.adapter = adapter.train(module.training)
    if holders:
        record.shared_at = next(iter(adapters)) if isinstance(model, CONTAINERS) else ""
        model.get_submodule(record.shared_at).add_module(SHARED, holders.train(model.training))
    record.shared_hooks += routing_hooks.attach(model, holders)
    if any(h.per_forward for h in holders.values()):
        record.shared_hooks += [
            model.register_forward_pre_hook(_open_shared, prepend=True),
            model.register_forward_hook(_close_shared, always_call=True),
        ]
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
    model.__dict__[RECORD] = record


def _open_shared(model: Any, args: Any) -> None:
    for holder in opened(model, model.__dict__[RECORD]):
        holder.open()


def _close_shared(model: Any, args: Any, output: Any) -> None:
    for holder in opened(model, model.__dict__[RECORD]):
        holder.close()
