"""adapted_linear: the one function that reads terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft import grouped
from fastpeft.base import Plain
from fastpeft.ops import lowrank, small
from fastpeft.ops.dropout import draw_seed
from fastpeft.ops.family import resolve
from fastpeft.ops.parts import Part
from fastpeft.ops.seam import Down, One, OnePlan, Up, Whole, after_up
from fastpeft.ops.steps import Plan, Read, Write
from fastpeft.parts import Inner, part_of
from fastpeft.term_checks import validate
from fastpeft.terms import Bias, Gain, Grouped, KhatriRao, LowRank, Term


def adapted_linear(
    x: Tensor,
    weight_or_base: Tensor | Any,
    bias: Tensor | None,
    terms: Sequence[Term],
    *,
    seed: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = gain * (x W^T + sum of terms(x)) + bias + sum of Bias.

    x: [..., in], one to any number of dimensions, any strides; an empty batch gives an empty y.
    weight_or_base: W [out, in], or a base of fastpeft.base.   bias: [out] or None.
    terms: LowRank, Gain, Bias, Kron, Sparse, Dense, Grouped of fastpeft.terms. Terms with the same A object and dropout read x
        once.
    seed: 0-dim int64 tensor for every dropout of this call; None draws one from torch's generator on x's device.
    impl: None picks by device; "torch" is the reference; "triton" runs Triton or raises. FASTPEFT_IMPL sets the default.
    Returns y [..., out] in the autocast dtype if autocast is on, else in the base's dtype. Factors may have a wider dtype
    than x; they are cast inside, and their gradients are summed in their own dtype.
    Raises ValueError / TypeError on shapes, dtypes, devices or combinations that do not fit, RuntimeError for an `impl` that
    cannot run here.
    """
    base = Plain(weight_or_base) if isinstance(weight_or_base, Tensor) else weight_or_base
    check_input(x, base)
    validate(terms, base.out_features, base.in_features)
    return run_terms(x, base, bias, terms, seed=seed, impl=impl)


def run_terms(
    x: Tensor,
    base: Any,
    bias: Tensor | None,
    terms: Sequence[Term],
    *,
    seed: Tensor | None = None,
    impl: str | None = None,
    inner: torch.dtype | None = None,
) -> Tensor:
    """adapted_linear without the checks of terms and x, for callers whose terms were checked when they were built.

    inner: a dtype wider than y's in which plain LowRank terms and, without a gain, Kron terms and those of Khatri-Rao factors are
    computed, and each sum rounded once; autocast must be off.
    """
    wholes: list[Any] = []
    if len(terms) == 1 and type(terms[0]) is LowRank and type(terms[0].A) is not KhatriRao:
        lows, gain = [terms[0]], None
    else:
        lows, gain, bias, wholes = _sorted(terms, bias)
    if seed is None and ((gain is not None and gain.dropout > 0.0) or any([t.dropout > 0.0 for t in lows])):
        seed = draw_seed(x.device)
    if inner is not None:
        gain, wholes = _widened(base, lows, gain, wholes, inner, seed)
        lows = []
    run = _run_for(base, lows, gain, wholes)
    device, dtype = x.device.type, base.dtype
    if not torch.is_autocast_enabled(device):
        return run(x, base, bias, lows, gain, wholes, seed, dtype, resolve(impl, device, x.dtype, dtype), None)
    if torch.float64 not in (x.dtype, dtype):
        dtype = torch.get_autocast_dtype(device)
    middle = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        ops = resolve(impl, device, x.dtype, dtype)
        return run(x, base, bias, lows, gain, wholes, seed, dtype, ops, (device, middle))


def _widened(
    base: Any, lows: list[LowRank], gain: Gain | None, wholes: list[Any], inner: torch.dtype, seed: Tensor | None
) -> tuple[Gain | None, list[Any]]:
    """The gain of the base product alone, and the terms in `inner`, which are added after it: it is folded into their B."""
    for t in lows:
        if t.mid is not None or t.post is not None or t.rows is not None or t.blocks != 1:
            raise ValueError("adapted_linear: a term with mid, post, rows or blocks is not computed in another dtype than y's.")
    if gain is not None:
        if wholes:
            raise ValueError("adapted_linear: beside a gain only LowRank terms are computed in another dtype than y's.")
        gain = Gain(_gain(base, gain), gain.dropout)  # type: ignore[arg-type]
        lows = [LowRank(t.A, gain.g[:, None] * t.B, t.scale, dropout=t.dropout) for t in lows]
    return gain, [Inner(t, inner, seed) for t in (*lows, *wholes)]


