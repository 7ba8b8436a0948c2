"""The vocabulary: what a method may add to a frozen linear layer, as data.

    y = gain * ( x W^T + sum of terms(x) ) + bias + sum of Bias          x [tokens, in]   W [out, in]   y [tokens, out]

A method returns a list of these, made anew in each forward (slots, not frozen: a frozen one takes three times as long to
make), and nobody changes one; kernels, merge, export and the test oracles read them. Nobody writes a backward twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Mid = Callable[[Tensor, Tensor | None, Tensor], Tensor]
Post = Callable[[Tensor], Tensor]


@dataclass(eq=False, slots=True)
class LowRank:
    """scale * post( mid(drop(x) A^T, x rows^T, x) B^T )

    A [R, in] or [n, r, in/n] with `blocks=n` (block-diagonal, R = n*r).   B [out, R'] or [n, out/n, r].
    rows [P, in]: router or gate rows; they read x *before* dropout.
    mid(u, p, x) -> [..., R']: any torch function of the token; it sees x's leading dimensions; p is None without rows.
        Constants belong in A or B instead, so that merge works.
    post: pointwise on [tokens, out] with post(0) = 0, recomputed in backward.
    dropout: probability in [0, 1), applied to what A reads.
    scale multiplies the whole term.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    mid: Mid | None = None
    rows: Tensor | None = None
    post: Post | None = None
    dropout: float = 0.0
    blocks: int = 1


@dataclass(eq=False, slots=True)
class Gain:
    """x W^T + (g - 1) * (drop(x) W^T) + g * sum of terms;   g [out].

    Without dropout that is g times everything but the bias. With dropout it costs a second base product: the law of
    DoRA in PEFT and in its authors' code. At most one per site.
    over: g is divided by the norm of each row of W + over, which is held constant in backward; 1 where that norm is zero.
    (Said here, and not by the method, so that the norm can be taken inside the fused call.)
    """

    g: Tensor
    dropout: float = 0.0
    over: LowRank | None = None


@dataclass(eq=False, slots=True)
class Bias:
    """b [out], added after the gain."""

    b: Tensor


Term = LowRank | Gain | Bias


def delta_weight(term: LowRank, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense [out, in] matrix that a LowRank term adds, in `dtype`.

    Raises ValueError for a term with `mid` or `post`: what depends on the token is no matrix.
    """
    refuse_tokenwise([term], "delta_weight")
    A, B = term.A.to(dtype), term.B.to(dtype)
    if term.blocks == 1:
        return term.scale * (B @ A)
    return torch.block_diag(*(term.scale * (b @ a) for a, b in zip(A, B, strict=True)))


def refuse_tokenwise(terms: Sequence[Term], who: str) -> None:
    """Raise ValueError if some term depends on the token and therefore has no single weight."""
    for term in terms:
        if isinstance(term, LowRank) and (term.mid is not None or term.post is not None):
            part = "mid" if term.mid is not None else "post"
            raise ValueError(
                f"{who}: the adapter has a token-dependent part (`{part}`), so no single weight stands for it; "
                "keep it unmerged and use the adapted model as it is."
            )


def is_linear(terms: Sequence[Term]) -> bool:
    """True if a single weight and bias stand for the terms (so they can be merged)."""
    return all(not isinstance(t, LowRank) or (t.mid is None and t.post is None) for t in terms)


def effective_weight(weight: Tensor, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in] that base and terms stand for without dropout, in `dtype`.

    Merge, export and the test oracles use it. Raises ValueError where no single weight exists.
    """
    refuse_tokenwise(terms, "effective_weight")
    total = weight.to(dtype)
    for term in terms:
        if isinstance(term, LowRank):
            total = total + delta_weight(term, dtype)
    for term in terms:
        if isinstance(term, Gain):
            g = term.g.to(dtype)
            if term.over is not None:
                norm = (weight.to(dtype) + delta_weight(term.over, dtype)).norm(dim=1).detach()
                g = torch.where(norm == 0, 1.0, g / torch.where(norm == 0, 1.0, norm))
            total = g[:, None] * total
    return total


def effective_bias(bias: Tensor | None, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Base bias plus every Bias term, in `dtype`; None if there is neither."""
    total = None if bias is None else bias.to(dtype)
    for term in terms:
        if isinstance(term, Bias):
            total = term.b.to(dtype) if total is None else total + term.b.to(dtype)
    return total


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
            case _:
                raise TypeError(
                    f"adapted_linear: {type(term).__name__} is no term; terms are LowRank, Gain and Bias (fastpeft.terms)."
                )


def _need_vector(name: str, v: Tensor, out_features: int) -> None:
    if tuple(v.shape) != (out_features,):
        raise ValueError(f"adapted_linear: {name} is {tuple(v.shape)}; it must be [out] = ({out_features},).")


def _need_probability(name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"adapted_linear: {name} is {p}; it must be at least 0 and less than 1.")


def _validate_low_rank(t: LowRank, out_features: int, in_features: int, has_gain: bool) -> None:
    _need_probability("LowRank.dropout", t.dropout)
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
