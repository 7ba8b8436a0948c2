"""AdaLoRA: W + s B diag(E) A, s = alpha / (rank + 1e-5).   A [rank, in], B [out, rank] and E [rank, 1] train.

rank is the initial one (PEFT's init_r); s keeps it however many ranks are masked later. alpha <= 0: s = rank / (rank + 1e-5)
(PEFT, authors' code). A and B start normal(0, 0.02), E at zero. E is folded into A. A rank is masked by its E, in place
(`mask`); a masked E still has a gradient and revives unless it is masked again after the next step. merge and export drop ranks
whose E is zero, also all of them. Which ranks to mask when is fastpeft.train.AdaLoRASchedule's matter; `importance` and
`orthogonality` are its formulas. A folder is PEFT's, with every rank until the schedule has chosen for good, then without the
masked ones; one whose ranks were cut is read with zeros in their place.

Paper: arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_probability, check_rank
from fastpeft.registry import Method, Notes, PeftFormat, Site, method
from fastpeft.terms import LowRank, Term

READS = {"init_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
# what PEFT's config says of training, and fields of LoRA's that PEFT's AdaLoRA does not look at
SILENT = frozenset({"r", "target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                    "fan_in_fan_out", "use_rslora", "runtime_config", "rank_pattern", "alpha_pattern"})  # fmt: skip


def peft_adalora(options: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT AdaLoraConfig fields. PEFT wants a schedule where none is: one step, no rank to give away, no penalty."""
    fields = {field: options[name] for field, name in READS.items()}
    return fields | {"target_r": options["rank"], "total_step": 1, "orth_reg_weight": 0.0, "init_lora_weights": True}


