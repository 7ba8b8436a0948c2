"""One process of several that train adapters under DeepSpeed: python deepspeed_runs.py RANK FOLDER PORT; test_deepspeed.py starts them.

A file of its own, so that DeepSpeed is imported in these processes alone. What a process saw is torch.saved as FOLDER/RANK.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from sharded import RANKS, adapted, data, loss
from torch import nn

import fastpeft

STEPS = 3
STAGES = (2, 3)
METHODS = ("lora", "dora", "lotr", "krona_b")


class Loss(nn.Module):
    """The model and the loss of one process's rows, as the one module that the engine calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, domain):
        return loss(self.model, self.model, x, domain) / x.numel()


def train(case, dtype, backward=torch.Tensor.backward, shares=(0, 1), prepare=lambda m, o: (m, o)):
    """(losses of STEPS steps of AdamW over these shares of the rows, the model, the module that was called)."""
    model = adapted(case, torch.float32).to(dtype)  # in fp64 too these values: a generator gives others there
    own = [p for p in model.parameters() if p.requires_grad]
    outside, optimizer = prepare(Loss(model), torch.optim.AdamW(own, lr=0.01))
    losses = []
    for _ in range(STEPS):
        parts = [data(share, dtype) for share in shares]
        x, domain = (torch.cat(p) for p in zip(*parts, strict=True))
        value = outside(x, domain)
        backward(value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    return torch.stack(losses), model, outside


def under_deepspeed(case, stage, folder, rank):
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its own default is 1.0
        # parameters as small as these would stay whole
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    # cpu=True would leave DeepSpeed out, and so would a group that Accelerate makes without a GPU
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    assert accelerator.distributed_type == "DEEPSPEED" and accelerator.device.type == "cpu", accelerator.state
    seen = {}
    losses, model, outside = train(case, torch.float32, accelerator.backward, shares=(rank,), prepare=accelerator.prepare)
    torch.distributed.all_reduce(losses)
    seen["losses"] = losses / RANKS
    seen["partitioned"] = sorted(n for n, p in model.named_parameters() if getattr(p, "ds_tensor", None) is not None and not p.numel())
    if stage == 3 or rank == 0:  # shards need every process
        fastpeft.save_adapter(model, folder)
    seen["loaded"] = again(model, folder) if stage == 3 else None
    seen["engine"] = type(outside).__name__
    try:
        fastpeft.train.attach(outside, torch.optim.SGD(model.parameters()), [fastpeft.train.DyLoRASampling()])
    except ValueError as error:
        seen["attach"] = str(error)
    return seen


def again(model, folder):
    """Whether spoiled values, loaded again, are saved as they were."""
    from fastpeft.folder import read_folder

    torch.distributed.barrier()
    own = [p for p in model.parameters() if p.requires_grad]
    import deepspeed

    with deepspeed.zero.GatheredParameters(own, modifier_rank=0), torch.no_grad():
        for p in own:
            p.add_(1.0)
    fastpeft.save_adapter(model, f"{folder}/spoiled")
    fastpeft.load_adapter(model, folder)
    fastpeft.save_adapter(model, f"{folder}/again")
    saved, spoiled, loaded = (read_folder(f)[1] for f in map(Path, (folder, f"{folder}/spoiled", f"{folder}/again")))
    return all(torch.equal(loaded[k], t) and not torch.equal(spoiled[k], t) for k, t in saved.items())


def main(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true",
    }  # fmt: skip
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    seen = {}
    for stage in STAGES:
        for case in sys.argv[4:] or METHODS:
            seen[stage, case] = under_deepspeed(case, stage, f"{folder}/{stage}-{case}", rank)
            print(rank, stage, case, seen[stage, case], flush=True)
    torch.save(seen, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
