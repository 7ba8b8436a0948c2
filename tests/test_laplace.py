"""Laplace-LoRA against the paper's formulas written out: factors, precision, evidence, covariance, low rank, predictive, metrics."""

from __future__ import annotations

import papers
import pytest
import torch
from checks import DT, perturb
from test_laplace_use import CLASSES, Pool, batches, built, fitted
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft import laplace
from fastpeft.laplace.kronecker import Eigen, Factor, Gram, eigen

LAM = 0.7


def slow(model, data, dtype=DT, leaks=False):
    """Every factor's (U, G, number of vectors, J [samples, classes, p, q]) and p, by autograd through the formula: probes at each z.

    leaks: the model's mean takes padded positions in, though they are masked.
    """
    a, b = model.a, model.b
    x, kept, _ = (torch.cat(parts) for parts in zip(*data, strict=True))
    mask = torch.ones_like(kept) if leaks else kept
    fixed = [t.detach().to(dtype) for t in (a.weight, a.bias, b.weight, b.bias, model.head.weight, model.head.bias)]
    factors = [t.detach().to(dtype) for m in (a, b) for t in (m.adapter.laplace.A, m.adapter.laplace.B)]
    x = x.to(dtype)
    scale, reads = a.adapter.laplace.scale, []

    def forward(x, mask, probes, factors):
        reads.clear()
        h = x
        for k in range(2):
            (A, B), (d_a, d_b), (W, bias) = (some[2 * k : 2 * k + 2] for some in (factors, probes, fixed))
            u = papers.linear(h, A) + d_a
            reads.extend((h.detach(), u.detach()))
            h = torch.tanh(papers.linear(h, W, bias) + scale * (papers.linear(u, B) + d_b))
        pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return papers.linear(pooled, fixed[4], fixed[5])

    lead = x.shape[:2]
    probes = [torch.zeros(*lead, len(M), dtype=dtype, requires_grad=True) for M in factors]
    f = forward(x, mask.to(dtype), probes, factors)
    p = f.softmax(1).detach()
    us = [u.clone() for u in reads]
    gs = [torch.stack(g, 2) for g in zip(*(torch.autograd.grad(-f.log_softmax(1)[:, c].sum(), probes, retain_graph=True) for c in range(CLASSES)), strict=True)]

    def logits_of(n):
        zeros = [q[n : n + 1].detach() for q in probes]
        return lambda *own: forward(x[n : n + 1], mask[n : n + 1].to(dtype), zeros, own)[0]

    Js = [torch.stack(J) for J in zip(*(torch.autograd.functional.jacobian(logits_of(n), tuple(factors)) for n in range(len(x))), strict=True)]
    return [(*papers.kfac(u, g, p, kept), int(kept.sum()), J) for u, g, J in zip(us, gs, Js, strict=True)], p


NAMES = ["a.A", "a.B", "b.A", "b.B"]


@pytest.mark.parametrize("token_scale", ["tokens", "samples"])
@pytest.mark.parametrize("tokens, padded", [(1, False), (4, False), (4, True)])
def test_factors_equal_the_formula(tokens, padded, token_scale):
    model, data = built(), batches(tokens=tokens, padded=padded)
    posterior = fitted(model, data, token_scale=token_scale)
    want, _ = slow(model, data)
    assert list(posterior.factors) == NAMES
    for (U, G, vectors, _), (name, got) in zip(want, posterior.factors.items(), strict=True):
        count = vectors if token_scale == "tokens" else sum(len(x) for x, _, _ in data)
        assert vectors == sum(int(m.sum()) for _, m, _ in data)
        assert U.abs().max() > 0.1 and G.abs().max() > 1e-3, name
        assert_fp64(got.G.matrix(), G, f"G of {name}")
        assert_fp64(got.U.matrix(), U / count, f"U of {name}")


