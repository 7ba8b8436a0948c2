"""Training procedures: what a paper prescribes around an optimiser step, in a loop that the user writes.

    procedures = [train.RoSASchedule("wl64")]
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=7e-4)
    with train.attach(model, optimizer, procedures) as runner:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
"""

from fastpeft.train.adalora import AdaLoRASchedule
from fastpeft.train.aflora import AFLoRAFreezing
from fastpeft.train.alora import ALoRAAllocation
from fastpeft.train.bilora import BiLoRABilevel
from fastpeft.train.delta_lora import DeltaLoRASchedule
from fastpeft.train.dylora import DyLoRASampling
from fastpeft.train.galore import GaLoreAdamW, GaLoreProjection
from fastpeft.train.lisa import LISASchedule
from fastpeft.train.lora_fa import HFAdamW, LoRAFAPreconditioner
from fastpeft.train.lora_plus import LoRAPlus
from fastpeft.train.masks import load_masks, save_masks
from fastpeft.train.moa import MoARouting
from fastpeft.train.o_lora import OLoRAPenalty, next_task
from fastpeft.train.optimizer import build_optimizer
from fastpeft.train.periodic_lora import PeriodicLoRASchedule
from fastpeft.train.protocol import Batch, Context, Procedure
from fastpeft.train.rosa import RoSASchedule
from fastpeft.train.runner import Runner, attach
from fastpeft.train.sora import SoRASchedule
from fastpeft.train.source import Batches, divide

__all__ = [
    "AFLoRAFreezing",
    "ALoRAAllocation",
    "AdaLoRASchedule",
    "Batch",
    "Batches",
    "BiLoRABilevel",
    "Context",
    "DeltaLoRASchedule",
    "DyLoRASampling",
    "GaLoreAdamW",
    "GaLoreProjection",
    "HFAdamW",
    "LISASchedule",
    "LoRAFAPreconditioner",
    "LoRAPlus",
    "MoARouting",
    "OLoRAPenalty",
    "PeriodicLoRASchedule",
    "Procedure",
    "RoSASchedule",
    "Runner",
    "SoRASchedule",
    "attach",
    "build_optimizer",
    "divide",
    "load_masks",
    "next_task",
    "save_masks",
]
