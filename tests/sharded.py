"""Every recipe in a model of two blocks, what it looks like under DDP and FSDP2, and two processes that run it."""

from __future__ import annotations

import torch
from checks import DT, perturb, with_masks
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastpeft
from fastpeft.adapter import is_adapted
from fastpeft.registry import every_recipe
from fastpeft.routing_hooks import is_routed, routing_of

RANKS, WIDTH, HIDDEN = 2, 16, 24
# FSDP2 around each adapted layer and the root, and around each block and the root
WRAPS = ("ddp", "layers", "blocks")
RECIPES = [r.name for r in every_recipe()]
# what a recipe's defaults do not show
MORE = {
    "lora and a mask": (["lora", "random_masking"], {}),
    "dora, its norm in the gradient": ("dora", {"grad": "full"}),
    "dora on nf4": ("dora", {"quantize": "nf4"}),
    "lora, biases and a head": ("lora", {"bias": "all", "modules_to_save": ["head"]}),
    "superlora, one composition": ("superlora", {"rho": 0.6, "shuffle": True, "groups": 2}),
    "loftq, base let go": ("loftq", {"keep_base": False}),
    "pissa, folded": ("pissa", {"fold": True}),
    "a mask in a window": ("random_masking", {"apply": "window"}),
    "a mask, overlaid": ("random_masking", {"overlay": True}),
    "delta_lora, in place": ("delta_lora", {"inplace": True}),
    "krona_b with a bias": ("krona_b", {"krona_bias": True}),
}
CASES = {name: (name, {}) for name in RECIPES} | MORE


class MLP(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, dtype=dtype), nn.Linear(HIDDEN, WIDTH, dtype=dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.mlp = MLP(dtype)

    def forward(self, x):
        return x + self.mlp(x)


class Tower(nn.Module):
    """x [rows, tokens, WIDTH] -> the same shape."""

    def __init__(self, dtype=DT, blocks=2):
        super().__init__()
        self.layers = nn.ModuleList([Block(dtype) for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def adapted(case, dtype=DT, model=None):
    """The same on every rank and in a single process."""
    method, given = CASES[case]
    names = [method] if isinstance(method, str) else method
    known = {key for m in fastpeft.methods() if m.name in names for key in m.options}
    own = {k: v for k, v in {"rank": 2, "density": 0.1}.items() if k in known}
    torch.manual_seed(3)
    model = Tower(dtype) if model is None else model
    fastpeft.adapt(model, method, **own | given)
    return perturb(with_masks(model)).train()


def wrapped(model, how, **options):
    """(the module to call, the module whose names are the single process's)."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for m in list(model.modules()):
        if (how == "layers" and is_adapted(m)) or (how == "blocks" and isinstance(m, Block)):
            fully_shard(m, **options)
    return fully_shard(model, **options)


def data(rank, dtype=DT):
    """x [3, 4, WIDTH] and a domain label for each of the three sequences."""
    generator = torch.Generator().manual_seed(40 + rank)
    return torch.randn(3, 4, WIDTH, dtype=torch.float64, generator=generator).to(dtype), torch.tensor([rank, 1, 0])


def loss(model, outside, x, domain):
    """Summed over rows, so that a rank's share adds up to the whole; with the routers' own where there are some."""
    if not is_routed(model):
        return outside(x).square().sum()
    total = outside(x, domain=domain).square().sum()
    routing = routing_of(model, "test")
    for name, pooled in routing.last.pooled.items():
        total = total + nn.functional.cross_entropy(routing.routers[name].logits(pooled), domain, reduction="sum")
    return total


def whole(tensor):
    """The tensor itself, gathered where ranks hold shards of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trains(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return {n: None if p.grad is None else whole(p.grad).clone() for n, p in trains(model).items()}


def begin(rank, folder):
    """A gloo group of RANKS processes on one thread each."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
