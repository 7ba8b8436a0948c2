"""The oracles: each method's formula from its paper, slow and dense, with the dropout mask as an argument.

Nothing here calls fastpeft. W [out, in]  x [..., in]  A [r, in]  B [out, r]; a mask has x's shape, holds 0 or 1 / (1 - p), and
None means no dropout. Gradients come from ordinary autograd.
"""

from __future__ import annotations

import math
import statistics

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


def phatgoose_gate(x, W, b, A, B, v, s, mask=None):
    """arXiv 2402.05859, the training of a gate: what the LoRA reads is multiplied by the sigmoid of x . v."""
    g = 1 / (1 + torch.exp(-(x * v).sum(-1, keepdim=True)))
    return linear(x, W, b) + s * linear(linear(masked(g * x, mask), A), B)


def standardise(t, eps=1e-5):
    """The entries of a vector less their mean, over their standard deviation."""
    centred = t - t.mean()
    return centred / (centred.square().mean() + eps).sqrt()


def phatgoose_weights(x, gates, k):
    """Weights of every expert for one token x [in]: softmax over the k highest standardised dot products, 0 elsewhere."""
    scores = [standardise(x) @ standardise(v) / len(x) ** 0.5 for v in gates]
    chosen = sorted(range(len(gates)), key=lambda z: -scores[z].item())[:k]
    total = sum(torch.exp(scores[z]) for z in chosen)
    return [torch.exp(scores[z]) / total if z in chosen else x.new_zeros(()) for z in range(len(gates))]


def phatgoose_code_weights(x, gates, k):
    """The same as the authors' code has it: softmax over all experts, the k highest of them, over their sum + 1e-6."""
    w = torch.stack([standardise(x) @ standardise(v) for v in gates]).div(len(x) ** 0.5).softmax(0)
    kept = torch.where(w >= w.sort(descending=True).values[k - 1], w, 0.0)
    return kept / (kept.sum() + 1e-6)


def phatgoose(x, W, b, experts, gates, k, weights=phatgoose_weights):
    """arXiv 2402.05859, inference, token by token; experts: (A, B, s), gates: v [in]."""
    tokens = []
    for t in x.reshape(-1, x.shape[-1]):
        y = linear(t, W, b)
        for w, (A, B, s) in zip(weights(t, gates, k), experts, strict=True):
            y = y + w * s * (B @ (A @ t))
        tokens.append(y)
    return torch.stack(tokens).reshape(*x.shape[:-1], W.shape[0])


def grouped(x, A, B, ranks, index, weight, s):
    """s * sum_j w_j B_e A_e x of each token, e = index[.., j], w = weight[.., j]; experts one after another along A's rows, B's columns."""
    ends = [sum(ranks[:z]) for z in range(len(ranks) + 1)]
    tokens = []
    for t, own, w in zip(x.reshape(-1, x.shape[-1]), index.reshape(-1, index.shape[-1]), weight.reshape(-1, index.shape[-1]), strict=True):
        y = B.new_zeros(B.shape[0])
        for e, factor in zip(own.tolist(), w, strict=True):
            span = slice(ends[e], ends[e + 1])
            y = y + factor * s * (B[:, span] @ (A[span] @ t))
        tokens.append(y)
    return torch.stack(tokens).reshape(*x.shape[:-1], B.shape[0])


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


def gated(x, W, b, A, B, g, s, mask=None):
    """W + s B diag(g) A, one rank after the other: arXiv 2303.10512 (g = E), 2311.11696, 2403.16187 (g 0 or 1), 2403.13037."""
    y = linear(x, W, b)
    for i in range(A.shape[0]):
        y = y + s * g[i] * linear(masked(x, mask), A[i : i + 1]) * B[:, i]
    return y


def triplet_scores(sensitivity, uncertainty):
    """arXiv 2303.10512, section 3.2: S_i = s(E_i) + mean over k of s(A_ik) + mean over j of s(B_ji), s(w) = I(w) U(w)."""
    (iA, iE, iB), (uA, uE, uB) = ([d[n] for n in ("A", "E", "B")] for d in (sensitivity, uncertainty))
    scores = []
    for i in range(iE.numel()):
        down = sum(iA[i, k] * uA[i, k] for k in range(iA.shape[1])) / iA.shape[1]
        up = sum(iB[j, i] * uB[j, i] for j in range(iB.shape[0])) / iB.shape[0]
        scores.append(iE.flatten()[i] * uE.flatten()[i] + down + up)
    return torch.stack(scores)


