"""attach: a model, its optimiser and procedures in a loop that the user writes.

    with train.attach(model, optimizer, procedures, accumulation=2) as runner:
        for batch in batches:
            (model(**batch).loss / 2).backward()
            if every second batch:
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()

Torch's hooks see forwards, backwards and steps. They do not see zero_grad, the end of an epoch, or a step that a gradient
scaler skipped; those the loop says, with step_end() and epoch_end().
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpeft.outputs import tensors
from fastpeft.shards import refuse_sharded
from fastpeft.train.protocol import Batch, Context, Procedure

_WHOLE = "procedures read and change whole ones. Train this recipe under DDP, or without its procedure where it has a meaning without."


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    procedures: Sequence[Procedure],
    accumulation: int = 1,
    total_steps: int | None = None,
) -> Runner:
    """A Runner for this model; enter it with `with`, and call its step_end() after each step.

    model: the module that the loop calls (the DDP or compiled wrapper, if there is one).
    optimizer: torch's, or a wrapper with the inner one as `.optimizer`.
    accumulation: how many backwards make a step.
    total_steps: how many steps the run will take in all, for procedures with a schedule over it.
    Raises TypeError / ValueError on other things; ValueError under FSDP2, FSDP and DeepSpeed, where a procedure would see parts.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if any(type(o).__module__.partition(".")[0] == "deepspeed" for o in (model, optimizer, inner)):
        raise ValueError(f"attach: DeepSpeed keeps gradients and parameters to itself; {_WHOLE}")
    if not isinstance(inner, Optimizer):
        raise TypeError(f"attach: optimizer is {type(optimizer).__name__}; it must be a torch.optim.Optimizer.")
    for p in procedures:
        if not isinstance(p, Procedure):
            what = f"the class {p.__name__}; make an instance of it" if isinstance(p, type) else type(p).__name__
            raise TypeError(f"attach: procedures are instances of fastpeft.train.Procedure; got {what}.")
    if len({id(p) for p in procedures}) < len(procedures):
        raise ValueError("attach: one procedure was given twice; each has its own state, so make two.")
    if not isinstance(accumulation, int) or isinstance(accumulation, bool) or accumulation < 1:
        raise ValueError(f"attach: accumulation={accumulation!r}; it must be an int of at least 1, the backwards in a step.")
    if total_steps is not None and (not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1):
        raise ValueError(f"attach: total_steps={total_steps!r}; it must be an int of at least 1, the steps of the whole run, or None.")
    if procedures:
        refuse_sharded(model, "attach", _WHOLE)
    return Runner(Context(model, inner, accumulation, total_steps=total_steps), list(procedures))


