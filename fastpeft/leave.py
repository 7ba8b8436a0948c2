"""unload, merge, adapters_off: the ways back from an adapted model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.adapter import FREED, base_of, freed, is_conv1d, release
from fastpeft.beside import detach
from fastpeft.packed import is_packed, unpack
from fastpeft.record import RECORD, SHARED, Adaptation, adaptation, holders_of, opened
from fastpeft.shards import refuse_sharded
from fastpeft.targets import shared_weights
from fastpeft.terms import Term, effective_bias, effective_weight, refuse_tokenwise
from fastpeft.trained import beginnings, refuse_lost, restore

_ALONE = "save_adapter here, and load_adapter into a whole model first."


def unload(model: nn.Module) -> nn.Module:
    """Remove every adapter and restore the model as it was before adapt, bit for bit. Returns the model.

    ValueError if the model is not adapted (also after merge, which gave up the original weights), or if the original weights
    were let go with keep_base=False.
    """
    record = adaptation(model, "unload")
    refuse_sharded(model, "unload", _ALONE)
    refuse_lost(model, record, "unload")
    for name in record.classes:
        if freed(model.get_submodule(name)):
            raise ValueError(f"unload: {name!r}: {FREED} merge gives a dense weight of base and adapter.")
    for name in record.classes:
        release(model.get_submodule(name))
    for name, cls in record.classes.items():
        _strip(model.get_submodule(name), cls)
    for name, ffn in record.ffns.items():
        detach(model, ffn, record.hooks[name])
    for name, original in record.originals.items():
        _restore_module(model, name, original)
    restore(model, record.kept | record.biases)
    _finish(model, record)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its weight and bias, in place, and remove it. Returns the model.

    W + delta is formed in fp32 (fp64 for an fp64 base) and rounded once. Modules of modules_to_save and trained biases keep
    their trained values. A base that a start or `quantize` replaced is made dense, and a layer of bitsandbytes an nn.Linear:
    nothing of it is rounded again, but the result has the size of the original and not of the quantised weight, and what
    quantisation lost stays lost.
    Not reversible: keep a copy, or the saved adapter, if the original weights are needed again.
    Raises ValueError, changing nothing, where a method has no single weight, a weight is shared with another module, or a
    merged weight would not be finite.
    """
    record = adaptation(model, "merge")
    refuse_sharded(model, "merge", _ALONE)
    refuse_ffns(model, record, "merge")
    shared = shared_weights(model, record.sites)
    if shared:
        name, partner = next(iter(shared.items()))
        raise ValueError(f"merge: {name!r} shares its weight with {partner!r}, which would change too; untie them first.")
    modules = {name: model.get_submodule(name) for name in record.sites}
    for module in modules.values():
        release(module)
    with _shared_open(model, record):
        _merge_all(modules, record)
    _finish(model, record)
    return model


def _merge_all(modules: Mapping[str, Any], record: Adaptation) -> None:
    # twice over the layers and not a second copy of all weights: an error found at the last layer must change nothing
    for name, module in modules.items():
        for merged in _merged(module):
            if merged is not None and not bool(merged.isfinite().all()):
                raise ValueError(f"merge: the merged weight or bias of {name!r} is not finite; the model is unchanged.")
    for name, module in modules.items():
        weight, bias = _merged(module)
        packed = is_packed(type(module)) and "base" not in module.adapter._modules
        if freed(module):
            dense = weight.t().contiguous() if is_conv1d(module) else weight
            module.weight = nn.Parameter(dense, requires_grad=False)
        with torch.no_grad():
            if not packed:
                module.weight.copy_(weight.t() if is_conv1d(module) else weight)
            if bias is not None and module.bias is not None:
                module.bias.copy_(bias)
        if bias is not None and module.bias is None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        _strip(module, record.classes[name])
        if packed:
            unpack(module, weight)