def aflora(x, W, b, A, B, d, db, s, mask=None):
    """arXiv 2403.13269, equation 1: W + s diag(db) B diag(d) A."""
    return linear(x, W, b) + s * (linear(linear(masked(x, mask), A) * d, B) * db)


def o_lora(x, W, b, tasks, s, mask=None):
    """arXiv 2310.14152: one LoRA (A_i, B_i) per task, all of them active."""
    y = linear(x, W, b)
    for A, B in tasks:
        y = y + s * linear(linear(masked(x, mask), A), B)
    return y


def normal_float(bits):
    """arXiv 2305.14314, appendix E, with the outermost quantile of the authors' code: 2^bits levels, ascending, in fp64."""
    quantile = statistics.NormalDist().inv_cdf
    half, offset = 2 ** (bits - 1), 0.9677083
    steps = [offset + (0.5 - offset) * k / half for k in range(half)]
    fewer = [offset + (0.5 - offset) * k / (half - 1) for k in range(half - 1)]
    found = sorted([quantile(q) for q in steps] + [0.0] + [-quantile(q) for q in fewer])
    return torch.tensor(found, dtype=torch.float64) / found[-1]


def normal_float_codes(W, bits, block):
    """(codes [out * in], scales [out * in / block]) of W, row by row: the nearest level of w / absmax, of two the lower."""
    table, codes, scales = normal_float(bits), [], []
    for part in W.double().reshape(-1).split(block):
        scale = part.abs().max()
        scales.append(scale)
        for w in part:
            distance = (table - (w / scale if scale > 0 else 0.0)).abs()
            codes.append(int(distance.argmin()))
    return torch.tensor(codes), torch.stack(scales)


def principal(W, r):
    """The sum of the r leading terms S_i u_i v_i^T of W's singular value decomposition."""
    U, S, Vh = torch.linalg.svd(W)
    return sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(r))


def pissa(x, W, b, A, B, s):
    """arXiv 2404.02948: the residual of W at rank r is frozen, s B A trains beside it."""
    return linear(x, W - principal(W.detach(), A.shape[0]) + s * (B @ A), b)


def quantised(W, bits, block=64):
    """What W's codes stand for, in fp64."""
    codes, scales = normal_float_codes(W, bits, block)
    return (normal_float(bits)[codes] * scales.repeat_interleave(block)).reshape(W.shape)


def loftq(W, r, rounds, bits=4, block=64):
    """arXiv 2310.08659, algorithm 1: (Q, B A) after so many rounds."""
    low = torch.zeros_like(W)
    for _ in range(rounds):
        Q = quantised(W - low, bits, block)
        low = principal(W - Q, r)
    return Q, low


def qpissa(W, r, rounds, bits=4, block=64):
    """PiSSA's quantised form, the SVD before the quantisation: (Q, B A)."""
    rest = W
    for _ in range(rounds):
        low = principal(rest, r)
        Q = quantised(W - low, bits, block)
        rest = W - Q
    return Q, low


def loda(x, W, b, A, B, M1, M2, s, slope=0.8, mask=None, plus=False):
    """LoDA (MERL TR2023-150): s (h + f(h)) B^T; LoDA+: s (h B^T + phi(f(phi(h)) B^T)); f(h) = phi(phi(h M1^T) M2^T)."""

    def phi(v):
        return torch.where(v > 0, v, slope * v)

    def f(h):
        return phi(linear(phi(linear(h, M1)), M2))

    h = linear(masked(x, mask), A)
    added = linear(h, B) + phi(linear(f(phi(h)), B)) if plus else linear(h + f(h), B)
    return linear(x, W, b) + s * added


def lotr(x, W, b, L, M, R, s):
    """arXiv 2402.01376: W + s L M R; L [out, r] and R [r, in] the same in every layer of a group."""
    return linear(x, W + s * torch.einsum("or,rq,qi->oi", L, M, R), b)


def superlora_tensor(splits):
    """arXiv 2403.11887: X of a group; splits: of each Kronecker factor its (factors A_m [d_m, r], core [r, .., r] or None)."""
    X = None
    for factors, core in splits:
        modes = "abcdef"[: len(factors)]
        if core is None:
            made = torch.einsum(",".join(f"{m}z" for m in modes) + f"->{modes}", *factors)
        else:
            ranks = "uvwxyz"[: len(factors)]
            made = torch.einsum(",".join(m + r for m, r in zip(modes, ranks, strict=True)) + f",{ranks}->{modes}", *factors, core)
        # torch.kron refuses some strides, which einsum gives where opt_einsum is installed
        made = made.contiguous()
        X = made if X is None else torch.kron(X, made)
    return X