def test_padding_that_reaches_the_logits_counts_in_no_factor():
    """A model without a mask of its own: padded positions have gradients, which stay out of G as their vectors stay out of U."""
    model, data = built(), batches(tokens=4, padded=True)
    posterior = fitted(model, data, logits=lambda model, batch: model((batch[0], torch.ones_like(batch[1]))), precision=LAM)
    want, _ = slow(model, data, leaks=True)
    for (U, G, count, _), (name, got) in zip(want, posterior.factors.items(), strict=True):
        assert_fp64(got.G.matrix(), G, f"G of {name}")
        assert_fp64(got.U.matrix(), U / count, f"U of {name}")
    # the covariance is that of the logits as they are
    J = torch.cat([j.flatten(2) for _, _, _, j in want], 2)
    P = torch.block_diag(*(posterior.matrix(n) for n in NAMES))
    assert_fp64(posterior.logits(data[0])[1], (J @ torch.linalg.solve(P, J.mT))[: len(data[0][0])])


def test_old_scaling_is_tokens_times_as_large():
    """The authors' code divides by samples: T times the curvature (the ratio measured between it and laplace-torch)."""
    model, data = built(), batches(tokens=4)
    new, old = (fitted(model, data, token_scale=s) for s in ("tokens", "samples"))
    for name in NAMES:
        assert_fp64(old.factors[name].products, 4 * new.factors[name].products, name)


@pytest.mark.parametrize("padded", [False, True])
def test_precision_evidence_and_covariance_are_the_dense_ones(padded):
    model, data = built(), batches(tokens=3, padded=padded)
    posterior = fitted(model, data, precision=LAM)
    want, p = slow(model, data)
    y = torch.cat([y for _, _, y in data])
    Ps = [papers.laplace_precision(G, U, count, LAM) for U, G, count, _ in want]
    for name, P in zip(NAMES, Ps, strict=True):
        assert_fp64(posterior.matrix(name), P, name)
    theta = torch.cat([f.mode.flatten() for f in posterior.factors.values()])
    whole = torch.block_diag(*Ps)
    evidence = p.gather(1, y[:, None]).log().sum() - 0.5 * (
        LAM * theta @ theta + torch.linalg.slogdet(whole)[1] - len(theta) * torch.tensor(LAM, dtype=DT).log()
    )
    assert_fp64(posterior.log_evidence(), evidence, "evidence")
    J = torch.cat([j.flatten(2) for _, _, _, j in want], 2)
    covariance = J @ torch.linalg.solve(whole, J.mT)
    at = 0
    for batch in data:
        f, S = posterior.logits(batch)
        assert_fp64(f.softmax(1), p[at : at + len(f)], "p")
        assert_fp64(S, covariance[at : at + len(f)], "covariance")
        at += len(f)