def _gain(base: Any, gain: Gain | None) -> Tensor | None:
    """The factor [out] itself."""
    if gain is None or gain.over is None:
        return None if gain is None else gain.g
    low = gain.over
    return base.row_gain(gain.g, low.A, low.B, low.scale, constant=True)


def _sorted(
    terms: Sequence[Term], bias: Tensor | None
) -> tuple[list[LowRank], Gain | None, Tensor | None, list[Term]]:
    """LowRank terms, fused where they can be, the gain, the bias with every Bias, and the terms differentiated whole.

    Traced code has no order of the tokens by expert, which depends on the data: a Grouped term is a LowRank there.
    """
    lows: list[LowRank] = []
    wholes: list[Term] = []
    gain = None
    for t in terms:
        if type(t) is Grouped and torch.compiler.is_compiling():
            t = grouped.as_low_rank(t)
        if type(t) is LowRank:
            if type(t.A) is KhatriRao or type(t.B) is KhatriRao:
                wholes.append(t)
            else:
                lows.append(t)
        elif type(t) is Gain:
            gain = t
        elif type(t) is Bias:
            bias = t.b if bias is None else bias + t.b
        else:
            wholes.append(t)
    return (_grouped(lows) if len(lows) > 1 else lows), gain, bias, wholes


def _run_for(base: Any, lows: list[LowRank], gain: Gain | None, wholes: list[Any]) -> Callable[..., Tensor]:
    """The Function, or Functions, that these terms need."""
    for t in lows:
        if t.mid is not None or t.post is not None or t.rows is not None:
            return _with_middles
    if len(lows) == 1 and not wholes and (gain is None or gain.dropout == 0.0) and not base.trains:
        return _one
    return _whole if len({id(t.A) for t in lows}) == len(lows) else _with_middles


def _parts(
    base: Any, wholes: list[Any], gain: Gain | None, dtype: torch.dtype, ops: Any, grad: bool, x: Tensor, autocast
) -> tuple[tuple[Part, ...], list[Tensor], bool]:
    """Each whole term's part, their tensors, and whether one of those trains. A Grouped term's choice is made here."""
    if not wholes:
        return (), [], False
    # a dropped base product would drop what was added to W too
    on_base = gain is None or gain.dropout == 0.0
    found = [
        grouped.part_of(t, x, dtype, ops, autocast)
        if type(t) is Grouped
        else part_of(t, base, dtype, on_base=on_base, triton=ops is not lowrank)
        for t in wholes
    ]
    tensors = [t for _, own in found for t in own]
    return tuple([p for p, _ in found]), tensors, grad and any([t.requires_grad for t in tensors])


def _one(x, base, bias, lows, gain, wholes, seed, dtype, ops, autocast) -> Tensor:
    """One term, no middle."""
    (t,) = lows
    A, B = t.A, t.B
    if t.dropout == 0.0 and t.blocks == 1 and ops is lowrank and dtype is torch.float32:
        over = gain is not None and gain.over is not None
        m = None if gain is None else gain.g
        if (not over or gain.over is t) and small.takes(x, base.W, A, B, bias, m):
            return small.Small.apply(x, A, B, bias, m, base.W, t.scale, over)
    g = _gain(base, gain)
    if torch.is_grad_enabled():
        keep = (A.requires_grad, B.requires_grad, g is not None and g.requires_grad)
    else:
        keep = (False, False, False)
    plan = OnePlan(ops, base, dtype, t.dropout, t.blocks, t.scale, *keep)
    return One.apply(plan, x, A, B, bias, g, seed)


def _whole(x, base, bias, lows, gain, wholes, seed, dtype, ops, autocast) -> Tensor:
    """One Function for terms without a middle."""
    tensors: list[Tensor | None] = []
    keep: list[bool] = []
    weight = base.W if base.trains else None
    grad = torch.is_grad_enabled()
    parts, own, trains = _parts(base, wholes, gain, dtype, ops, grad, x, autocast)
    keep_x = grad and (weight is not None or trains)
    for t in lows:
        tensors += (t.A, t.B)
        keep.append(grad and t.B.requires_grad)
        keep_x = keep_x or (grad and t.A.requires_grad)
    g, gain_p = _gain(base, gain), 0.0 if gain is None else gain.dropout
    keep.append(grad and g is not None and g.requires_grad)
    reads = tuple([Read(t.dropout, t.blocks, False) for t in lows])
    writes = tuple([Write(t.scale, t.blocks) for t in lows])
    plan = Plan(ops, base, dtype, gain_p, reads, writes, keep_x, tuple(keep), parts)
    return Whole.apply(plan, x, weight, bias, g, seed, *tensors, *own, None)