def superlora_group(splits, length, kept, P=None, order=None):
    """A group's numbers: vec(X) trimmed to `kept`, projected by P [length, kept], permuted."""
    z = superlora_tensor(splits).reshape(-1)[:kept]
    z = z if P is None else P @ z
    assert z.shape == (length,)
    return z if order is None else z[order]


def hadamard(n):
    """Sylvester's matrix by its entries: -1 where the binary digits that i and j share are odd in number."""
    i = torch.arange(n)
    common = i[:, None] & i
    return 1 - 2 * (sum((common >> k) & 1 for k in range(n.bit_length())) % 2).double()


def fastfood(b, order, g, length, kept):
    """P [length, kept] = H' diag(g) Pi H diag(b), H of order n over sqrt(n), zero padded on both sides."""
    H = hadamard(len(b)) / len(b) ** 0.5
    Pi = torch.eye(len(b), dtype=torch.float64)[order]
    return (H @ torch.diag(g) @ Pi @ H @ torch.diag(b))[:length, :kept]


def periodic_lora(x, W, b, stages, A, B, s, mask=None):
    """arXiv 2402.16141: W with the unloaded stages (A_i, B_i) added, and the running one beside it."""
    for A_i, B_i in stages:
        W = W + s * (B_i @ A_i)
    return lora(x, W, b, A, B, s, mask)


def delta_lora_weight(W, after, before, lam, s):
    """arXiv 2309.02411, algorithm 1: W + lam s (B' A' - B A); after, before: (A, B) around one step."""
    (A1, B1), (A0, B0) = after, before
    return W + lam * s * (B1 @ A1 - B0 @ A0)


def proximal(g, xi, released=False):
    """SoRA's operator on each entry: the minimum of (u - g)^2 / 2 + xi |u|; released: the authors' three masks, one after the other."""
    out = []
    for v in g.tolist():
        v = v - xi if v > xi else v + xi if v < -xi else v if released else 0.0
        out.append(0.0 if released and abs(v) < xi else v)
    return torch.tensor(out, dtype=g.dtype)


def galore_project(G, left=None, right=None):
    """arXiv 2403.03507, section 3: left^T G right^T, with the sides that there are; left [out, r], right [r, in]."""
    R = G if left is None else torch.einsum("or,oi->ri", left, G)
    return R if right is None else torch.einsum("oi,ri->or", R, right)


def kfac(u, g, p, kept):
    """arXiv 2308.13111, U and G: u [n, t, q] read by a factor, g [n, t, c, p'] = d(-log p_c)/dz, p [n, c], kept [n, t] (no padding)."""
    U, G = u.new_zeros(u.shape[-1], u.shape[-1]), g.new_zeros(g.shape[-1], g.shape[-1])
    for n in range(u.shape[0]):
        for t in range(u.shape[1]):
            if kept[n, t]:
                U += torch.outer(u[n, t], u[n, t])
                for c in range(p.shape[1]):
                    G += p[n, c] * torch.outer(g[n, t, c], g[n, t, c])
    return U, G


def laplace_precision(G, U, count, lam):
    """arXiv 2308.13111: the precision over a factor's entries in rows, G (x) U / count + lam I."""
    P = torch.kron(G.contiguous(), U.contiguous()) / count
    return P + lam * torch.eye(len(P), dtype=P.dtype)


def laplace_woodbury(J, small, B, lam, wide):
    """Appendix E: (J P^-1 J^T, logdet P) without P; its large side is B B^T, the small one whole; wide: which of the two it is, 0 or 1.

    J [classes, p, q]
    """
    L = torch.linalg.cholesky(small)
    left, right = (B, L) if wide == 0 else (L, B)
    s2 = 1 / lam
    M = torch.kron((left.T @ left).contiguous(), (right.T @ right).contiguous())
    M = torch.eye(len(M), dtype=M.dtype) + s2 * M
    h = (left.T @ J @ right).flatten(1)
    J = J.flatten(1)
    return s2 * J @ J.T - s2**2 * h @ torch.linalg.solve(M, h.T), torch.linalg.slogdet(M)[1] + J.shape[1] * math.log(lam)


def expected_calibration_error(p, y, bins):
    """Bin by bin: the share of samples times |accuracy - mean confidence| of the likeliest class."""
    total = 0.0
    for b in range(bins):
        inside = [n for n in range(len(y)) if b / bins < p[n].max() <= (b + 1) / bins]
        if inside:
            right = sum(float(p[n].argmax() == y[n]) for n in inside)
            total += abs(right - sum(p[n].max().item() for n in inside)) / len(y)
    return total