def test_one_token_of_one_sample_has_the_exact_ggn():
    """Nothing is approximated there: G (x) U = J^T (diag p - p p^T) J within each factor."""
    model, data = built(), batches(samples=1, tokens=1)
    posterior = fitted(model, data)
    want, p = slow(model, data)
    H = torch.diag(p[0]) - torch.outer(p[0], p[0])
    for name, (_, _, _, J) in zip(NAMES, want, strict=True):
        J = J[0].flatten(1)
        assert_fp64(posterior.matrix(name) - torch.eye(J.shape[1], dtype=DT), J.T @ H @ J, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_layers_are_as_good_as_plain_pytorch(dtype):
    model, data = Pool(6, 7, 5, CLASSES).to(dtype), [(x.to(dtype), m, y) for x, m, y in batches(tokens=4, padded=True)]
    fastpeft.adapt(model, "laplace", rank=3, alpha=5, target_modules=["a", "b"])
    assert perturb(model).a.adapter.laplace.A.dtype is torch.float32
    posterior = fitted(model, data)
    truth, _ = slow(model, data)
    plain, _ = slow(model, data, dtype)
    for name, (U64, G64, count, _), (U, G, _, _) in zip(NAMES, truth, plain, strict=True):
        got = posterior.factors[name]
        assert_as_good(got.G.matrix().to(dtype), G64, G, f"G of {name}")
        assert_as_good(got.U.matrix().to(dtype), U64 / count, U / count, f"U of {name}")


# low rank


@pytest.mark.parametrize("padded", [False, True])
def test_full_number_of_eigenvalues_equals_whole_sides(padded):
    model, data = built(), batches(tokens=4, padded=padded)
    whole = fitted(model, data, n_kfac=None, precision=LAM)
    low = fitted(model, data, n_kfac=100, large=0, precision=LAM)
    for name in NAMES:
        assert_fp64(low.matrix(name), whole.matrix(name), name)
    assert_fp64(low.log_evidence(), whole.log_evidence(), "evidence")
    for batch in data:
        for got, want in zip(low.logits(batch), whole.logits(batch), strict=True):
            assert_fp64(got, want)


def test_only_large_sides_lose_eigenvalues():
    model, data = built(), batches(tokens=4)
    low = fitted(model, data, n_kfac=2, large=6)  # a: 6 -> 7, b: 7 -> 5
    kept = {n: (len(f.G.values), len(f.U.values)) for n, f in low.factors.items()}
    assert kept == {"a.A": (3, 6), "a.B": (2, 3), "b.A": (3, 2), "b.B": (5, 3)}


@pytest.mark.parametrize("wide", [0, 1])
def test_fewer_eigenvalues_equal_the_woodbury_form(wide):
    """The paper's way to J P^-1 J^T and logdet P, and the dense matrices of the same low rank."""
    small, B, J = torch.randn(3, 8, dtype=DT), torch.randn(7, 2, dtype=DT), torch.randn(5, 4, *((7, 3) if wide == 0 else (3, 7)), dtype=DT)
    small = small @ small.T
    values, vectors = torch.linalg.eigh(small)
    sides = (eigen(B, 2), Eigen(values, vectors))
    factor = Factor(J[0, 0], *(sides if wide == 0 else sides[::-1]))
    lam = torch.tensor(LAM, dtype=DT)
    G, U = (B @ B.T, small) if wide == 0 else (small, B @ B.T)
    P = papers.laplace_precision(G, U, 1, LAM)
    assert_fp64(factor.matrix(lam), P, "P")
    assert_fp64(factor.logdet(lam), torch.linalg.slogdet(P)[1], "logdet")
    got = factor.covariance(factor.project(J), lam)
    for n in range(len(J)):
        want, logdet = papers.laplace_woodbury(J[n], small, B, LAM, wide)
        assert_fp64(got[n], want, "covariance")
        assert_fp64(got[n], J[n].flatten(1) @ torch.linalg.solve(P, J[n].flatten(1).T), "dense covariance")
        assert_fp64(factor.logdet(lam), logdet, "Woodbury logdet")
    slope = torch.autograd.functional.jacobian(lambda precision: factor.covariance(factor.project(J), precision), lam)
    for n in range(len(J)):
        half = torch.linalg.solve(P, J[n].flatten(1).T)
        assert_fp64(slope[n], -half.T @ half, "its slope in the precision")


@pytest.mark.parametrize("columns", [3, 30])
def test_streamed_eigenvalues_are_those_of_repeated_svds(columns):
    rows = [torch.randn(columns, 9, dtype=DT) for _ in range(3)]
    gram, B = Gram(9, 4, torch.device("cpu")), torch.zeros(9, 0, dtype=DT)
    for r in rows:
        gram.add(r)
        left, s, _ = torch.linalg.svd(torch.cat([B, r.T], 1), full_matrices=False)
        B = left[:, :4] * s[:4]
    assert_fp64(gram.eigen(0.5).matrix(), 0.5 * B @ B.T)
    assert (B @ B.T - sum(r.T @ r for r in rows)).abs().max() > 0.1, "nothing was cut off"
    vectors = gram.eigen().vectors
    assert_fp64(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=DT), "orthonormal")


def test_a_low_rank_posterior_is_wider():
    """What is cut off is precision: variances grow, and stay under the prior's."""
    model, data = built(), batches(tokens=4)
    S = [fitted(model, data, n_kfac=k, large=0).logits(data[0])[1].diagonal(dim1=1, dim2=2) for k in (1, 3, None)]
    J = torch.cat([j.flatten(2) for _, _, _, j in slow(model, data)[0]], 2)[: len(S[0])]
    assert (S[0] > S[1]).all() and (S[1] > S[2]).all() and (J.square().sum(2) > S[0]).all()


