"""Which family computes a term that is differentiated whole, and with which tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import composed, dense, khatri_rao, kron, sparse, wide
from fastpeft.ops.parts import Part
from fastpeft.terms import Composed, Dense, KhatriRao, Kron, LowRank, Sparse, Term, plain_delta


class Inner(NamedTuple):
    """A LowRank or Kron term that is computed in a wider dtype than y's; seed: of its dropout."""

    term: Term
    dtype: torch.dtype
    seed: Tensor | None


def part_of(
    term: Term | Inner, base: Any, dtype: torch.dtype, *, on_base: bool, triton: bool
) -> tuple[Part, tuple[Tensor, ...]]:
    """The part of a Kron, Sparse, Dense or LowRank term of KhatriRao factors, and its tensors.

    dtype: y's.   on_base: whether the base weight may stand for the term.   triton: whether kernels run where there are some.
    """
    exact = base.dtype in (torch.float32, torch.float64) and dtype is base.dtype
    match term:
        case Inner():
            return _inner(term, base, triton)
        case Kron():
            return Part(_kron(triton), 2, term.scale), (term.C, term.D)
        case Sparse():
            return Part(_sparse(term, base, on_base, triton), 2, 1.0), (term.values, term.index)
        case Dense():
            if isinstance(term.delta, Composed) and not torch.compiler.is_compiling():
                family = composed.OnBase if on_base and exact else composed.Own
                return Part(family(term.delta.compose), len(term.delta.tensors), term.scale), term.delta.tensors
            # a compiler decides itself what it keeps and what it computes again
            delta = plain_delta(term)
            tensors = (delta, delta.detach()) if torch.compiler.is_compiling() else (delta,)
            return Part(_dense(delta, on_base and exact), len(tensors), term.scale), tensors
        case LowRank():
            ops = _khatri_rao(term, base, on_base and exact, triton)
            return Part(ops, 4, term.scale), (*term.A, *term.B)  # type: ignore[misc]
    raise TypeError(f"{type(term).__name__} is no term that is differentiated whole")


def _inner(wanted: Inner, base: Any, triton: bool) -> tuple[Part, tuple[Tensor, ...]]:
    term, dtype, seed = wanted
    if isinstance(term, LowRank) and not isinstance(term.A, KhatriRao):
        if seed is not None and torch.compiler.is_compiling():
            seed = seed.clone()  # Dynamo takes no tensor twice
        tensors = (term.A, term.B) if term.dropout == 0.0 else (term.A, term.B, seed)
        return Part(wide.LowRank(dtype, term.dropout), len(tensors), term.scale, True), tensors  # type: ignore[return-value]
    if not isinstance(term, (Kron, LowRank)):
        raise ValueError(f"adapted_linear: {type(term).__name__} terms are not computed in another dtype than y's.")
    part, own = part_of(term, base, dtype, on_base=False, triton=triton)
    return part._replace(ops=wide.Wide(part.ops, dtype), onto_y=True), own


def _kron(triton: bool) -> Any:
    if triton:
        from fastpeft.ops import kron_triton

        return kron_triton
    return kron


def _sparse(term: Sparse, base: Any, on_base: bool, triton: bool) -> Any:
    code: Any = sparse
    if triton:
        from fastpeft.ops import sparse_triton as code
    if term.apply == "overlay":
        if not on_base:
            raise ValueError("adapted_linear: an overlay cannot stand under a gain with dropout; use apply='copy'.")
        if base.W is None:
            raise ValueError("adapted_linear: an overlay stays in the weight itself, and this one is quantised; use apply='copy'.")
        if torch.compiler.is_compiling():
            raise RuntimeError("adapted_linear: an overlay writes W in place, which compiled code cannot; use apply='copy'.")
        return sparse.Overlaid(code, term.overlay)
    if term.apply == "exact" or not on_base:
        return sparse.Exact(code, (base.out_features, base.in_features))
    # traced code has no order in which others could read W: the copy, which has the same bits; so it has where W is stored in
    # another form, whose dense copy is made for the product anyway
    window = term.apply == "window" and base.W is not None and not torch.compiler.is_compiling()
    kind = sparse.Window if window else sparse.Copy
    return kind(code)


def _dense(delta: Tensor, on_base: bool) -> Any:
    if not any(delta.stride()) and delta.numel() > 1:
        return dense.Collect
    return dense.OnBase if on_base else dense.Own


def _khatri_rao(term: LowRank, base: Any, on_base: bool, triton: bool) -> Any:
    rank = term.A.a.shape[0]  # type: ignore[union-attr]
    family: Any = khatri_rao
    if triton:
        from fastpeft.ops import khatri_rao_triton as family
    if khatri_rao.materialises(base.out_features, base.in_features, rank, on_base) or rank > family.RANKS:
        return khatri_rao.OnBase if on_base else khatri_rao.Own
    return family
