"""The vocabulary: what a method may add to a frozen linear layer, as data.

    y = gain * ( x W^T + sum of terms(x) ) + bias + sum of Bias          x [tokens, in]   W [out, in]   y [tokens, out]

A method returns a list of these, made anew in each forward (slots, not frozen: a frozen one takes three times as long to
make), and nobody changes one; kernels, merge, export and the test oracles read them. Nobody writes a backward twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Mid = Callable[[Tensor, Tensor | None, Tensor], Tensor]
Post = Callable[[Tensor], Tensor]
Choose = Callable[[Tensor | None, Tensor], tuple[Tensor, Tensor | None]]


class KhatriRao(NamedTuple):
    """The factor that two of one shape make: every row of `a` times every row of `b` as A, every column as B.

    As A, a and b [r, in] stand for [r*r, in], whose row i*r + j is a[i] * b[j]; as B, a and b [out, r] for [out, r*r].
    B A is then (Ba Aa) * (Bb Ab), elementwise.
    """

    a: Tensor
    b: Tensor

    def rows(self) -> Tensor:
        return (self.a[:, None] * self.b).flatten(0, 1)

    def columns(self) -> Tensor:
        return (self.a[:, :, None] * self.b[:, None]).flatten(1)


@dataclass(eq=False, slots=True)
class LowRank:
    """scale * post( mid(drop(x) A^T, x rows^T, x) B^T )

    A [R, in] or [n, r, in/n] with `blocks=n` (block-diagonal, R = n*r).   B [out, R'] or [n, out/n, r].
    A and B may both be a KhatriRao; the term is then plain (no mid, rows, post, dropout or blocks), and nothing of rank r*r
    is kept for backward.
    rows [P, in]: router or gate rows; they read x *before* dropout.
    mid(u, p, x) -> [..., R']: any torch function of the token; it sees x's leading dimensions; p is None without rows.
        Constants belong in A or B instead, so that merge works.
    post: pointwise on [tokens, out] with post(0) = 0, recomputed in backward.
    dropout: probability in [0, 1), applied to what A reads.
    scale multiplies the whole term.
    """

    A: Tensor | KhatriRao
    B: Tensor | KhatriRao
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


@dataclass(eq=False, slots=True)
class Kron:
    """scale * x (C o D)^T, o the Kronecker product: C [a, c], D [b, d], out = a*b, in = c*d.

    Entry (i*b + k, j*d + l) of the update is scale * C[i, j] * D[k, l]. It is never formed: x is read as [tokens, c, d].
    """

    C: Tensor
    D: Tensor
    scale: float = 1.0


@dataclass(eq=False, slots=True)
class Sparse:
    """values[k] at row index[0, k] and column index[1, k] of the update, zero elsewhere.

    values [nnz], fp32 on a 16-bit base.   index: int32 [2, nnz], in row-major order without repetition.
    apply: how the base product gets it. "copy": a copy of W with the entries W + value, in one workspace, made anew in
        forward and in backward. "window": W's own entries are changed while the product runs and put back bit for bit, which
        nobody else may read meanwhile. "overlay" (with `overlay`, a fastpeft.overlay.Overlay): they stay changed. "exact": a sparse product of its own beside the base's, so that no value is rounded to
        W's dtype.
    """

    values: Tensor
    index: Tensor
    apply: str = "copy"
    overlay: Any = None


class Composed(NamedTuple):
    """The update [out, in] that compose(*tensors) makes with ordinary PyTorch, made again wherever it is used.

    Nothing of it is kept for backward; tensors get the gradients that autograd gives through compose.
    """

    compose: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def whole(self) -> Tensor:
        return self.compose(*self.tensors)


@dataclass(eq=False, slots=True)
class Dense:
    """scale * x delta^T, delta [out, in]: the materialised update, where no other term says it.

    A delta of no storage (all strides zero) adds nothing and collects dW as its gradient.
    """

    delta: Tensor | Composed
    scale: float = 1.0


@dataclass(eq=False, slots=True)
class Grouped:
    """scale * sum_j w_j (x A_e^T) B_e^T, e = index[.., j] and w = weight[.., j]: each token uses k of the experts.

    A [R, in], B [out, R]: the experts one after another along the rank, `ranks` of each; R = sum(ranks). Rank 0 adds nothing.
    choose(p, x) -> (index int64 [.., k], weight [.., k], or None for 1): any torch function of the token; it sees x's leading
        dimensions, and gradients go through weight. p = x rows^T in y's dtype; None without rows.
    rows [P, in]: router or gate rows.
    Tokens are grouped by expert and only experts that they use are computed (fastpeft.ops.grouped). Code that torch.compile
    traces takes the equal LowRank term of all R ranks instead, for grouping depends on the data (fastpeft.grouped.as_low_rank).
    index: 0 to len(ranks) - 1, ValueError otherwise; on a GPU, which nobody waits for, an index outside adds nothing.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    choose: Choose
    scale: float = 1.0
    rows: Tensor | None = None


def collector(like: Tensor, shape: tuple[int, int], take: Callable[[Tensor], None]) -> Tensor:
    """A delta of no storage, in like's dtype and on its device, whose gradient [out, in] goes to `take`."""
    leaf = like.detach().new_zeros(()).expand(shape).requires_grad_()
    leaf.register_post_accumulate_grad_hook(functools.partial(_hand_over, take))
    return leaf


def _hand_over(take: Callable[[Tensor], None], leaf: Tensor) -> None:
    grad, leaf.grad = leaf.grad, None
    take(grad)  # type: ignore[arg-type]


Term = LowRank | Gain | Bias | Kron | Sparse | Dense | Grouped
APPLY = ("copy", "window", "exact")


def delta_weight(term: LowRank | Kron | Sparse | Dense | Grouped, dtype: torch.dtype = torch.float32, *, shape: Any = None) -> Tensor:
    """The dense [out, in] matrix that a term adds, in `dtype`. shape: (out, in), which a Sparse term does not know itself.

    Raises ValueError for a term with `mid`, `post` or `choose`: what depends on the token is no matrix.
    """
    refuse_tokenwise([term], "delta_weight")
    match term:
        case Kron():
            return term.scale * kron(term.C.to(dtype), term.D.to(dtype))
        case Dense():
            return term.scale * plain_delta(term).to(dtype)
        case Sparse():
            rows, cols = term.index.long()
            return term.values.new_zeros(shape, dtype=dtype).index_put((rows, cols), term.values.to(dtype))
    A, B = (t.to(dtype) for t in plain_factors(term))
    if term.blocks == 1:
        return term.scale * (B @ A)
    return torch.block_diag(*(term.scale * (b @ a) for a, b in zip(A, B, strict=True)))


def kron(C: Tensor, D: Tensor) -> Tensor:
    """The Kronecker product; C [a, c], D [b, d] -> [a*b, c*d]. (torch.kron 2.13 raises for some transposed matrices.)"""
    return (C[:, None, :, None] * D[None, :, None, :]).reshape(C.shape[0] * D.shape[0], C.shape[1] * D.shape[1])


def plain_factors(term: LowRank) -> tuple[Tensor, Tensor]:
    """A and B as tensors."""
    A = term.A.rows() if isinstance(term.A, KhatriRao) else term.A
    return A, term.B.columns() if isinstance(term.B, KhatriRao) else term.B


def plain_delta(term: Dense) -> Tensor:
    """delta as a tensor."""
    return term.delta.whole() if isinstance(term.delta, Composed) else term.delta


def refuse_tokenwise(terms: Sequence[Term], who: str) -> None:
    """Raise ValueError if some term depends on the token and therefore has no single weight."""
    for term in terms:
        part = _tokenwise(term)
        if part:
            raise ValueError(
                f"{who}: the adapter has a token-dependent part (`{part}`), so no single weight stands for it; "
                "keep it unmerged and use the adapted model as it is."
            )


def is_linear(terms: Sequence[Term]) -> bool:
    """True if a single weight and bias stand for the terms (so they can be merged)."""
    return not any(_tokenwise(t) for t in terms)


def _tokenwise(term: Term) -> str:
    """The field that makes a term depend on the token; empty where none does."""
    if isinstance(term, Grouped):
        return "choose"
    if isinstance(term, LowRank):
        return "mid" if term.mid is not None else "post" if term.post is not None else ""
    return ""


def effective_weight(weight: Tensor, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in] that base and terms stand for without dropout, in `dtype`.

    Merge, export and the test oracles use it. Raises ValueError where no single weight exists.
    """
    refuse_tokenwise(terms, "effective_weight")
    total = weight.to(dtype)
    for term in terms:
        if not isinstance(term, (Gain, Bias)):
            total = total + delta_weight(term, dtype, shape=weight.shape)
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
