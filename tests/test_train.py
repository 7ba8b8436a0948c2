"""The training protocol: which event comes when, what it sees, what is refused, and the optimiser's groups."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from checks import DT, MLP, rand
from torch import nn

import fastpeft
from fastpeft import train


class Told(train.Procedure):
    """Writes down every event with what it could see."""

    def __init__(self):
        self.seen = []

    def note(self, name, ctx, *more):
        grads = [p.grad is not None for p in ctx.model.parameters()]
        self.seen.append((name, ctx.step, *more, all(grads)))

    def names(self):
        return [s[0] for s in self.seen]

    def on_train_begin(self, ctx):
        self.note("train_begin", ctx)

    def on_step_begin(self, ctx):
        self.note("step_begin", ctx)

    def before_forward(self, ctx, batch):
        self.note("before_forward", ctx)

    def extra_loss(self, ctx):
        self.note("extra_loss", ctx)

    def after_backward(self, ctx, micro, is_last):
        self.note("after_backward", ctx, micro, is_last)

    def before_step(self, ctx):
        self.note("before_step", ctx)

    def after_step(self, ctx, skipped):
        self.note("after_step", ctx, skipped)

    def on_step_end(self, ctx):
        self.note("step_end", ctx)

    def on_epoch_end(self, ctx):
        self.note("epoch_end", ctx)

    def on_train_end(self, ctx):
        self.note("train_end", ctx)

    def state_dict(self):
        return {"count": len(self.seen)}

    def load_state_dict(self, state):
        self.seen = [("loaded", state["count"])]


def attached(*procedures, model=None, lr=0.1, **options):
    model = model or nn.Linear(4, 3, dtype=DT)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, optimizer, train.attach(model, optimizer, procedures, **options)


def step(model, optimizer, runner, micros=1):
    for _ in range(micros):
        model(rand(5, 4, grad=False)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    runner.step_end()


def test_order_of_events_and_what_they_see():
    """(event, step, ..., whether every gradient is there)."""
    told = Told()
    model, optimizer, runner = attached(told, accumulation=2)
    with runner as entered:
        assert entered is runner
        step(model, optimizer, runner, 2)
        model(rand(5, 4, grad=False)).sum().backward()
        runner.ctx.optimizer.zero_grad()
        runner.step_end()  # what a scaler skips: the optimiser never stepped
        runner.epoch_end()
    assert told.seen == [
        ("train_begin", 0, False),
        ("step_begin", 0, False),
        ("before_forward", 0, False),
        ("extra_loss", 0, False),
        ("after_backward", 0, 0, False, True),
        ("before_forward", 0, True),
        ("extra_loss", 0, True),
        ("after_backward", 0, 1, True, True),
        ("before_step", 0, True),
        ("after_step", 0, False, True),
        ("step_end", 1, False),
        ("step_begin", 1, False),
        ("before_forward", 1, False),
        ("extra_loss", 1, False),
        ("after_backward", 1, 0, False, True),
        ("after_step", 1, True, False),
        ("step_end", 1, False),
        ("epoch_end", 1, False),
        ("train_end", 1, False),
    ]


def test_before_and_after_step_see_old_and_new_parameters():
    values = {}

    class Look(train.Procedure):
        def before_step(self, ctx):
            values["before"] = ctx.model.weight.clone()

        def after_step(self, ctx, skipped):
            values["after"] = ctx.model.weight.clone()

    model, optimizer, runner = attached(Look())
    start = model.weight.detach().clone()
    with runner:
        step(model, optimizer, runner)
    assert torch.equal(values["before"], start) and not torch.equal(values["after"], start)
    assert torch.equal(values["after"], model.weight)


def test_the_batch_is_what_the_model_was_called_with():
    got = []

    class Look(train.Procedure):
        def before_forward(self, ctx, batch):
            got.append(batch)

    model, _, runner = attached(Look())
    x = rand(5, 4)
    with runner:
        model(x)
        model(input=x)
    assert got[0].args == (x,) and got[0].kwargs == {} and got[1].args == () and got[1].kwargs["input"] is x


def test_passes_that_are_no_training_are_not_seen():
    told = Told()
    model, optimizer, runner = attached(told)
    x = rand(5, 4)
    with runner:
        told.seen.clear()
        with torch.no_grad():
            model(x)
        model.eval()
        model(x).sum().backward()
        model.train()
        with runner.quiet():
            torch.autograd.grad(model(x).sum(), model.weight)
            optimizer.step()
        assert told.seen == []
    model(x).sum().backward()
    optimizer.step()
    assert told.names() == ["train_end"]


def test_quiet_puts_generators_and_flags_back():
    model = nn.Sequential(nn.Linear(4, 4, dtype=DT), nn.Dropout(0.5)).train()
    model[1].eval()
    _, _, runner = attached(model=model)
    before = torch.get_rng_state()
    with runner, pytest.raises(KeyError), runner.quiet():
        model.train()
        torch.rand(7)
        assert runner.ctx.silent
        with runner.quiet():
            pass
        assert runner.ctx.silent
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.training, model[0].training, model[1].training) == (True, True, False) and not runner.ctx.silent


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_one_forward_and_one_backward(reentrant):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MLP(), MLP()

        def forward(self, x):
            for block in (self.a, self.b):
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return x

    told = Told()
    model, optimizer, runner = attached(told, model=Blocks())
    with runner:
        model(rand(5, 16)).sum().backward()
        assert told.seen[-1] == ("after_backward", 0, 0, True, True)
        optimizer.step()
        runner.step_end()
    assert told.names().count("before_forward") == told.names().count("after_backward") == 1


def test_a_whole_model_under_checkpoint_is_one_forward():
    told = Told()
    model, _, runner = attached(told, model=MLP())
    with runner:
        torch.utils.checkpoint.checkpoint(model, rand(5, 16), use_reentrant=False).sum().backward()
    assert told.names().count("before_forward") == told.names().count("after_backward") == 1


def test_two_forwards_and_one_backward_are_one_micro_batch():
    told = Told()
    model, _, runner = attached(told)
    with runner:
        (model(rand(5, 4)).sum() - model(rand(5, 4)).sum()).backward()
    assert told.names().count("after_backward") == 1 and told.names().count("before_forward") == 2


def test_a_backward_that_fails_does_not_hide_the_next():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            raise KeyError

    told = Told()
    model = nn.Sequential(nn.Linear(4, 3, dtype=DT))
    model, _, runner = attached(told, model=model)
    with runner:
        with pytest.raises(KeyError):
            model(Fails.apply(rand(5, 4))).sum().backward()
        model(rand(5, 4)).sum().backward()
    assert told.names().count("after_backward") == 1


# --- mistakes in the loop


def test_a_forgotten_step_end_raises_at_the_next_step():
    for again in ("forward", "step"):
        model, optimizer, runner = attached(Told())
        with runner:
            model(rand(5, 4)).sum().backward()
            optimizer.step()
            with pytest.raises(RuntimeError, match=rf"a {again} came after optimizer.step\(\) without runner.step_end\(\)"):
                model(rand(5, 4)) if again == "forward" else optimizer.step()
            model.eval()(rand(5, 4))  # evaluating between is no next step


def test_more_backwards_than_a_step_has():
    model, _, runner = attached(Told(), accumulation=2)
    with runner:
        for _ in range(2):
            model(rand(5, 4)).sum().backward()
        with pytest.raises(RuntimeError, match="backward number 3 in a step of accumulation=2"):
            model(rand(5, 4)).sum().backward()


def test_steps_without_a_forward_that_was_seen():
    _, optimizer, runner = attached(Told())
    with runner:
        with pytest.raises(RuntimeError, match=r"step\(\) came without a forward in training mode"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"step_end\(\) without a step"):
            runner.step_end()


def test_outside_of_the_with_block():
    _, _, runner = attached(Told())
    for call in (runner.step_end, runner.epoch_end):
        with pytest.raises(RuntimeError, match="outside of the runner's `with` block"):
            call()
    with runner:
        pass
    with pytest.raises(RuntimeError, match="entered already"):
        runner.__enter__()
    with pytest.raises(RuntimeError, match="after the end"):
        runner.state_dict()


def test_bad_arguments():
    model = nn.Linear(4, 3)
    sgd, told = torch.optim.SGD(model.parameters(), lr=0.1), Told()
    for arguments, error, words in (
        ((model, model, [told]), TypeError, "optimizer is Linear"),
        ((model, sgd, [Told]), TypeError, "the class Told; make an instance"),
        ((model, sgd, [3]), TypeError, "got int"),
        ((model, sgd, [told, told]), ValueError, "given twice"),
        ((model, sgd, [], 0), ValueError, "accumulation=0"),
        ((model, sgd, [], True), ValueError, "accumulation=True"),
    ):
        with pytest.raises(error, match=words):
            train.attach(*arguments)


@pytest.mark.parametrize("where", ["begin", "loop"])
def test_an_error_takes_the_hooks_away_and_is_no_end_of_training(where):
    undone = []

    class Fails(Told):
        def on_train_begin(self, ctx):
            super().on_train_begin(ctx)
            ctx.closing.callback(undone.append, True)
            if where == "begin":
                raise KeyError

    told = Fails()
    model, optimizer, runner = attached(told)
    with pytest.raises(KeyError), runner:
        raise KeyError
    model(rand(5, 4)).sum().backward()
    optimizer.step()
    assert told.names() == ["train_begin"] and undone == [True]
    assert not model._forward_hooks and not model._forward_pre_hooks and not optimizer._optimizer_step_post_hooks


# --- losses


class Penalty(train.Procedure):
    def extra_loss(self, ctx):
        return ctx.model.weight.square().sum()


class WithLoss(nn.Linear):
    """Its output has a `loss`, in one of the forms in use."""

    def __init__(self, form):
        super().__init__(4, 3, dtype=DT)
        self.form = form

    def forward(self, x, num_items_in_batch=None):
        y = super().forward(x)
        loss = y.square().mean() if num_items_in_batch is None else y.square().sum() / num_items_in_batch
        if self.form == "transformers":
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(loss=loss, logits=y)
        return {"dict": {"loss": loss}, "namespace": SimpleNamespace(loss=loss), "tuple": (loss, y), "tensor": y, "none": {"loss": None}}[
            self.form
        ]


def loss_of(output):
    return output["loss"] if isinstance(output, dict) else output.loss


@pytest.mark.parametrize("form", ["dict", "namespace", "transformers"])
@pytest.mark.parametrize("items", [False, True])
def test_a_penalty_counts_once_per_step(form, items):
    """The loop divides a mean loss by the accumulation; one with num_items_in_batch is not divided, so the penalty is here."""
    if form == "transformers":
        pytest.importorskip("transformers")
    model, _, runner = attached(Penalty(), model=WithLoss(form), accumulation=2)
    micros = [rand(5, 4, grad=False) for _ in range(2)]
    w, b = model.weight.detach().clone().requires_grad_(), model.bias
    whole = torch.cat([nn.functional.linear(x, w, b) for x in micros])
    (want,) = torch.autograd.grad(whole.square().mean() + w.square().sum(), w)
    with runner:
        for x in micros:
            loss = loss_of(model(x, num_items_in_batch=30) if items else model(x))
            (loss if items else loss / 2).backward()
        torch.testing.assert_close(model.weight.grad, want, rtol=0, atol=1e-13)
        model.zero_grad()
        before = loss_of(model.eval()(micros[0]))
        assert torch.equal(before, model(micros[0])["loss"] if form != "namespace" else model(micros[0]).loss)


@pytest.mark.parametrize("form", ["tuple", "tensor", "none"])
def test_a_loss_outside_of_the_model_is_refused(form):
    model, _, runner = attached(Penalty(), model=WithLoss(form))
    with runner, pytest.raises(RuntimeError, match=r"Penalty adds a term to the loss.*has no `loss` tensor"):
        model(rand(5, 4))
    model, _, runner = attached(Told(), model=WithLoss(form))
    with runner:
        model(rand(5, 4))  # who adds nothing needs no loss


# --- scalers and wrappers


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips(fused):
    """A fused optimiser is called even then, and leaves the parameters alone by itself."""
    told, model = Told(), nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with train.attach(model, optimizer, [told]) as runner:
        for factor in (1.0, float("inf"), 1.0):
            before = model.weight.detach().clone()
            scaler.scale(model(torch.randn(5, 4)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            runner.step_end()
            assert torch.equal(model.weight, before) == (factor == float("inf"))
    assert [s[2] for s in told.seen if s[0] == "after_step"] == [False, True, False]
    assert [s[1] for s in told.seen if s[0] == "step_end"] == [1, 1, 2]


def test_a_wrapper_of_the_optimiser_is_looked_through():
    told = Told()
    model, optimizer, _ = attached()
    runner = train.attach(model, SimpleNamespace(optimizer=optimizer), [told])
    assert runner.ctx.optimizer is optimizer
    with runner:
        step(model, optimizer, runner)
    assert "after_step" in told.names()


def test_a_compiled_model():
    told, inner = Told(), MLP()
    model = torch.compile(inner, backend="aot_eager")
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with train.attach(model, optimizer, [told]) as runner:
            for _ in range(2):
                model(rand(5, 16)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()
    assert told.names().count("after_backward") == 2 and told.seen[-1] == ("train_end", 2, False)


# --- state


def test_state_of_runner_and_procedures():
    first, second = Told(), Told()
    model, optimizer, runner = attached(first, second)
    with runner:
        step(model, optimizer, runner)
        step(model, optimizer, runner)
        model(rand(5, 4))
        with pytest.raises(RuntimeError, match="inside a step"):
            runner.state_dict()
        optimizer.step()
        runner.step_end()
        state = runner.state_dict()
        with pytest.raises(RuntimeError, match="before the first step"):
            runner.load_state_dict(state)
    assert state["step"] == 3 and set(state["procedures"]) == {"0.Told", "1.Told"}
    again, other = Told(), Told()
    _, _, runner = attached(again, other)
    runner.load_state_dict(state)
    assert runner.ctx.step == 3 and again.seen == [("loaded", state["procedures"]["0.Told"]["count"])]
    with pytest.raises(ValueError, match=r"the state is of \['0.Told', '1.Told'\], the procedures attached are \['0.Told'\]"):
        attached(Told())[2].load_state_dict(state)


# --- the optimiser


class Groups(train.Procedure):
    def __init__(self, change):
        self.param_groups = change


def test_build_optimizer():
    model = MLP()
    fastpeft.adapt(model, "lora", rank=2)
    ups = [p for n, p in model.named_parameters() if n.endswith(".B")]
    halves = Groups(lambda model, groups: train.optimizer.split_off(groups, ups, lr=0.5))
    optimizer = train.build_optimizer(model, [halves], torch.optim.AdamW, lr=1e-3, weight_decay=0.2)
    low, up = optimizer.param_groups
    assert (low["lr"], up["lr"], low["weight_decay"], up["weight_decay"]) == (1e-3, 0.5, 0.2, 0.2)
    assert {id(p) for p in up["params"]} == {id(p) for p in ups}
    assert len(train.build_optimizer(model, [], torch.optim.SGD, lr=1.0).param_groups) == 1
    nothing = Groups(lambda model, groups: train.optimizer.split_off(groups, [], lr=0.5))
    assert len(train.build_optimizer(model, [nothing], torch.optim.SGD, lr=1.0).param_groups) == 1


def test_groups_that_lose_or_repeat_a_parameter():
    model = MLP()
    fastpeft.adapt(model, "lora", rank=2)
    frozen = model.up.weight
    for change, words in (
        (lambda m, g: [{"params": g[0]["params"][1:]}], "3 parameters for 4 that train.*up.adapter.lora.A"),
        (lambda m, g: [*g, {"params": g[0]["params"][:1]}], "5 parameters for 4.*up.adapter.lora.A"),
        (lambda m, g: [{"params": [*g[0]["params"], frozen]}], "5 parameters for 4"),
        (lambda m, g: [{"params": [*g[0]["params"][1:], frozen]}], "4 parameters for 4"),
        (lambda m, g: [{"params": [*g[0]["params"][1:], g[0]["params"][1]]}], "4 parameters for 4"),
    ):
        with pytest.raises(ValueError, match=rf"Groups.param_groups returned {words}"):
            train.build_optimizer(model, [Groups(change)], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="no parameter of this MLP trains"):
        train.build_optimizer(MLP().requires_grad_(False), [], torch.optim.SGD, lr=0.1)


def test_the_package_is_imported_when_asked_for():
    import subprocess
    import sys

    code = "import sys, fastpeft; assert 'fastpeft.train' not in sys.modules; assert fastpeft.train.attach; fastpeft.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'fastpeft' has no attribute 'nothing'" in done.stderr
