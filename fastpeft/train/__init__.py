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

from fastpeft.train.masks import load_masks, save_masks
from fastpeft.train.optimizer import build_optimizer
from fastpeft.train.protocol import Batch, Context, Procedure
from fastpeft.train.rosa import RoSASchedule
from fastpeft.train.runner import Runner, attach

__all__ = [
    "Batch",
    "Context",
    "Procedure",
    "RoSASchedule",
    "Runner",
    "attach",
    "build_optimizer",
    "load_masks",
    "save_masks",
]
