"""Runs of training procedures in a small model: one description of a run, a plain loop, resuming, and several ranks.

A Run says how to make model and procedures, and which data; `plain` trains it in a loop of its own. Another loop (the HF Trainer's)
can take the same Run and must end with the same parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from checks import DT
from torch import nn

from fastpeft import train


class Blocks(nn.Module):
    """Embedding, residual blocks of two linears in a ModuleList, norm, head: every place that a procedure tells apart."""

    def __init__(self, blocks=3, width=8, hidden=12, vocabulary=11, dtype=DT):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype)
        self.layers = nn.ModuleList(Block(width, hidden, dtype) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.lm_head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width, hidden, dtype):
        super().__init__()
        self.up = nn.Linear(width, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, width, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def tokens(steps: int, micros: int = 1, rows: int = 4, seed: int = 7) -> list[list[torch.Tensor]]:
    """ids [rows, 5] per micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(0, 11, (rows, 5), generator=generator) for _ in range(micros)] for _ in range(steps)]


def next_token_loss(logits, ids):
    """A mean over the rows."""
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(rows, ids[:, 1:].reshape(-1))


def loss_of(model, ids):
    return next_token_loss(model(ids), ids)


class Language(Blocks):
    """Its output holds the loss, as a penalty needs it."""

    def forward(self, ids):
        logits = super().forward(ids)
        return {"loss": next_token_loss(logits, ids), "logits": logits}


def loss_in_output(model, ids):
    return model(ids)["loss"]


def held_out(k):
    """Batch k of other token ids; in a parallel run a rank's share of the rows."""
    ids = tokens(1, rows=4, seed=100 + k)[0][0]
    if torch.distributed.is_initialized():
        ids = ids.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
    return ids


@dataclass
class Run:
    """model(): a fresh adapted model, the same at every call.   procedures(): fresh ones.   data: steps of micro-batches.

    epoch: steps in an epoch, 0 for none.   zero: what zero_grad sets gradients to.
    """

    model: Callable[[], nn.Module]
    procedures: Callable[[], list[train.Procedure]]
    data: list[list[torch.Tensor]]
    cls: Any = torch.optim.AdamW
    lr: float = 0.05
    options: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1})
    epoch: int = 0
    loss: Callable[..., torch.Tensor] = loss_of
    set_to_none: bool = True

    def made(self, model=None):
        """(model, optimizer, runner), ready to be entered."""
        model = self.model().train() if model is None else model
        procedures = self.procedures()
        optimizer = train.build_optimizer(model, procedures, self.cls, lr=self.lr, **self.options)
        return model, optimizer, train.attach(model, optimizer, procedures, accumulation=len(self.data[0]))


def go(run, model, optimizer, runner, data=None, look=lambda: None, done=0):
    """The loop itself; what `look` sees after each step."""
    seen = []
    for k, micros in enumerate(run.data if data is None else data, done + 1):
        for batch in micros:
            (run.loss(model, batch) / len(micros)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=run.set_to_none)
        runner.step_end()
        if run.epoch and k % run.epoch == 0:
            runner.epoch_end()
        seen.append(look())
    return seen


def plain(run, look=lambda model, optimizer: None):
    """Train; (model, what `look` saw after each step)."""
    model, optimizer, runner = run.made()
    with runner:
        seen = go(run, model, optimizer, runner, look=lambda: look(model, optimizer))
    return model, seen


def values(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_same(got, want):
    """Two models' tensors, or two state dicts, are equal bit for bit."""
    got, want = (m.state_dict() if isinstance(m, nn.Module) else m for m in (got, want))
    assert got.keys() == want.keys()
    for n in want:
        assert torch.equal(got[n], want[n]), n


def assert_resumes(run, cut, path):
    """Stop after `cut` steps, save, build everything anew with spoiled parameters, load and go on: equal to the whole run."""
    whole, _ = plain(run)
    model, optimizer, runner = run.made()
    with runner:
        go(run, model, optimizer, runner, run.data[:cut])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "runner": runner.state_dict()}
        torch.save(state, path)
    saved = torch.load(path, weights_only=True)
    model, optimizer, runner = run.made()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    runner.load_state_dict(saved["runner"])
    with runner:
        go(run, model, optimizer, runner, run.data[cut:], done=cut)
    assert_same(model, whole)


def assert_needs_its_model(run, words):
    """A state of the whole run, beside a model at its start, is refused at the next step."""
    model, optimizer, runner = run.made()
    with runner:
        go(run, model, optimizer, runner)
        state = runner.state_dict()
    model, optimizer, runner = run.made()
    runner.load_state_dict(state)
    with runner, pytest.raises(RuntimeError, match=words):
        go(run, model, optimizer, runner)


def scaler_of(scale=1024.0):
    """A gradient scaler; its scale changes on the way, by powers of two, which round nothing."""
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)


def scaled(model, procedures, data, scaler, skips=(), cls=torch.optim.AdamW, loss=loss_of, look=lambda: None, **options):
    """A step for each [ids] of `data` under a scaler, and others, numbered in `skips`, that overflow; what `look` saw after each."""
    good, seen = iter(data), []
    optimizer = train.build_optimizer(model.train(), procedures, cls, lr=0.05, **options)
    with train.attach(model, optimizer, procedures) as runner:
        for k in range(len(data) + len(skips)):
            ids, factor = (data[0][0], float("inf")) if k in skips else (next(good)[0], 1.0)
            scaler.scale(loss(model, ids) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            runner.step_end()
            seen.append(look())
    return seen


def _rank(rank, ranks, runs, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    ends = {}
    for name, given in runs.items():
        run = copy.copy(given)
        model = run.model().train()
        run.data = [[batch.chunk(ranks)[rank] for batch in micros] for micros in run.data]
        # broadcasts would hide buffers that differ
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
        _, optimizer, runner = run.made(ddp)
        with runner:
            go(run, ddp, optimizer, runner)
        ends[name] = values(model)
    torch.save(ends, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def on_ranks(runs, folder, ranks=2):
    """Of each rank the models' state dicts after the runs under DDP, every rank with its share of each micro-batch's rows.

    runs: name -> Run, whose members must be picklable (functions of a module).
    """
    torch.multiprocessing.spawn(_rank, (ranks, runs, str(folder)), nprocs=ranks)
    return [torch.load(folder / str(rank)) for rank in range(ranks)]
