"""RoSA under data parallelism: two processes with different data choose the same masks, those of the averaged score."""

from __future__ import annotations

import pytest
import torch
from checks import DT, MLP
from test_rosa import adapted, dense_gradients, densely, sites

from fastpeft import train

RANKS, ACCUMULATION = 2, 2


class Gradients(train.Procedure):
    """The gradients of each step's last micro-batch, as after_backward sees them and as the optimiser gets them."""

    def __init__(self):
        self.seen = []

    def note(self, ctx):
        self.seen.append({n: None if p.grad is None else p.grad.clone() for n, p in ctx.model.module.named_parameters()})

    def after_backward(self, ctx, micro, is_last):
        if is_last:
            self.note(ctx)

    def before_step(self, ctx):
        self.note(ctx)


def rank_main(rank, folder):
    """One rank: every score, then the fault (no all-reduce). Writes what it saw."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seen = {score: run(rank, score) for score in train.rosa.SCORES}
    torch.distributed.all_reduce = lambda *a, **k: None
    seen["alone"] = run(rank, "mean_sq")
    torch.save(seen, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def run(rank, score):
    """wl1 with two collecting steps of two micro-batches, then two steps of both parts."""
    torch.manual_seed(0)
    model = adapted(MLP())
    model.up.adapter.rosa.B.data.normal_(std=0.1)
    # DDP's broadcast of buffers would hide masks that differ
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    procedures = [train.RoSASchedule("wl1", 2, score), Gradients()]
    optimizer = train.build_optimizer(ddp, procedures, torch.optim.AdamW, lr=0.05)
    torch.manual_seed(100 + rank)
    collected, moved = [], []
    with train.attach(ddp, optimizer, procedures, accumulation=ACCUMULATION) as runner:
        for step in range(5):
            for _ in range(ACCUMULATION):
                x = torch.randn(4, 16, dtype=DT)
                if step in (1, 2):
                    collected.append(dense_gradients(model, x))
                (ddp(x).square().sum() / ACCUMULATION).backward()
            moved.append([m.values.grad is not None for m in sites(model).values()])
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    index = {n: m.index for n, m in sites(model).items()}
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    return {"index": index, "collected": collected, "moved": moved, "grads": procedures[1].seen, "parameters": parameters}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


@pytest.mark.parametrize("score", train.rosa.SCORES)
def test_ranks_choose_the_mask_of_the_averaged_score(score, ranks):
    one, two = (seen[score] for seen in ranks)
    for name in ("up", "down"):
        assert not torch.equal(one["collected"][0][name], two["collected"][0][name]), "the ranks saw the same data"
        every = [g[name] for seen in (one, two) for g in seen["collected"]]
        want = densely(score, every, one["index"][name].shape[1])
        assert torch.equal(one["index"][name], want) and torch.equal(two["index"][name], want), name
        alone = densely(score, [g[name] for g in one["collected"]], len(want[0]))
        assert not torch.equal(alone, want), "one rank's own score chooses alike: the average is not tested"
    assert one["moved"] == two["moved"] == [[False, False]] * 3 + [[True, True]] * 2
    for n, p in one["parameters"].items():
        assert torch.equal(p, two["parameters"][n]), n
    assert one["parameters"]["up.adapter.rosa.values"].any()
    # after_backward comes after DDP's own end of backward: it sees the gradients that are stepped with, equal on all ranks
    assert len(one["grads"]) == 10
    for seen in zip(one["grads"][::2], one["grads"][1::2], two["grads"][::2], strict=True):
        for n, g in seen[0].items():
            assert all((g is None and s[n] is None) or torch.equal(g, s[n]) for s in seen), n


def test_without_the_all_reduce_the_masks_differ(ranks):
    one, two = (seen["alone"] for seen in ranks)
    for name in ("up", "down"):
        assert not torch.equal(one["index"][name], two["index"][name])
        for seen in (one, two):
            own = densely("mean_sq", [g[name] for g in seen["collected"]], seen["index"][name].shape[1])
            assert torch.equal(seen["index"][name], own)
