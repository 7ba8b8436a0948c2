"""The oracles: each method's formula from its paper, slow and dense, with the dropout mask as an argument.

Nothing here calls fastpeft. W [out, in]  x [..., in]  A [r, in]  B [out, r]; a mask has x's shape, holds 0 or 1 / (1 - p), and
None means no dropout. Gradients come from ordinary autograd.
"""

from __future__ import annotations

import torch


def masked(x, mask):
    return x if mask is None else x * mask


def linear(x, W, b=None):
    y = torch.einsum("...i,oi->...o", x, W)
    return y if b is None else y + b


def lora(x, W, b, A, B, s, mask=None):
    """arXiv 2106.09685, equation 3, with dropout on what A reads."""
    return linear(x, W, b) + s * linear(linear(masked(x, mask), A), B)


def dora_weight(W, A, B, m, s, full=False):
    """arXiv 2402.09353, equation 5; without `full` the norm is a constant in backward (section 4.3)."""
    V = W + s * (B @ A)
    norm = torch.sqrt((V * V).sum(dim=1, keepdim=True))
    return m[:, None] * V / (norm if full else norm.detach())


def dora(x, W, b, A, B, m, s, mask=None, full=False):
    """y = x W^T + b + drop(x) (W' - W)^T: without a mask x W'^T + b; with one, the law of the authors' code."""
    return linear(x, W, b) + linear(masked(x, mask), dora_weight(W, A, B, m, s, full) - W)


def low_rank(x, A, B, s=1.0, mask=None, mid=None, rows=None, post=None, blocks=1):
    """s * post(mid(drop(x) A^T, x rows^T, x) B^T), block-diagonal with A [n, r, in/n] and B [n, out/n, r]."""
    if blocks > 1:
        parts = [linear(linear(c, a), b) for c, a, b in zip(masked(x, mask).chunk(blocks, -1), A, B, strict=True)]
        return s * torch.cat(parts, -1)
    u = linear(masked(x, mask), A)
    if mid is not None:
        u = mid(u, None if rows is None else linear(x, rows), x)
    z = linear(u, B)
    return s * (z if post is None else post(z))


def site(x, W, b, added=(), gain=None, gain_mask=None, biases=()):
    """y = x W^T + (g - 1) (drop(x) W^T) + g * sum(added) + b + sum(biases); `added` are outputs of low_rank."""
    base = linear(x, W)
    total = sum(added) if added else torch.zeros_like(base)
    y = base + total if gain is None else base + (gain - 1) * linear(masked(x, gain_mask), W) + gain * total
    for v in ([] if b is None else [b]) + list(biases):
        y = y + v
    return y


def prolora_factors(A0, B0, Au, Bu, m, n, size_in, size_out):
    """(A [r, in], B [out, r]) of arXiv 2402.16902, chunk by chunk with torch.roll; A0 [q, ci], B0 [co, q], Au, Bu or None."""
    q = 0 if A0 is None else A0.shape[0]
    As, Bs = [], []
    if q:
        up, left = max(q // m, 1), max(q // n, 1)
        As.append(torch.cat([torch.roll(A0, -j * up, dims=0) for j in range(m)], 1)[:, :size_in])
        Bs.append(torch.cat([torch.roll(B0, -k * left, dims=1) for k in range(n)], 0)[:size_out])
    if Au is not None:
        As.append(Au)
        Bs.append(Bu)
    return torch.cat(As, 0), torch.cat(Bs, 1)


def dylora(x, W, b, A, B, alpha, rank, mask=None, frozen=False):
    """arXiv 2210.07558: the first `rank` components with scale alpha / rank; `frozen` lets only the last of them learn."""
    A, B = A[:rank], B[:, :rank]
    if frozen:
        A = torch.cat([A[:-1].detach(), A[-1:]])
        B = torch.cat([B[:, :-1].detach(), B[:, -1:]], 1)
    return lora(x, W, b, A, B, alpha / rank, mask)


def hydralora(x, W, b, A, heads, G, s, mask=None):
    """arXiv 2404.19245, head by head; heads: B_i [out, r]; the router sees x without the mask, all heads one mask."""
    logits = linear(x, G)
    weights = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    y = linear(x, W, b)
    for i, B in enumerate(heads):
        y = y + s * weights[..., i : i + 1] * linear(linear(masked(x, mask), A), B)
    return y


def lokr(x, W, b, f, s):
    """arXiv 2309.14859, section 3: W + s w1 (x) w2, each half full or a product; f: the factors by name."""
    w1, w2 = (f[n] if n in f else f[f"{n}_a"] @ f[f"{n}_b"] for n in ("w1", "w2"))
    return linear(x, W + s * kron(w1, w2), b)


def krona(x, W, b, A, B, s):
    """arXiv 2212.10650, equation 5: Y = X W + s X (A (x) B) with W [in, out]; A [a1, a2], B [b1, b2], a1 b1 = in."""
    return linear(x, W, b) + s * x @ kron(A, B)


def kron(a, b):
    return torch.einsum("ij,kl->ikjl", a, b).reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def loha(x, W, b, w1_a, w1_b, w2_a, w2_b, s):
    """arXiv 2108.06098, proposition 1: the elementwise product of two low-rank matrices, added to W; w?_a [out, r], w?_b [r, in]."""
    first, second = (torch.einsum("or,ri->oi", a, c) for a, c in ((w1_a, w1_b), (w2_a, w2_b)))
    return linear(x, W + s * first * second, b)


def krona_b(x, ffn, A, B, s, bias=None, s_res=0.0):
    """arXiv 2212.10650, KronA_B and KronA_B_res: ffn(x) + s (x (A o B) + bias) + s_res x; A [a1, a2], B [b1, b2]."""
    added = torch.einsum("...i,ij->...j", x, torch.kron(A, B))
    return ffn(x) + s * (added if bias is None else added + bias) + s_res * x


def rosa(x, W, b, A, B, s, values, index, mask=None):
    """arXiv 2401.04679: a low-rank and a sparse matrix added to W; the sparse one has no scale and sees no dropout."""
    S = torch.zeros_like(W).index_put(tuple(index.long()), values)
    return linear(x, W + S, b) + s * linear(linear(masked(x, mask), A), B)
