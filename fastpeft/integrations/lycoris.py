"""LoRA, DoRA, LoHa and LoKr files of kohya's sd-scripts and LyCORIS: one .safetensors without a config. adapt's options are read off names,
shapes and alphas.

A key is `<prefix>_<module name with _ for .>.<leaf>`; the leaves of a layer are `alpha` and lora_down.weight, lora_up.weight (LoRA), with them
dora_scale [out, 1] (DoRA), hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b (LoHa) or lokr_w1, or lokr_w1_a and lokr_w1_b, and the same for w2
(LoKr). The scale is alpha / rank: LyCORIS stores alpha * sqrt(rank) where it trained with rs_lora. An alpha that is zero or absent is the
rank. LoKr with both halves whole has scale 1 whatever its alpha says, as LyCORIS reads it. LyCORIS itself is not imported.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.checkpoint import check_tensors, some
from fastpeft.folder import CheckpointError, open_weights
from fastpeft.leave import unload
from fastpeft.method.lokr import factorization
from fastpeft.patterns import per_layer
from fastpeft.report import Report
from fastpeft.swap import adapt
from fastpeft.targets import is_linear_layer

_STEMS = {"loha": "hada_", "lokr": "lokr_"}
# parameter -> leaf
_LORA = {"A": "lora_down.weight", "B": "lora_up.weight"}
_LEAF = {"lora": _LORA, "dora": _LORA | {"m": "dora_scale"}}
# what one layer holds: LoHa's four, or LoKr's two halves, each whole or low-rank
_LOHA = {f"hada_w{half}_{side}" for half in (1, 2) for side in "ab"}
_W1, _W2 = ([{f"lokr_w{half}"}, {f"lokr_w{half}_a", f"lokr_w{half}_b"}] for half in (1, 2))
_COMPLETE = [*(set(leaves.values()) for leaves in _LEAF.values()), _LOHA, *(w1 | w2 for w1 in _W1 for w2 in _W2)]
_LEAVES = {"alpha"}.union(*_COMPLETE)
_REFUSED = {
    "lora_mid.weight": "Tucker factors belong to convolutions",
    **{
        f"{stem}t{half}": "Tucker factors belong to convolutions"
        for stem in _STEMS.values()
        for half in (1, 2)
    },
}


def load_lycoris(model: nn.Module, file: str | os.PathLike[str], *, prefix: str = "lycoris") -> Report:
    """Adapt `model` as a LoRA, DoRA, LoHa or LoKr file of kohya or LyCORIS says and load its values; returns adapt's Report.

    prefix: a layer is called <prefix>_<module name with _ for .> in the file.
    16-bit tensors are widened to the adapter's fp32 without loss. A layer of the file that the model lacks is an error, a
    layer of the model that the file lacks is left alone.
    Raises FileNotFoundError for a missing file and CheckpointError for everything else that is wrong with it or with the
    model (damaged, unexpected, missing or misshapen tensors, NaN, a name that two modules share, a model with adapters, shapes
    that no options of adapt give); the model is then as it was before.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"load_lycoris: {path} does not exist; give LyCORIS' .safetensors file.")
    _, tensors = open_weights(path)
    kind, layers = _layers(model, tensors, prefix, path)
    options = _OPTIONS[kind](layers, path)
    targets = "|".join(re.escape(layer.name) for layer in layers)
    with torch.random.fork_rng():
        try:
            report = adapt(model, kind, target_modules=targets, **options)
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"load_lycoris: {path} does not fit this model: {e}") from e
    try:
        live = {key: p for layer in layers for key, p in _live(model, layer, kind)}
        tensors = {k: _magnitude(k, t, tensors) for k, t in tensors.items() if not k.endswith(".alpha")}
        check_tensors(live, tensors, path, {})
    except BaseException:
        unload(model)
        raise
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(tensors[key])
    return report.count(model)


@dataclass(frozen=True)
class _Layer:
    """One layer of the file.   key: its name there.   name: the module's.   leaves: leaf -> tensor, without alpha."""

    key: str
    name: str
    leaves: Mapping[str, Tensor]
    alpha: float | None


def _live(model: nn.Module, layer: _Layer, kind: str) -> Iterator[tuple[str, Tensor]]:
    adapter: Any = model.get_submodule(layer.name).adapter
    for name, p in adapter.get_submodule(kind).named_parameters():
        yield f"{layer.key}.{_LEAF[kind][name] if kind in _LEAF else _STEMS[kind] + name}", p