@contextlib.contextmanager
def _shared_open(model: nn.Module, record: Adaptation) -> Iterator[None]:
    """As within a forward without gradients: what all layers take from one composition is composed once."""
    holders = opened(model, record)
    try:
        with torch.no_grad():
            for holder in holders:
                holder.open()
        yield
    finally:
        for holder in holders:
            holder.close()


def refuse_ffns(model: nn.Module, record: Adaptation, who: str) -> None:
    """Raise ValueError for `who` (merge, export_lora) if some adapter stands beside an FFN, which has no weight to fold it into."""
    for name in record.ffns:
        methods = "+".join(model.get_submodule(name).adapter.names)
        raise ValueError(
            f"{who}: {methods} at {name!r} stands beside a non-linear FFN, so no weight can take it in; keep it unmerged, and "
            "use save_adapter."
        )


@torch.no_grad()
def static_terms(module: nn.Module, who: str) -> list[Term]:
    """The terms of an adapted layer for `who` (merge, export_lora): no dropout, true ranks; ValueError if token-dependent."""
    adapter: Any = module.adapter
    base, training = base_of(module), adapter.training
    try:
        terms = [term for method in adapter.eval().methods().values() for term in method.static_terms(base)]
    finally:
        adapter.train(training)
    refuse_tokenwise(terms, who)
    return terms


@torch.no_grad()
def _merged(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of the merged layer, in the layer's dtype; dropout plays no part."""
    base, terms = base_of(module), static_terms(module, "merge")
    wide = torch.promote_types(base.dtype, torch.float32)
    merged, bias = effective_weight(base.dense(wide), terms, wide), effective_bias(module.bias, terms, wide)
    return merged.to(base.dtype), None if bias is None else bias.to(base.dtype)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model computes as before adapt: adapters, trained modules and trained biases step aside.

    No tensor is written, so it may stand between a forward and its backward (a DPO reference pass). It can be nested.
    With overlay=True the weights are put back first, and RuntimeError says so where a backward is still to come.
    """
    record = adaptation(model, "adapters_off")
    refuse_lost(model, record, "adapters_off")
    if record.kept or record.biases:
        refuse_sharded(model, "adapters_off", "parameters of its own train, and what they were cannot stand in for shards; use a second, frozen model.")
    adapters = [model.get_submodule(name).adapter for name in record.sites]
    for name in record.classes:
        module: Any = model.get_submodule(name)
        if any(m.overlay and m.overlay.alive for m in module.adapter.methods().values()):
            raise RuntimeError(
                f"adapters_off: {name!r} has overlay=True and a forward whose backward has not run; its weight cannot be put back "
                "now. Run that backward first (or drop its output), or adapt with apply='copy'."
            )
        release(module)
    adapters += holders_of(model, record).values()
    enabled = [a.enabled for a in adapters]
    modules = {name: model.get_submodule(name) for name in record.originals}
    try:
        for a in adapters:
            a.enabled = False
        for name, original in record.originals.items():
            live = next(modules[name].parameters(), None)
            stand_in = original.train(modules[name].training)
            _place(model, name, stand_in if live is None else stand_in.to(live.device, live.dtype))
        with beginnings(model, record.kept | record.biases):
            yield model
    finally:
        for a, flag in zip(adapters, enabled, strict=True):
            a.enabled = flag
        for name, module in modules.items():
            _place(model, name, module)


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


def _finish(model: nn.Module, record: Adaptation) -> None:
    """Holders, flags and attributes back as they were, and the record gone."""
    for handle in record.shared_hooks:
        handle.remove()
    model.get_submodule(record.shared_at)._modules.pop(SHARED, None)
    for name, parameter in model.named_parameters():
        if name in record.flags:
            parameter.requires_grad_(record.flags[name])
            if not record.flags[name]:
                parameter.grad = None
    for owner, attribute, value in record.attributes:
        setattr(model.get_submodule(owner), attribute, value)
    if record.input_grads:
        model.disable_input_require_grads()
    del model.__dict__[RECORD]
