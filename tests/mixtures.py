"""Folders of trained LoRAs, and a model that mixes them."""

from __future__ import annotations

import copy

import torch
from checks import DT, perturb

import fastpeft

# rank, alpha and targets differ on purpose: scales are folded, and the third expert has no MLP
EXPERTS = {
    "law": {"rank": 2, "alpha": 6},
    "code": {"rank": 3, "alpha": 3},
    "news": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]},
}


def folders(base, path, experts=EXPERTS):
    """name -> folder of LoRAs for `base`, which stays as it is."""
    found = {}
    for k, (name, options) in enumerate(experts.items()):
        model = copy.deepcopy(base)
        fastpeft.adapt(model, "lora", **options)
        torch.manual_seed(50 + k)
        perturb(model)
        fastpeft.save_adapter(model, path / name)
        found[name] = path / name
    return found


def single(base, folder):
    """A copy of `base` with one LoRA alone."""
    model = copy.deepcopy(base)
    fastpeft.load_adapter(model, folder)
    return model.eval()


def mixture(base, found, **options):
    """A copy of `base` that routes between these folders by routers that disagree, in fp64."""
    model = copy.deepcopy(base)
    torch.manual_seed(7)
    fastpeft.adapt(model, "moa", experts=found, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("adapter_shared"):
                p.copy_(torch.randn(p.shape, dtype=DT))
    return model.eval()


def batch(rows=4, length=9, seed=3, vocabulary=64):
    """ids [rows, length] and labels with a prompt of its own length per row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 3 + row % 3] = -100
    return ids, labels
