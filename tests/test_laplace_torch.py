"""Laplace-LoRA against laplace-torch 0.3 on stock PEFT: factors, evidence, tuned precision, predictive; metrics against other libraries.

Needs laplace-torch, which asks for torchvision and is therefore installed without its dependencies.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from checks import DT, perturb
from tolerance import assert_fp64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastpeft
from fastpeft import laplace

SIZES, SAMPLES, CLASSES = (6, 7, 5), 12, 3


def oracle():
    return pytest.importorskip("laplace", reason="laplace-torch is not installed")


class Net(nn.Module):
    """Tokens through two layers, their mean, and a third layer; two-dimensional inputs have no tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(n, m, dtype=DT) for n, m in pairwise(SIZES))
        self.c = nn.Linear(SIZES[-1], CLASSES, dtype=DT)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(h if x.dim() == 2 else h.mean(1))


def pair(targets=("a", "b", "c")):
    """Our adapted model and stock PEFT's with the same values."""
    peft = pytest.importorskip("peft")
    ours = Net()
    plain = copy.deepcopy(ours)
    fastpeft.adapt(ours, "laplace", rank=3, alpha=5, target_modules=list(targets))
    perturb(ours)
    theirs = peft.get_peft_model(
        plain, peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets)), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for site in targets:
            lora, own = theirs.base_model.model.get_submodule(site), getattr(ours, site).adapter.laplace
            lora.lora_A["default"].weight.copy_(own.A)
            lora.lora_B["default"].weight.copy_(own.B)
    return ours, theirs.eval()


def data(tokens):
    torch.manual_seed(7)
    x = torch.randn(SAMPLES, *((tokens,) if tokens else ()), SIZES[0], dtype=DT)
    return x, torch.randint(CLASSES, (SAMPLES,))


class Logits(nn.Module):
    """A PEFT model as laplace-torch calls it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.base_model.model(x)


def theirs_fitted(model, x, y, precision=1.0):
    la = oracle().Laplace(
        Logits(model), "classification", subset_of_weights="all", hessian_structure="kron", prior_precision=precision
    )
    la.fit(DataLoader(TensorDataset(x, y), batch_size=7))
    return la


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("targets", [("a", "b", "c"), ("b",)], ids=str)
def test_factors_evidence_and_precision(tokens, targets):
    ours, theirs = pair(targets)
    x, y = data(tokens)
    posterior = laplace.fit(ours, [(x[:5], y[:5]), (x[5:], y[5:])])
    la = theirs_fitted(theirs, x, y)
    factors = list(posterior.factors.items())
    assert len(la.H_facs.kfacs) == len(factors) == 2 * len(targets)
    for (name, f), (G, U) in zip(factors, la.H_facs.kfacs, strict=True):
        assert_fp64(f.G.matrix(), G.detach(), f"G of {name}")
        assert_fp64(f.U.matrix(), U.detach(), f"U of {name}")
    for precision in (0.01, 1.0, 50.0):
        want = la.log_marginal_likelihood(torch.tensor([precision], dtype=DT)).detach().reshape(())
        assert_fp64(posterior.log_evidence(precision), want, f"evidence at {precision}")


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_tuned_precision(structure):
    ours, theirs = pair()
    x, y = data(4)
    posterior, la = laplace.fit(ours, [(x, y)]), theirs_fitted(theirs, x, y)
    start = torch.ones(1 if structure == "scalar" else len(posterior.factors), dtype=DT)
    la.optimize_prior_precision(method="marglik", n_steps=30, lr=0.1, prior_structure=structure, init_prior_prec=start)
    posterior.tune(steps=30, lr=0.1, per_factor=structure == "layerwise")
    assert (posterior.precision.log().abs() > 0.01).all()
    assert_fp64(posterior.precision.reshape(-1), la.prior_precision.detach().reshape(-1))


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("targets", [("a", "b", "c"), ("c",)], ids=str)
def test_predictive(tokens, targets):
    ours, theirs = pair(targets)
    x, y = data(tokens)
    new = torch.randn_like(x)
    posterior, la = laplace.fit(ours, [(x, y)], precision=0.3), theirs_fitted(theirs, x, y, 0.3)
    f, S = posterior.logits((new,))
    mean, covariance = la._glm_predictive_distribution(new)
    assert_fp64(f, mean.detach())
    assert_fp64(S, covariance.detach())
    assert S.abs().max() > 0.1
    assert_fp64(posterior.predict((new,), "probit"), la(new, pred_type="glm", link_approx="probit").detach())


def test_last_layer_is_theirs_with_the_rest_frozen():
    ours, theirs = pair()
    x, y = data(4)
    posterior = laplace.fit(ours, [(x, y)], sites="last", precision=0.3)
    for name, p in theirs.named_parameters():
        p.requires_grad_(".c.lora_" in name)
    la = theirs_fitted(theirs, x, y, 0.3)
    assert list(posterior.factors) == ["c.A", "c.B"] and len(la.H_facs.kfacs) == 2
    assert_fp64(posterior.log_evidence(), la.log_marginal_likelihood().detach().reshape(()))
    assert_fp64(posterior.logits((x,))[1], la._glm_predictive_distribution(x)[1].detach())


def probabilities():
    torch.manual_seed(3)
    return torch.randn(300, 4, dtype=DT).mul(2).softmax(1), torch.randint(4, (300,))


@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_error_is_torchmetrics(bins):
    metrics = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
    p, y = probabilities()
    # which sorts into bins in fp32
    want = metrics.multiclass_calibration_error(p, y, 4, n_bins=bins, norm="l1")
    assert abs(laplace.ece(p, y, bins) - want.item()) < 1e-6


def test_nll_brier_and_accuracy_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    p, y = probabilities()
    assert abs(laplace.nll(p, y) - metrics.log_loss(y.numpy(), p.numpy())) < 1e-12
    assert abs(laplace.accuracy(p, y) - metrics.accuracy_score(y.numpy(), p.argmax(1).numpy())) < 1e-12
    want = metrics.brier_score_loss(y.numpy(), p.numpy(), labels=[0, 1, 2, 3], scale_by_half=False)
    assert abs(laplace.brier(p, y) - want) < 1e-12
