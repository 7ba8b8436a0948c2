"""Laplace-LoRA: LoRA, W + s B A, with a Gaussian posterior over A and B fitted after training.   A [rank, in], B [out, rank] train.

The layer and its training are `lora`'s: what comes out of training is the posterior's mode, and a folder is a plain LoRA for PEFT.
fastpeft.laplace.fit(model, loader) then looks once at the training data; its posterior predicts, and is saved beside the folder.
B starts at zero, A uniform on +-1/sqrt(in) (start= as lora's). merge and export take the mode; a posterior cannot be merged.

Paper: arXiv 2308.13111.
"""

from __future__ import annotations

from typing import ClassVar

from fastpeft.method.lora import LoRA, peft_lora
from fastpeft.registry import Notes, PeftFormat, Site, method


@method("laplace", paper="arXiv 2308.13111")
class LaplaceLoRA(LoRA):
    ROLES: ClassVar = {"A": "down", "B": "up"}
    NOTES: ClassVar = Notes(
        formula="W + alpha / rank * B A; p(factor) = N(mode, (G (x) U / tokens + precision I)^-1); logits ~ N(f, J Cov J^T)",
        defaults="the authors' scripts: rank 8, alpha 16; fit's n_kfac 10 is the example of a co-author's bayesian_lora, large 512 is ours",
        oracle="laplace-torch 0.3: factors, evidence, tuned precision, predictive; dense matrices in fp64; the exact GGN of one token",
        deviations=(
            "dropout is 0 by default, as for every method here; the authors' scripts say 0.1.",
            "G (x) U is divided by samples times tokens, padded ones not counted, as laplace-torch does; the authors' code divides "
            "by samples alone (token_scale='samples').",
            "large sides are low-rank, as in the paper; the authors' released code keeps them whole (n_kfac=None).",
            "a large side takes in each class of a batch by itself and is cut to n_kfac eigenvalues after each; the paper adds whole "
            "batches. What is cut off is precision: fewer eigenvalues give wider predictions.",
            "low-rank factors are used through their eigenvectors: the same matrix as the paper's Woodbury form, without a jitter.",
            "validation tunes the precision on all its data at once with fixed normal draws; the authors' code takes batches of 8.",
            "only A and B are random; other things that train (a new head, biases) stay at their trained values.",
        ),
    )
    PEFT = PeftFormat("LORA", {"A": "lora_A.weight", "B": "lora_B.weight"}, peft_lora)

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        start: str = "kaiming",
    ):
        super().__init__(site, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, start=start)