def uncut(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors with zeros for the ranks that PEFT cut off when it saved; ValueError where pattern and file disagree."""
    full, pattern = dict(tensors), config.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping) or not all(isinstance(kept, list) for kept in pattern.values()):
        raise ValueError(f"rank_pattern is {pattern!r}; needed is a list of true and false for each layer.")
    for name, kept in pattern.items():
        stem, keep = f"base_model.model.{name.rpartition('.lora_E')[0]}", torch.tensor(kept, dtype=torch.bool)
        if len(keep) != config["init_r"] or f"{stem}.lora_E" not in full:
            raise ValueError(f"rank_pattern has {len(keep)} entries for {name!r}; needed are init_r = {config['init_r']} for a layer.")
        for leaf, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            cut = full[f"{stem}.{leaf}"]
            if cut.shape[dim] not in (len(keep), int(keep.sum())):
                raise ValueError(f"{stem}.{leaf} is {tuple(cut.shape)}, and rank_pattern keeps {int(keep.sum())} of {len(keep)} ranks.")
            if cut.shape[dim] != len(keep):
                whole = cut.new_zeros([len(keep) if d == dim else n for d, n in enumerate(cut.shape)])
                full[f"{stem}.{leaf}"] = whole.index_copy_(dim, keep.nonzero().flatten(), cut)
    return full


def cut(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The other way: where the config has a rank_pattern, both without the ranks whose E is zero, as PEFT writes them."""
    pattern, fewer = {}, dict(tensors)
    for name in config.get("rank_pattern") or {}:
        stem = f"base_model.model.{name.rpartition('.lora_E')[0]}"
        keep = tensors[f"{stem}.lora_E"][:, 0] != 0
        pattern[name] = keep.tolist()
        fewer |= {f"{stem}.{leaf}": tensors[f"{stem}.{leaf}"][keep] for leaf in ("lora_A", "lora_E")}
        fewer[f"{stem}.lora_B"] = tensors[f"{stem}.lora_B"][:, keep]
    return (config | {"rank_pattern": pattern}, fewer) if pattern else (config, tensors)


def gram_gap(M: Tensor) -> Tensor:
    """M M^T - I of M [r, n]: fp32 or wider, under autocast too."""
    with torch.autocast(M.device.type, enabled=False):
        wide = M.to(torch.promote_types(M.dtype, torch.float32))
        return wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def importance(sensitivity: Mapping[str, Tensor], uncertainty: Mapping[str, Tensor]) -> Tensor:
    """[rank]: the score of each triplet from the smoothed |w dL/dw| of A, E and B and its smoothed deviation, by name.

    An entry's score is their product; a triplet's is that of E plus the means over A's row and over B's column.
    """
    A, E, B = (sensitivity[n] * uncertainty[n] for n in ("A", "E", "B"))
    return E[:, 0] + A.mean(1) + B.mean(0)


@method("adalora", paper="arXiv 2303.10512")
class AdaLoRA(Method):
    ROLES: ClassVar = {"A": "down", "B": "up", "E": "gate"}
    PROCEDURE: ClassVar = "AdaLoRASchedule"
    NOTES: ClassVar = Notes(
        formula="W + alpha / (rank + 1e-5) * B diag(E) A",
        defaults="PEFT's AdaLoraConfig: rank (init_r) 12, alpha 8",
        oracle="stock PEFT AdaLoRA: start, output, gradients, importance, masks, folders both ways; the dense formula in fp64",
        deviations=(
            "orthogonality() is the unsquared norm of the authors' code and PEFT; the paper squares it.",
            "saved folders hold every rank, masked ones as E = 0, until the schedule's last choice (PEFT cuts them off after each).",
            "a folder saved without the schedule has a placeholder for it (total_step 1), which PEFT requires.",
            "with tfinal = 0 the last choice is made at the last step; PEFT's would be made one step after the run, so it never is.",
            "an equal initial and final rank masks nothing; PEFT 0.21.2 raises. adapt ignores the schedule of an AdaLoraConfig: "
            "AdaLoRASchedule.from_config reads it.",
            "s is constant; on a base that is not fp32 on the CPU an optimiser given PEFT 0.21.2's parameters moves it.",
            "rank is at most the layer's smaller side, as everywhere here; PEFT sets no limit.",
        ),
    )
    PEFT = PeftFormat("ADALORA", {n: f"lora_{n}" for n in "ABE"}, peft_adalora, "AdaLoraConfig", READS,
                      lacks=frozenset({"rank_pattern", "alpha_pattern"}), silent=SILENT, unpack=uncut, pack=cut)  # fmt: skip

    def __init__(self, site: Site, *, rank: int = 12, alpha: float = 8, dropout: float = 0.0):
        super().__init__()
        check_rank("adalora", rank, site)
        self.dropout = check_probability("adalora", "dropout", dropout)
        alpha = check_finite("adalora", "alpha", alpha)
        self.scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
        self.A, self.B = site.empty(rank, site.in_features), site.empty(site.out_features, rank)
        self.E = site.zeros(rank, 1)
        for p in (self.A, self.B):
            nn.init.normal_(p, std=0.02)

    def orthogonality(self) -> Tensor:
        """||A A^T - I||_F + ||B^T B - I||_F of this layer; its gradient is zero where the norm is."""
        return gram_gap(self.A).norm() + gram_gap(self.B.T).norm()

    @torch.no_grad()
    def mask(self, keep: Tensor) -> None:
        """Set E to zero, in place, where keep (bool [rank]) is False."""
        if keep.dtype is not torch.bool or keep.shape != (len(self.E),):
            raise ValueError(f"adalora.mask: keep is {keep.dtype} {tuple(keep.shape)}; it must be torch.bool ({len(self.E)},).")
        self.E.masked_fill_(~keep[:, None], 0.0)

    def terms(self, base: Any) -> list[Term]:
        return [LowRank(self.E * self.A, self.B, self.scale, dropout=self.dropout if self.training else 0.0)]

    def static_terms(self, base: Any) -> list[Term]:
        kept = self.E[:, 0] != 0
        return [LowRank((self.E * self.A)[kept], self.B[:, kept], self.scale)]