def _magnitude(key: str, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """DoRA's magnitudes are [out, 1] in the file and [out] here; LyCORIS keeps them in fp32 beside factors that may be wider."""
    head, _, leaf = key.partition(".")
    if leaf != "dora_scale":
        return t
    other = tensors[f"{head}.{_LORA['B']}"]
    same = all(d.dtype.is_floating_point and d.dtype.itemsize > 1 for d in (t, other))  # what is not, check_tensors refuses
    return t.flatten().to(torch.promote_types(t.dtype, other.dtype) if same else t.dtype)


def _layers(
    model: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: Path
) -> tuple[str, list[_Layer]]:
    """The file's only method and its layers, each with its module; CheckpointError for keys that are not such a file's."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        head, _, leaf = key.partition(".")
        if head.startswith(f"{prefix}_") and leaf in _LEAVES:
            found.setdefault(head, {})[leaf] = tensor
        else:
            strange.append(f"{key} ({_REFUSED[leaf]})" if leaf in _REFUSED else key)
    if strange or not found:
        raise CheckpointError(
            f"load_lycoris: {path} holds {f'keys that are not understood: {some(strange)}' if strange else 'no tensor'}; "
            f"needed are {prefix}_<module>.alpha and .lora_..., .hada_... or .lokr_... of linear layers. Give another prefix if its names "
            "begin otherwise; for an adapter folder of fastpeft or PEFT, give the folder to load_adapter."
        )
    problems = [f"{head}: {p}" for head, leaves in found.items() if (p := _problem(leaves))]
    if problems:
        raise CheckpointError(
            f"load_lycoris: {path} is damaged or no file of linear layers: {'; '.join(problems[:6])}."
        )
    kinds = {head: _kind(leaves) for head, leaves in found.items()}
    if len(set(kinds.values())) > 1:
        split = {kind: some([head for head in found if kinds[head] == kind]) for kind in sorted(set(kinds.values()))}
        raise CheckpointError(
            f"load_lycoris: {path} holds {len(split)} methods, and adapt gives all layers one: {split}. Split the file."
        )
    names = _modules(model, list(found), prefix, path)
    layers = [
        _Layer(head, names[head], leaves, _alpha(leaves.pop("alpha", None))) for head, leaves in found.items()
    ]
    return next(iter(kinds.values())), layers


def _kind(leaves: Mapping[str, Tensor]) -> str:
    """The recipe of a layer with these leaves."""
    if leaves.keys() & set(_LORA.values()):
        return "dora" if "dora_scale" in leaves else "lora"
    return "loha" if leaves.keys() & _LOHA else "lokr"


def _problem(leaves: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the leaves of one layer by themselves, or None."""
    own = leaves.keys() - {"alpha"}
    if own not in _COMPLETE:
        return f"it has {', '.join(sorted(own)) or 'an alpha only'}; needed are {_needed(own)}"
    for leaf in sorted(own):
        if leaves[leaf].dim() != 2:
            return f"{leaf} is {tuple(leaves[leaf].shape)}, needed two dimensions (convolutions are not supported)"
        if not leaves[leaf].numel():
            return f"{leaf} is {tuple(leaves[leaf].shape)}, and holds nothing"
    scale = leaves.get("dora_scale")
    if scale is not None and tuple(scale.shape) != (leaves["lora_up.weight"].shape[0], 1):
        return f"dora_scale is {tuple(scale.shape)}, needed one number per output, [out, 1] (LyCORIS' wd_on_out)"
    alpha = leaves.get("alpha", torch.ones(()))
    if alpha.dtype.is_complex or alpha.dtype is torch.bool or (alpha.is_floating_point() and alpha.dtype.itemsize < 2):
        return f"alpha is {alpha.dtype}, needed a floating-point or whole number"
    if alpha.numel() != 1 or not bool(alpha.isfinite().all()):
        return f"alpha is {alpha.tolist()}, needed one finite number"
    return None


def _needed(own: Set[str]) -> str:
    lora = f"{' and '.join(_LORA.values())} (and dora_scale)"
    loha, lokr = ", ".join(sorted(_LOHA)), "lokr_w1 or lokr_w1_a and lokr_w1_b, and the same of lokr_w2"
    of_lora = {*_LORA.values(), "dora_scale"}
    for needed, leaves in ((lora, of_lora), (loha, _LOHA), (lokr, _LEAVES - of_lora - _LOHA)):
        if own and own <= leaves:
            return needed
    return f"{lora}, or {loha}, or {lokr}"


def _alpha(alpha: Tensor | None) -> float | None:
    """The number, or None where it stands for the rank."""
    return None if alpha is None or alpha.item() == 0 else float(alpha.item())


def _modules(model: nn.Module, heads: list[str], prefix: str, path: Path) -> dict[str, str]:
    """Name in the file -> name of the module; CheckpointError where there is none, several, or no linear layer."""
    known: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        known.setdefault(f"{prefix}_{name.replace('.', '_')}", []).append(name)
    absent = [head for head in heads if head not in known]
    if absent:
        raise CheckpointError(
            f"load_lycoris: {path} holds layers that {type(model).__name__} lacks: {some(absent)}."
        )
    linear = {head: [n for n in known[head] if is_linear_layer(model.get_submodule(n))] for head in heads}
    for head, names in linear.items():
        if not names:
            kinds = ", ".join(f"{n} ({type(model.get_submodule(n)).__name__})" for n in known[head])
            raise CheckpointError(
                f"load_lycoris: {head} of {path} belongs to {kinds}; only linear layers can be adapted."
            )
        if len(names) > 1:
            raise CheckpointError(
                f"load_lycoris: {head} of {path} may be {' or '.join(map(repr, names))}: both names are the same with _ for '.'; "
                "rename one of the modules, or the layer in the file by another prefix."
            )
    return {head: names[0] for head, names in linear.items()}


def _scale(layers: list[_Layer], ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapt's options for these ranks, and for the alphas of `layers`."""
    alphas = {layer.name: ranks[layer.name] if layer.alpha is None else layer.alpha for layer in layers}
    return per_layer("rank", ranks) | per_layer("alpha", alphas)


def _lora(layers: list[_Layer], path: Path) -> dict[str, Any]:
    return _scale(layers, {layer.name: layer.leaves["lora_down.weight"].shape[0] for layer in layers})


def _loha(layers: list[_Layer], path: Path) -> dict[str, Any]:
    ranks = {layer.name: layer.leaves["hada_w1_b"].shape[0] for layer in layers}
    return _scale(layers, ranks) | {"flavor": "lycoris"}


@dataclass(frozen=True)
class _Halves:
    """w1 [a, c], w2 [b, d]; their ranks, None where one is whole."""

    a: int
    c: int
    b: int
    d: int
    rank1: int | None
    rank2: int | None

    @property
    def rank(self) -> int | None:
        return self.rank2 if self.rank1 is None else self.rank1

    def splits(self, factor: int, unbalanced: bool) -> bool:
        """True if LyCORIS would split the layer's sides so."""
        out = (self.b, self.a) if unbalanced else (self.a, self.b)
        pairs = (out, (self.c, self.d))
        return all(factorization(m * n, factor, "lycoris") == (m, n) for m, n in pairs)

    def least(self, both: bool) -> int:
        """The smallest rank at which each half is whole; `both`: with decompose_both."""
        return math.ceil(max(self.b, self.d, *((self.a, self.c) if both else ())) / 2)

    def takes(self, rank: int, both: bool) -> bool:
        """True if this rank gives these halves."""
        low1, low2 = both and 2 * rank < max(self.a, self.c), 2 * rank < max(self.b, self.d)
        return (self.rank1, self.rank2) == (rank if low1 else None, rank if low2 else None)

    def __str__(self) -> str:
        ranks = [f" of rank {r}" if r else "" for r in (self.rank1, self.rank2)]
        return f"w1 ({self.a}, {self.c}){ranks[0]} and w2 ({self.b}, {self.d}){ranks[1]}"


def _halves(leaves: Mapping[str, Tensor]) -> _Halves:
    def half(k: int) -> tuple[int, int, int | None]:
        if f"lokr_w{k}" in leaves:
            rows, columns = leaves[f"lokr_w{k}"].shape
            return rows, columns, None
        down = leaves[f"lokr_w{k}_b"]
        return leaves[f"lokr_w{k}_a"].shape[0], down.shape[1], down.shape[0]

    (a, c, rank1), (b, d, rank2) = half(1), half(2)
    return _Halves(a, c, b, d, rank1, rank2)


def _lokr(layers: list[_Layer], path: Path) -> dict[str, Any]:
    """adapt's options that give every layer the file's shapes; CheckpointError lists the layers that have no place in them."""
    halves = {layer.name: _halves(layer.leaves) for layer in layers}
    factor, unbalanced = _splitting(list(halves.values()))
    both = any(h.rank1 is not None for h in halves.values())
    low = Counter(h.rank for h in halves.values() if h.rank is not None)
    common = low.most_common(1)[0][0] if low else 1
    ranks = {n: max(common, h.least(both)) if h.rank is None else h.rank for n, h in halves.items()}
    odd = [
        f"{n}: {h}"
        for n, h in halves.items()
        if not (h.splits(factor, unbalanced) and h.takes(ranks[n], both))
    ]
    if odd:
        raise CheckpointError(
            f"load_lycoris: {path} holds LoKr layers that adapt's options do not give together with the others (factor, unbalanced "
            f"and decompose_both are one for all layers; tried {factor=}, {unbalanced=}, decompose_both={both}): {'; '.join(odd)}."
        )
    shared = {"factor": factor, "unbalanced": unbalanced, "decompose_both": both, "flavor": "lycoris"}
    scaled = [layer for layer in layers if halves[layer.name].rank is not None]
    return shared | (_scale(scaled, ranks) if scaled else {"full_matrix": True})


def _splitting(halves: list[_Halves]) -> tuple[int, bool]:
    """factor and unbalanced that split every layer as the file does; where none does, those that split the most layers."""
    counts = Counter(halves)
    sides = {n for h in counts for n in (h.a, h.b, h.c, h.d)}
    widest = max(h.a * h.b for h in counts), max(h.c * h.d for h in counts)
    # beyond the root of the widest side a factor differs from -1 only where it divides a side: it is then one of `sides`
    factors = [-1, *sorted(sides), *range(1, math.isqrt(max(widest)) + 1)]
    best, score = (-1, False), -1
    for factor in dict.fromkeys(factors):
        for unbalanced in (False, True):
            fits = sum(n for h, n in counts.items() if h.splits(factor, unbalanced))
            if fits == len(halves):
                return factor, unbalanced
            if fits > score:
                best, score = (factor, unbalanced), fits
    return best


_OPTIONS = {"lora": _lora, "dora": _lora, "loha": _loha, "lokr": _lokr}
