"""Whether terms fit a layer: shapes, probabilities and combinations, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.terms import (
    APPLY,
    Bias,
    Dense,
    Gain,
    Grouped,
    KhatriRao,
    Kron,
    LowRank,
    Sparse,
    Term,
    plain_delta,
)


def validate(terms: Sequence[Term], out_features: int, in_features: int) -> None:
    """Raise ValueError / TypeError, naming the term, if shapes, probabilities or combinations do not fit the layer."""
    gains = [t for t in terms if isinstance(t, Gain)]
    if len(gains) > 1:
        raise ValueError("adapted_linear: two Gain terms at one site do not compose; keep one method with a gain.")
    for term in terms:
        match term:
            case LowRank():
                _validate_low_rank(term, out_features, in_features, bool(gains))
            case Gain():
                _need_vector("Gain.g", term.g, out_features)
                _need_probability("Gain.dropout", term.dropout)
            case Bias():
                _need_vector("Bias.b", term.b, out_features)
            case Kron():
                _validate_kron(term, out_features, in_features)
            case Sparse():
                _validate_sparse(term, out_features, in_features)
            case Dense():
                if (shape := tuple(plain_delta(term).shape)) != (out_features, in_features):
                    raise ValueError(
                        f"adapted_linear: Dense.delta is {shape}; it must be [out, in] = "
                        f"({out_features}, {in_features})."
                    )
            case Grouped():
                _validate_grouped(term, out_features, in_features)
            case _:
                raise TypeError(
                    f"adapted_linear: {type(term).__name__} is no term; terms are LowRank, Gain, Bias, Kron, Sparse, Dense and "
                    "Grouped (fastpeft.terms)."
                )


def _need_vector(name: str, v: Tensor, out_features: int) -> None:
    if tuple(v.shape) != (out_features,):
        raise ValueError(f"adapted_linear: {name} is {tuple(v.shape)}; it must be [out] = ({out_features},).")


def _need_probability(name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"adapted_linear: {name} is {p}; it must be at least 0 and less than 1.")


def _validate_kron(t: Kron, out_features: int, in_features: int) -> None:
    fits = t.C.dim() == t.D.dim() == 2
    if not fits or (t.C.shape[0] * t.D.shape[0], t.C.shape[1] * t.D.shape[1]) != (out_features, in_features):
        raise ValueError(
            f"adapted_linear: C is {tuple(t.C.shape)} and D is {tuple(t.D.shape)}; needed are C [a, c] and D [b, d] with "
            f"a * b = out = {out_features} and c * d = in = {in_features}."
        )


def _validate_sparse(t: Sparse, out_features: int, in_features: int) -> None:
    if t.apply not in APPLY and not (t.apply == "overlay" and t.overlay is not None):
        raise ValueError(f"adapted_linear: Sparse.apply={t.apply!r}; it must be one of {', '.join(APPLY)}.")
    if t.index.dtype is not torch.int32 or tuple(t.index.shape) != (2, t.values.numel()) or t.values.dim() != 1:
        raise ValueError(
            f"adapted_linear: Sparse.index is {t.index.dtype} {tuple(t.index.shape)} and values {tuple(t.values.shape)}; needed "
            "are int32 [2, nnz] and [nnz]."
        )
    if t.values.numel() and not torch.compiler.is_compiling():
        if not in_order(t.index, out_features, in_features):
            raise ValueError(
                f"adapted_linear: Sparse.index must lie inside [{out_features}, {in_features}], in row-major order and "
                "without repetition; sort it, and add up the values of repeated entries."
            )


def in_order(index: Tensor, out_features: int, in_features: int) -> bool:
    """Whether the entries [2, nnz] of a Sparse term lie inside of [out, in], in row-major order and without repetition. Waits for the device."""
    rows, cols = index.long()
    flat = rows * in_features + cols
    inside = (rows >= 0) & (rows < out_features) & (cols >= 0) & (cols < in_features)
    return bool(inside.all() & (flat[1:] > flat[:-1]).all())


def _validate_grouped(t: Grouped, out_features: int, in_features: int) -> None:
    if not t.ranks or any(not isinstance(r, int) or r < 0 for r in t.ranks):
        raise ValueError(f"adapted_linear: Grouped.ranks is {t.ranks}; needed is one int of at least 0 for each expert.")
    total = sum(t.ranks)
    if tuple(t.A.shape) != (total, in_features) or tuple(t.B.shape) != (out_features, total):
        raise ValueError(
            f"adapted_linear: A is {tuple(t.A.shape)} and B is {tuple(t.B.shape)} of experts with ranks {t.ranks}; needed are "
            f"A [R, in] and B [out, R], here {(total, in_features)} and {(out_features, total)}."
        )
    if t.rows is not None and (t.rows.dim() != 2 or t.rows.shape[1] != in_features):
        raise ValueError(f"adapted_linear: rows is {tuple(t.rows.shape)}; it must be [P, in] with in={in_features}.")


def _validate_low_rank(t: LowRank, out_features: int, in_features: int, has_gain: bool) -> None:
    _need_probability("LowRank.dropout", t.dropout)
    if isinstance(t.A, KhatriRao) or isinstance(t.B, KhatriRao):
        _validate_khatri_rao(t, out_features, in_features)
        return
    if t.blocks == 1:
        rank_out = t.B.shape[-1] if t.mid is not None else t.A.shape[0]
        want_a, want_b = (t.A.shape[0], in_features), (out_features, rank_out)
        form = "A [rank, in] and B [out, rank]"
    else:
        n = t.blocks
        if t.mid is not None or t.post is not None or t.rows is not None:
            raise ValueError("adapted_linear: a LowRank term with blocks takes no mid, post or rows; use two terms.")
        if n < 1 or in_features % n or out_features % n:
            raise ValueError(
                f"adapted_linear: blocks={n} does not divide in={in_features} and out={out_features}; choose a divisor."
            )
        r = t.A.shape[1] if t.A.dim() == 3 else -1
        want_a, want_b = (n, r, in_features // n), (n, out_features // n, r)
        form = "A [n, r, in/n] and B [n, out/n, r]"
    if tuple(t.A.shape) != want_a or tuple(t.B.shape) != want_b:
        raise ValueError(
            f"adapted_linear: A is {tuple(t.A.shape)} and B is {tuple(t.B.shape)} for a layer with in={in_features}, "
            f"out={out_features}; needed are {form}, here {want_a} and {want_b}. Were A and B swapped?"
        )
    if t.rows is not None and (t.rows.dim() != 2 or t.rows.shape[1] != in_features or t.mid is None):
        raise ValueError(
            f"adapted_linear: rows is {tuple(t.rows.shape)}; it must be [P, in] with in={in_features}, and only a term "
            "with `mid` can read what the rows produce."
        )
    if t.post is not None and has_gain:
        raise ValueError("adapted_linear: a LowRank term with `post` cannot stand under a Gain; drop one of the two.")


def _validate_khatri_rao(t: LowRank, out_features: int, in_features: int) -> None:
    if not (isinstance(t.A, KhatriRao) and isinstance(t.B, KhatriRao)):
        raise ValueError("adapted_linear: one of A and B is a KhatriRao and the other a tensor; give both alike.")
    if t.mid or t.post or t.rows is not None or t.dropout or t.blocks != 1:
        raise ValueError(
            "adapted_linear: a LowRank term of KhatriRao factors takes no mid, post, rows, dropout or blocks; give A.rows() "
            "and B.columns() instead."
        )
    r = t.A.a.shape[0]
    down, up = [tuple(f.shape) for f in t.A], [tuple(f.shape) for f in t.B]
    if down != 2 * [(r, in_features)] or up != 2 * [(out_features, r)]:
        raise ValueError(
            f"adapted_linear: the factors of A are {down} and those of B {up}; needed are [r, in] and [out, r] with "
            f"in={in_features}, out={out_features}."
        )
