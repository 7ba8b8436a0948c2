"""Laplace-LoRA after training: a Gaussian posterior over trained LoRA factors, and predictions that know what they do not know.

    fastpeft.adapt(model, "laplace", rank=8)                      # train as usual, weight decay 0
    posterior = laplace.fit(model, loader)                        # one pass over the training data
    posterior.tune()                                              # prior precision by the marginal likelihood
    posterior.predict(batch)                                      # class probabilities [samples, classes]
    fastpeft.save_adapter(model, "out"); posterior.save("out")    # later: laplace.load(model, "out")

Adapters of `lora`, `lora_plus` and any other method that is A and B alone will do. Paper: arXiv 2308.13111.
"""

from fastpeft.laplace.batch import answers
from fastpeft.laplace.curvature import fit
from fastpeft.laplace.metrics import Reliability, accuracy, brier, ece, nll, reliability, scores
from fastpeft.laplace.posterior import Posterior, predictive
from fastpeft.laplace.store import load

__all__ = ["Posterior", "Reliability", "accuracy", "answers", "brier", "ece", "fit", "load", "nll", "predictive", "reliability", "scores"]