class Runner:
    """Calls the procedures' events; made by attach."""

    def __init__(self, ctx: Context, procedures: list[Procedure]):
        self.ctx, self.procedures = ctx, procedures
        self._state = "new"  # then "open", then "ended"
        self._idle()

    def _idle(self) -> None:
        """Between two steps. begun: a forward was seen.   took: the optimiser stepped (False: it was asked to, and did not)."""
        self._begun, self._took, self._micro, self._task = False, None, 0, -1

    @property
    def micro(self) -> int:
        """How many backwards the step has had so far; 0 between two steps."""
        return self._micro

    @property
    def done(self) -> bool:
        """True when some procedure has reached what the run was for; the loop should end then."""
        return any(p.done for p in self.procedures)

    def __enter__(self) -> Runner:
        if self._state != "new":
            raise RuntimeError("attach: this runner was entered already; call fastpeft.train.attach again for another run.")
        model, optimizer, stack = self.ctx.model, self.ctx.optimizer, self.ctx.closing
        self._state = "open"
        try:
            for handle in (
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward, with_kwargs=True),
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ):
                stack.callback(handle.remove)
            self._tell("on_train_begin")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._tell("on_train_end")
        finally:
            self._end()

    def _end(self) -> None:
        self._state = "ended"
        self.ctx.closing.close()

    def step_end(self) -> None:
        """To be called once per step, after optimizer.step() (or the scaler's, which may skip it) and zero_grad()."""
        self._need_open("step_end")
        if not self._begun:
            raise RuntimeError(
                "attach: step_end() without a step: since the last one no forward in training mode was seen of the module that "
                "was attached."
            )
        if self._took is None:
            self._tell("after_step", True)
        self.ctx.step += bool(self._took)
        self._idle()
        self._tell("on_step_end")

    def epoch_end(self) -> None:
        """To be called at the end of each epoch."""
        self._need_open("epoch_end")
        self._tell("on_epoch_end")

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Context.quiet, for passes of the loop that no procedure should see."""
        return self.ctx.quiet()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, beside the state of model and optimiser. RuntimeError inside a step and after the end."""
        if self._begun or self._state == "ended":
            when = "inside a step" if self._begun else "after the end"
            raise RuntimeError(f"attach: state_dict() {when}; take it between two steps, before the `with` block ends.")
        return {"step": self.ctx.step, "procedures": {k: p.state_dict() for k, p in self._named().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state_dict before the first step. ValueError if it is of other procedures."""
        if self._begun or self.ctx.step or self._state == "ended":
            raise RuntimeError("attach: load_state_dict() comes before the first step of a run.")
        own = self._named()
        if set(state["procedures"]) != set(own):
            raise ValueError(f"attach: the state is of {sorted(state['procedures'])}, the procedures attached are {sorted(own)}.")
        for key, procedure in own.items():
            procedure.load_state_dict(state["procedures"][key])
        self.ctx.step = int(state["step"])

    def _named(self) -> dict[str, Procedure]:
        return {f"{k}.{type(p).__name__}": p for k, p in enumerate(self.procedures)}

    def _tell(self, event: str, *more: Any) -> None:
        for p in self.procedures:
            getattr(p, event)(self.ctx, *more)

    def _need_open(self, who: str) -> None:
        if self._state != "open":
            raise RuntimeError(f"attach: {who}() outside of the runner's `with` block.")

    def _watches(self, module: nn.Module) -> bool:
        # a forward inside a backward is a checkpoint's recomputation
        recomputed = torch._C._current_graph_task_id() != -1
        return module.training and torch.is_grad_enabled() and not self.ctx.silent and not recomputed

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._watches(module):
            return
        self._refuse_forgotten("forward")
        if not self._begun:
            self._begun = True
            self._tell("on_step_begin")
        self._tell("before_forward", Batch(args, kwargs))

    def _refuse_forgotten(self, what: str) -> None:
        if self._took is not None:
            raise RuntimeError(
                f"attach: a {what} came after optimizer.step() without runner.step_end() between; call it once per step, after "
                "zero_grad()."
            )

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._watches(module):
            return None
        extra = [(type(p).__name__, p.extra_loss(self.ctx)) for p in self.procedures]
        # a loss that is the whole step's share already (it was given num_items_in_batch) is not divided by the loop
        share = 1 / self.ctx.accumulation if kwargs.get("num_items_in_batch") is not None else 1.0
        for name, penalty in extra:
            if penalty is not None:
                _add_to_loss(output, penalty * share, name)
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._backward_began)
        return output

    def _backward_began(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if self._state == "open" and not self.ctx.silent and task != self._task:
            self._task = task
            engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            # queued again when the graph is through, so that it runs after what DDP queues meanwhile
            engine.queue_callback(lambda: engine.queue_callback(self._after_backward))

    def _after_backward(self) -> None:
        micro, self._micro = self._micro, self._micro + 1
        if micro >= self.ctx.accumulation:
            raise RuntimeError(
                f"attach: backward number {micro + 1} in a step of accumulation={self.ctx.accumulation}; say how many make a step "
                "in attach(accumulation=...), call runner.step_end() after each step, and take other gradients in runner.quiet()."
            )
        self._tell("after_backward", micro, micro == self.ctx.accumulation - 1)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.ctx.silent:
            return
        self._refuse_forgotten("step")
        if not self._begun:
            raise RuntimeError(
                "attach: optimizer.step() came without a forward in training mode of the module that was attached; attach the "
                "one that the loop calls, and call its train()."
            )
        self._tell("before_step")

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.ctx.silent:
            return
        # a fused optimiser is called by a gradient scaler in any case, and skips by itself
        found_inf = getattr(optimizer, "found_inf", None)
        self._took = found_inf is None or not bool(found_inf)
        self._tell("after_step", not self._took)


def _add_to_loss(output: Any, penalty: Tensor, name: str) -> None:
    """Add to `output.loss` (or output["loss"]), in place; RuntimeError if there is none."""
    mapping = isinstance(output, Mapping)
    loss = output.get("loss") if mapping else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise RuntimeError(
            f"attach: {name} adds a term to the loss, and the model's output ({type(output).__name__}) has no `loss` tensor; a "
            "loss computed outside of the model cannot be added to. Give the model its labels, or return the loss as `loss`."
        )
    if mapping:
        output["loss"] = loss + penalty
    else:
        output.loss = loss + penalty