# predictive


def test_a_certain_prior_gives_the_trained_model():
    model, data = built(), batches()
    posterior = fitted(model, data, precision=1e12)
    f, S = posterior.logits(data[0])
    assert S.abs().max() < 1e-9
    want = posterior.predict(data[0], "map")
    assert torch.equal(want, f.softmax(1)) and torch.equal(want, model(data[0]).double().softmax(1))
    for kind in ("mc", "probit"):
        assert (posterior.predict(data[0], kind) - want).abs().max() < 1e-5, kind


def test_probit_is_its_formula_and_keeps_the_choice_where_variances_are_equal(monkeypatch):
    posterior, (batch, *_) = fitted(built(), batches(samples=9)), batches(samples=9)
    f, S = posterior.logits(batch)
    want = torch.stack([(f[n] / torch.sqrt(1 + torch.pi / 8 * S[n].diag())).softmax(0) for n in range(len(f))])
    assert_fp64(posterior.predict(batch, "probit"), want)
    equal = S - torch.diag_embed(S.diagonal(dim1=1, dim2=2)) + 3 * torch.eye(CLASSES, dtype=DT)
    monkeypatch.setattr(posterior, "logits", lambda _: (f, equal))
    assert torch.equal(posterior.predict(batch, "probit").argmax(1), f.argmax(1))


def test_sampling_has_the_mean_of_the_softmax():
    posterior, data = fitted(built(), batches(samples=16)), batches(samples=16)
    for batch in data:
        f, S = posterior.logits(batch)
        got = posterior.predict(batch, samples=60_000, generator=torch.Generator().manual_seed(1))
        values, vectors = torch.linalg.eigh(S)
        root = vectors * values.clamp(min=0).sqrt()[:, None]
        draws = (f + (root @ torch.randn(60_000, *f.shape, 1, dtype=DT))[..., 0]).softmax(-1)
        error = (2 * draws.var(0) / 60_000).sqrt()  # of the difference of two such means
        assert error.max() > 1e-4 and ((got - draws.mean(0)).abs() < 6 * error + 1e-6).all()


def test_sampling_in_chunks_is_sampling(monkeypatch):
    posterior, data = fitted(built(), batches()), batches()
    whole = posterior.predict(data[0], samples=1024, generator=torch.Generator().manual_seed(1))
    # sizes in sixteens, as which torch draws
    monkeypatch.setattr("fastpeft.laplace.posterior.CHUNK", data[0][0].shape[0] * CLASSES * 320)
    assert_fp64(posterior.predict(data[0], samples=1024, generator=torch.Generator().manual_seed(1)), whole)


# precision


@pytest.mark.parametrize("n_kfac", [None, 2])
def test_tuned_precision_has_the_highest_evidence(n_kfac):
    posterior = fitted(built(), batches(tokens=3), n_kfac=n_kfac, large=0)
    start = posterior.log_evidence().item()
    best = posterior.tune(steps=500)
    assert best > start and posterior.precision.dim() == 0
    lam = posterior.precision.clone().requires_grad_()
    slope = lam * torch.autograd.grad(posterior.log_evidence(lam), lam)[0]
    assert abs(slope) < 1e-6 * abs(best)
    assert all(posterior.log_evidence(posterior.precision * c) < best for c in (0.1, 0.9, 1.1, 10.0))
    assert posterior.tune(steps=500, per_factor=True) > best and posterior.precision.shape == (4,)
    with pytest.raises(ValueError, match="per_factor=True"):
        posterior.tune()


def test_precision_tuned_on_held_out_data_makes_them_likelier():
    posterior, held_out = fitted(built(), batches()), batches(samples=40, seed=5)
    loss = []
    for precision in (0.1, 1.0, 30.0, 1000.0):
        posterior.precision = torch.tensor(precision, dtype=DT)
        loss.append(posterior.tune_on(held_out, steps=0))
    posterior.precision = torch.tensor(1.0, dtype=DT)
    best = posterior.tune_on(held_out, steps=150)
    assert best < min(loss) and abs(posterior.precision.log()) > 0.5
    p, y = posterior.evaluate(held_out, samples=20_000)
    assert abs(laplace.nll(p, y) - best) < 0.02


