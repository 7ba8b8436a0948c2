"""export_lora: an adapter as a plain LoRA, wherever one equals it. export_expert: one of several experts as the LoRA that it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.checkpoint import beside_adapters, file_key, peft_config
from fastpeft.folder import write_folder
from fastpeft.leave import refuse_ffns, static_terms
from fastpeft.patterns import per_layer
from fastpeft.record import Adaptation, adaptation
from fastpeft.registry import get_recipe
from fastpeft.shards import gathered
from fastpeft.stack import GATE
from fastpeft.terms import Bias, Kron, LowRank, kron, plain_factors


def export_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters as a plain PEFT LoRA (scale 1, scales folded into B), wherever low-rank and Kronecker terms are all there is.

    Block-diagonal factors are expanded, several terms at a layer are concatenated by rank; no rank exceeds the layer's own.
    Raises ValueError, writing nothing, for a gain, a token-dependent part, an adapter beside an FFN, a base weight that a start
    replaced (loftq), or parameters of the model that trained (galore, lisa): no plain LoRA equals those. With `quantize` it is one for that quantised base.
    """
    record = adaptation(model, "export_lora")
    refuse_ffns(model, record, "export_lora")
    if record.trained:
        raise ValueError(
            f"export_lora: {'+'.join(record.methods)} trained {len(record.trained)} of the model's own parameters "
            f"({record.trained[0]}, ...), which no LoRA on the original weights holds; save_adapter writes them."
        )
    for site in record.sites:
        adapter = model.get_submodule(site).adapter
        if "base" in adapter._modules and not record.quantize:
            raise ValueError(
                f"export_lora: {'+'.join(adapter.names)} replaced the base weight of {site!r}, and its factors mean nothing on the "
                "original one; save_adapter keeps both, merge makes one dense weight of them."
            )
    with gathered(model, record, "export_lora") as holds:
        if holds:
            _export(model, record, folder)


def _export(model: nn.Module, record: Adaptation, folder: str | os.PathLike[str]) -> None:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    biased = []
    for site in record.sites:
        A, B, bias = _plain_lora(model.get_submodule(site), site)
        ranks[site] = A.shape[0]
        tensors[file_key(site, "lora_A.weight")], tensors[file_key(site, "lora_B.weight")] = A, B
        if bias is not None:
            biased.append(site)
            tensors[file_key(site, "lora_B.bias")] = bias
    if biased and len(biased) != len(record.sites):
        raise ValueError("export_lora: only some layers have an adapter bias; PEFT's lora_bias is all or none.")
    _write(model, record, folder, tensors, ranks, dict(ranks), bool(biased), {})


def export_expert(model: nn.Module, folder: str | os.PathLike[str], expert: str) -> None:
    """Write one expert of a routed method (phatgoose, moa) as the plain PEFT LoRA that it is, at the layers that it has.

    A gate of its own goes beside it, as save_adapter writes it: the folder can be an expert again. Modules of modules_to_save
    and trained biases are written too. ValueError for an unknown name, or where the model has no experts.
    """
    record = adaptation(model, "export_expert")
    with gathered(model, record, "export_expert") as holds:
        if holds:
            _export_expert(model, record, folder, expert)


def _export_expert(model: nn.Module, record: Adaptation, folder: str | os.PathLike[str], expert: str) -> None:
    tensors: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for site in record.sites:
        for m in model.get_submodule(site).adapter.methods().values():
            if not m.EXPERTS or len(record.methods) > 1:
                raise ValueError(f"export_expert: the model was adapted with {'+'.join(record.methods)}, which is not experts alone.")
            own = m.experts
            if expert not in own.names:
                raise ValueError(f"export_expert: no expert is named {expert!r}; there are {', '.join(own.names)}.")
            z = own.names.index(expert)
            if not own.ranks[z]:
                continue
            (A, B), span, gate = m.stack(), own.span(z), m.gate_of(z)
            tensors[file_key(site, "lora_A.weight")], tensors[file_key(site, "lora_B.weight")] = A[span].detach(), B[:, span].detach()
            ranks[site], alphas[site] = own.ranks[z], own.scale * own.ranks[z]
            if gate is not None:
                gates[file_key(site, GATE)] = gate.detach()[None]
    _write(model, record, folder, tensors, ranks, alphas, False, gates)


def _write(
    model: nn.Module,
    record: Adaptation,
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    lora_bias: bool,
    gates: Mapping[str, Tensor],
) -> None:
    """A LoRA folder of these tensors, with the model's trained modules and biases; ranks, alphas: of each site."""
    rest = {k: v.detach() for k, v in beside_adapters(model, record).items()}
    found = per_layer("rank", ranks) | per_layer("alpha", alphas)
    plain = {"rank": found.pop("rank"), "alpha": found.pop("alpha"), "dropout": 0.0, "rslora": False, "lora_bias": lora_bias}
    config = peft_config(model, replace(record, sites=list(ranks)), get_recipe("lora").cls.PEFT, plain)
    write_folder(Path(folder), {**tensors, **rest}, config | found, {"methods": ["lora"], "options": plain}, gates)


def _plain_lora(module: Any, site: str) -> tuple[Tensor, Tensor, Tensor | None]:
    As, Bs, bias = [], [], None
    for term in static_terms(module, "export_lora"):
        if isinstance(term, LowRank):
            A, B = plain_factors(term)
            one = term.blocks == 1
            As.append(A if one else torch.block_diag(*A))
            Bs.append((B if one else torch.block_diag(*B)) * term.scale)
        elif isinstance(term, Kron):
            A, B = _kron_factors(term)
            As.append(A)
            Bs.append(B)
        elif isinstance(term, Bias):
            bias = term.b if bias is None else bias + term.b
        else:
            raise ValueError(
                f"export_lora: {site!r} has a {type(term).__name__} term, which no plain LoRA can express; "
                "save_adapter keeps it, merge folds it into the weight."
            )
    A, B = torch.cat(As).detach(), torch.cat(Bs, 1).detach()
    if A.shape[0] == 0:  # every rank was dropped, and PEFT's LoRA has at least one
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
    if A.shape[0] > min(B.shape[0], A.shape[1]):  # more ranks than the layer has say no more than the product itself
        A, B = (B @ A, _eye(B, B.shape[0])) if B.shape[0] < A.shape[1] else (_eye(A, A.shape[1]), B @ A)
    return A, B, None if bias is None else bias.detach()


def _kron_factors(term: Kron) -> tuple[Tensor, Tensor]:
    """(C o D) = (C1 o D1) (C2 o D2) with C = C1 C2 and D = D1 D2, one of each pair the identity of the shorter side."""
    (C1, C2), (D1, D2) = (
        (_eye(m, len(m)), m) if m.shape[0] <= m.shape[1] else (m, _eye(m, m.shape[1])) for m in (term.C, term.D)
    )
    return kron(C2, D2), kron(C1, D1) * term.scale


def _eye(like: Tensor, n: int) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)
