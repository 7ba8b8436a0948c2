"""What the call of a routed model says: its tokens, which of them are the prompt, and the domain of each sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpeft.routing import Routing

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def tokens_of(named: Mapping[str, Any]) -> Tensor | None:
    """What the model reads: input_ids, embeddings, or its first tensor."""
    known = (named.get("input_ids"), named.get("inputs_embeds"), *named.values())
    return next((t for t in known if isinstance(t, Tensor)), None)


def domain_of(routing: Routing, domain: Any) -> Tensor | None:
    """Labels [batch] as numbers; ValueError for one that there is not, or that is disabled."""
    if domain is None:
        return None
    if not isinstance(domain, Tensor):
        domain = torch.tensor([routing.number(d, "moa: domain") for d in domain])
    if domain.dim() != 1 or domain.is_floating_point() or domain.dtype is torch.bool:
        raise ValueError(f"moa: domain is {domain.dtype} {tuple(domain.shape)}; needed are names, or integers [batch].")
    if not torch.compiler.is_compiling():
        allowed = routing.allowed()
        closed = [z for z in domain.unique().tolist() if not 0 <= z < len(allowed) or not allowed[z]]
        if closed:
            raise ValueError(f"moa: domain holds {closed}, of which there is no expert, or a disabled one; there are {', '.join(map(repr, routing.names))}, numbered from 0.")
    return domain.long()


def prompt_of(routing: Routing, named: Mapping[str, Any], tokens: Tensor | None, prompt: Any) -> Tensor | None:
    """True at the prompt's tokens [batch, tokens], or None for all. ValueError where there is none, or a row holds several sequences."""
    attention, labels = named.get("attention_mask"), named.get("labels")
    packed = [n for n in _PACKED if named.get(n) is not None]
    if packed:
        raise ValueError(f"moa: {packed[0]} packs several sequences into a row, and an expert is chosen per row; pad them instead.")
    if attention is not None and (not isinstance(attention, Tensor) or attention.dim() != 2):
        what = f"{tuple(attention.shape)}" if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(f"moa: attention_mask is {what}; needed is [batch, tokens], which says where the prompt is.")
    mask = None if attention is None else attention != 0
    _refuse_packed(named.get("position_ids"), mask)
    if prompt is not None:
        if not isinstance(prompt, Tensor) or prompt.dim() != 2:
            what = f"{tuple(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
            raise ValueError(f"moa: prompt_mask is {what}; it must be a tensor [batch, tokens], not zero at the prompt's tokens.")
        own: Tensor | None = prompt != 0
    elif routing.prompt == "labels" and isinstance(labels, Tensor) and not labels.is_floating_point() and _per_token(labels, tokens):
        own = labels == -100
    else:
        own = None
    if own is not None:
        mask = own if mask is None else own & mask.to(own.device)
    if mask is not None and not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(
            f"moa: row {row} has no prompt token to route by: none is attended to with labels == -100. Mask the prompt in labels, give "
            "prompt_mask=[batch, tokens], or adapt with prompt='all'."
        )
    return mask


def _per_token(labels: Tensor, tokens: Tensor | None) -> bool:
    return labels.dim() == 2 and tokens is not None and labels.shape == tokens.shape[:2]


def _refuse_packed(positions: Any, mask: Tensor | None) -> None:
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.is_floating_point() or torch.compiler.is_compiling():
        return
    back = positions[:, 1:] <= positions[:, :-1]
    if mask is not None and mask.shape[-1] == positions.shape[-1]:
        back = back & mask[:, 1:] & mask[:, :-1]
    if bool(back.any()):
        raise ValueError("moa: position_ids start again within a row, so it holds several sequences; an expert is chosen per row. Pad them instead.")