def _with_middles(
    x, base, bias, lows, gain, wholes, seed, dtype, ops, autocast: tuple[str, torch.dtype] | None
) -> Tensor:
    """Down, the middles, Up."""
    reads, slots, tensors = _reads(lows)
    weight = base.W if base.trains else None
    grad = torch.is_grad_enabled()
    parts, own, trains = _parts(base, wholes, gain, dtype, ops, grad, x, autocast)
    keep_x = grad and (weight is not None or trains or any(t is not None and t.requires_grad for t in tensors))
    g, gain_p = _gain(base, gain), 0.0 if gain is None else gain.dropout
    writes = tuple(Write(t.scale, t.blocks) for t in lows if t.post is None)
    plan = Plan(ops, base, dtype, gain_p, reads, writes, keep_x, (), parts)
    carry, *us = Down.apply(plan, x, weight, None if g is None else g.detach(), seed, *tensors, *own, None)
    n = len(reads)
    probes: dict[int, Tensor] = {}
    for k, read in enumerate(reads):
        if read.rows:
            probes[k] = us[n + len(probes)]

    pairs: list[Tensor] = []
    extra = None
    for t, k in zip(lows, slots, strict=True):
        v = us[k] if t.mid is None else _middle(t, us[k], probes.get(k), x, dtype, autocast)
        if t.post is None:
            pairs += (v, t.B)
        else:
            added = after_up(v, t.B, t.scale, t.post)
            extra = added if extra is None else extra + added
    keep = (*(grad and B.requires_grad for B in pairs[1::2]), grad and g is not None and g.requires_grad)
    detached = [t.detach() for t in own]
    return Up.apply(plan._replace(keep=keep), x.detach(), carry, bias, g, extra, seed, *pairs, *detached, None)


def _reads(lows: list[LowRank]) -> tuple[tuple[Read, ...], list[int], list[Tensor | None]]:
    """Distinct (A, rows, dropout), the slot of each term among them, and the flat tensors A_1, rows_1, A_2, ..."""
    reads: list[Read] = []
    tensors: list[Tensor | None] = []
    slots: list[int] = []
    for t in lows:
        for k, read in enumerate(reads):
            if tensors[2 * k] is t.A and tensors[2 * k + 1] is t.rows and read.p == t.dropout:
                slots.append(k)
                break
        else:
            slots.append(len(reads))
            reads.append(Read(t.dropout, t.blocks, t.rows is not None))
            tensors += (t.A, t.rows)
    return tuple(reads), slots, tensors


def _middle(t: LowRank, u: Tensor, p: Tensor | None, x: Tensor, dtype: torch.dtype, autocast) -> Tensor:
    """mid(u, p, x) with x's leading dimensions, back to [tokens, R'] in y's dtype; under the caller's autocast state."""
    lead = x.shape[:-1]
    args = (u.view(*lead, u.shape[-1]), None if p is None else p.view(*lead, p.shape[-1]), x)
    if autocast is None:
        v = t.mid(*args)
    else:
        with torch.autocast(autocast[0], dtype=autocast[1]):
            v = t.mid(*args)
    return v.reshape(-1, v.shape[-1]).to(dtype)


def _grouped(lows: list[LowRank]) -> list[LowRank]:
    """Plain terms of equal dropout, dtype and trainability become one of summed rank, scales folded into B.

    One read of x and one pass over y instead of one per method at the site. A term whose A is also read by another term
    stays alone: the seam reads that A once.
    """
    if len(lows) < 2:
        return lows
    groups: dict[Any, list[LowRank]] = {}
    for t in lows:
        alone = t.mid or t.post or t.blocks > 1 or sum(q.A is t.A for q in lows) > 1
        key = id(t) if alone else (t.dropout, t.A.dtype, t.B.dtype, t.A.requires_grad, t.B.requires_grad)
        groups.setdefault(key, []).append(t)
    return [ts[0] if len(ts) == 1 else _concatenate(ts) for ts in groups.values()]


def _concatenate(ts: list[LowRank]) -> LowRank:
    A = torch.cat([t.A for t in ts])
    B = torch.cat([t.B if t.scale == 1.0 else t.B * t.scale for t in ts], dim=1)
    return LowRank(A, B, dropout=ts[0].dropout)


def check_input(x: Tensor, base: Any) -> None:
    """Raise ValueError / TypeError where x does not fit the base in features, device or dtype."""
    if x.dim() == 0 or x.shape[-1] != base.in_features:
        raise ValueError(
            f"adapted_linear: x is {tuple(x.shape)}; its last dimension must be the layer's in_features = {base.in_features}."
        )
    if x.device != base.device:
        raise ValueError(f"adapted_linear: x is on {x.device} but the weight is on {base.device}; move one of them.")
    if x.dtype != base.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"adapted_linear: x is {x.dtype} but the base is {base.dtype}; cast x, or run under torch.autocast."
        )