def test_evidence_takes_one_precision_for_each_factor():
    posterior = fitted(built(), batches())
    assert_fp64(posterior.log_evidence(torch.full((4,), LAM, dtype=DT)), posterior.log_evidence(LAM))
    for bad in (0.0, -1.0, [1.0, 2.0], float("nan")):
        with pytest.raises(ValueError, match="positive number, or one for each of 4 factors"):
            posterior.log_evidence(torch.as_tensor(bad))


# metrics


def test_metrics_are_their_formulas():
    p, y = torch.randn(200, 4, dtype=DT).mul(2).softmax(1), torch.randint(4, (200,))
    y = torch.where(p.amax(1) < 0.7, p.argmax(1), y)
    got = laplace.scores(p, y)
    assert got["ece"] > laplace.ece(p, y, 1) + 0.05, "no bin is on the other side"
    for bins in (1, 7, 15):
        assert abs(laplace.ece(p, y, bins) - papers.expected_calibration_error(p, y, bins)) < 1e-12
    rows = list(zip(p.tolist(), y.tolist(), strict=True))
    for k, (share, right, sure) in enumerate(zip(*laplace.reliability(p, y, 7), strict=True)):
        its = [(max(row), row.index(max(row)) == c) for row, c in rows if k / 7 < max(row) <= (k + 1) / 7]
        assert share == len(its) / 200 and (its or (right.isnan() and sure.isnan()))
        assert not its or abs(right - sum(r for _, r in its) / len(its)) + abs(sure - sum(c for c, _ in its) / len(its)) < 1e-12
    assert abs(got["brier"] - sum((q - (c == k)) ** 2 for row, k in rows for c, q in enumerate(row)) / 200) < 1e-12
    assert abs(got["nll"] + sum(torch.tensor(row[k], dtype=DT).log().item() for row, k in rows) / 200) < 1e-12
    assert got["accuracy"] == sum(max(row) == row[k] for row, k in rows) / 200 and got["ece"] == laplace.ece(p, y)


def test_metrics_at_their_ends():
    p, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    assert laplace.scores(p, y) == {"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}
    assert laplace.scores(p, 1 - y) == {"accuracy": 0.0, "nll": float("inf"), "brier": 2.0, "ece": 1.0}
    for bad in ((p, y[:1]), (p, y.float()), (p[0], y), (p, y + 1), (p[:0], y[:0])):
        with pytest.raises(ValueError, match="laplace"):
            laplace.nll(*bad)


# behaviour


def test_an_overtrained_classifier_is_calibrated():
    """200 noisy labels learned by heart: ECE, NLL and Brier score fall, accuracy stays within a point, and entropy grows."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    fastpeft.adapt(model, "laplace", rank=4, rank_pattern={"4": 2}, target_modules=["0", "2", "4"])
    direction = torch.randn(16, 2)

    def draw(n):
        x = torch.randn(n, 16)
        return x, (x @ direction + 3 * torch.randn(n, 2)).argmax(1)

    train, test = draw(200), draw(2000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(100):
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    posterior = laplace.fit(model, [train])
    posterior.tune()
    p, y = posterior.evaluate([test], "map")
    trained = laplace.scores(p, y)
    assert laplace.accuracy(*posterior.evaluate([train], "map")) == 1.0 and trained["ece"] > 0.2, "it was not over-trained"
    for options in (dict(kind="mc", samples=2000), dict(kind="probit")):
        q, _ = posterior.evaluate([test], **options)
        got = laplace.scores(q, y)
        assert all(got[k] < trained[k] for k in ("ece", "nll", "brier")), options
        assert abs(got["accuracy"] - trained["accuracy"]) <= 0.01, options
        assert entropy(q) > entropy(p), options


def entropy(p):
    return torch.special.entr(p).sum(1).mean()
