"""Procedures under Transformers' Trainer, and whatever inherits from it (TRL's trainers).

    procedures = [train.RoSASchedule("wl64")]
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=7e-4)
    trainer = Trainer(model, ..., optimizers=(optimizer, None), callbacks=[ProcedureCallback(procedures)])

The Trainer's events say what torch's hooks do not see: the end of a step and of an epoch, a checkpoint that is saved.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from fastpeft.folder import replace_file
from fastpeft.train.layers import held
from fastpeft.train.optimizer import check_groups
from fastpeft.train.protocol import Procedure
from fastpeft.train.runner import Runner, attach


class ProcedureCallback(TrainerCallback):
    """Runs procedures around the Trainer's steps. One callback takes all of a model's procedures.

    resume_from: the checkpoint folder given to Trainer.train(resume_from_checkpoint=...), where that is not
        <output_dir>/checkpoint-<step>: callbacks are not told.

    Each checkpoint gets a file beside the Trainer's own, one per process, with the state of the procedures and a fingerprint of
    the parameters that it belongs to. A resumed run reads it; without it, or beside other parameters, it raises.
    Training stops when a procedure has reached what the run was for (Runner.done).
    Raises, before the first step, ValueError if the optimiser's groups are not as the procedures want them, RuntimeError where
    procedures cannot run: DataParallel, DeepSpeed, FSDP, torch_compile, hyperparameter search.
    After a training that ended in an error, close() takes the hooks away; a further train() of the same Trainer does so itself.
    """

    def __init__(self, procedures: Sequence[Procedure], *, resume_from: str | os.PathLike[str] | None = None):
        self.procedures, self.resume_from = list(procedures), resume_from
        self.runner: Runner | None = None
        self._update = self._place = 0  # steps of this epoch so far, and at the beginning of the next one
        self._ended = False  # whether this epoch's end has been told

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **more: Any
    ) -> None:
        self.close()
        _refuse(args, state, model)
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        check_groups(model, self.procedures, inner, "ProcedureCallback")
        runner = attach(
            model, inner, self.procedures, accumulation=args.gradient_accumulation_steps, total_steps=state.max_steps
        )
        saved = self._read(args, state, model, inner) if state.global_step else {}
        if saved:
            runner.load_state_dict(saved["runner"])
        self.runner = runner.__enter__()
        if saved.get("epoch_ends"):
            # the Trainer goes on with the next epoch, and does not say again that this one is over
            runner.epoch_end()
        loader = more.get("train_dataloader")
        skipping = has_length(loader) and not args.ignore_data_skip
        self._place = state.global_step % _updates(args, loader) if skipping else 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._update, self._place, self._ended = self._place, 0, False

    def on_step_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **more: Any) -> None:
        # the Trainer leaves the gradients of an epoch that ends inside a step for the next one
        runner = self._open()
        runner.ctx.accumulation = runner.micro + _micros(args, train_dataloader, self._update)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        runner = self._open()
        runner.step_end()
        self._update += 1
        if runner.done:
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **more: Any) -> None:
        # the Trainer says so too where the training ends within an epoch
        whole = has_length(train_dataloader) and self._update == _updates(args, train_dataloader)
        if whole or not control.should_training_stop:
            self._open().epoch_end()
            self._ended = True

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **more: Any) -> None:
        runner = self._open()
        # a checkpoint of an epoch's last step comes before that epoch's end
        ends = has_length(train_dataloader) and self._update == _updates(args, train_dataloader) and not self._ended
        saved = {"step": state.global_step, "parameters": _fingerprint(model, runner.ctx.optimizer)}
        saved |= {"epoch_ends": ends, "runner": runner.state_dict()}
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        replace_file(_folder(args, state) / _name(args), buffer.getvalue())

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        runner, self.runner = self._open(), None
        runner.__exit__(None, None, None)

    def close(self) -> None:
        """Take the hooks of a training that did not come to its end away; nothing if there is none."""
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.__exit__(RuntimeError, RuntimeError("the training did not come to its end"), None)

    def _open(self) -> Runner:
        if self.runner is None:
            raise RuntimeError("ProcedureCallback: an event of the Trainer outside of a training; add the callback before train().")
        return self.runner

    def _read(self, args: Any, state: Any, model: nn.Module, optimizer: Optimizer) -> Mapping[str, Any]:
        """What `on_save` wrote into the checkpoint that the Trainer has just read."""
        folder = _folder(args, state) if self.resume_from is None else Path(self.resume_from)
        path = folder / _name(args)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            step, parameters, _ = saved["step"], saved["parameters"], saved["runner"]
        except FileNotFoundError:
            raise FileNotFoundError(
                f"ProcedureCallback: training resumes at step {state.global_step}, and {path} with the state of the procedures does "
                "not exist; say ProcedureCallback(..., resume_from=folder) with the folder given to train(), or start anew."
            ) from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, OSError) as e:
            why = (str(e).splitlines() or [type(e).__name__])[0]
            raise ValueError(f"ProcedureCallback: {path} is damaged, or no state of procedures: {why}") from e
        if step != state.global_step or parameters != _fingerprint(model, optimizer):
            raise ValueError(
                f"ProcedureCallback: {path} was saved at step {step} beside other parameters than the model has at step "
                f"{state.global_step}; say ProcedureCallback(..., resume_from=folder) with the folder given to train()."
            )
        return saved


def _refuse(args: Any, state: Any, model: nn.Module) -> None:
    """RuntimeError where procedures would not see the model's steps, or not all of them."""
    for wrong, what in (
        (args.n_gpu > 1, "several GPUs in one process are DataParallel, whose copies of the model they do not see; start one process per GPU (torchrun)"),
        (bool(args.deepspeed), "DeepSpeed keeps gradients and parameters to itself"),
        (bool(args.fsdp), "FSDP keeps parts of gradients and parameters, and this has not been tried"),
        (args.torch_compile, "torch_compile=True would compile their hooks; give the Trainer torch.compile(model)"),
        (state.is_hyper_param_search, "a hyperparameter search trains again and again, and they have a state"),
        (_watched(model), "the model has procedures attached already; give all of them to one callback, and close() one whose training failed"),
    ):  # fmt: skip
        if wrong:
            raise RuntimeError(f"ProcedureCallback: procedures cannot run here: {what}.")


def _watched(model: nn.Module) -> bool:
    return any(isinstance(getattr(hook, "__self__", None), Runner) for hook in model._forward_pre_hooks.values())


def _updates(args: Any, loader: Any) -> int:
    """Steps in an epoch."""
    return max(1, -(-len(loader) // args.gradient_accumulation_steps))


def _micros(args: Any, loader: Any, update: int) -> int:
    """Micro-batches of a step; the last one of an epoch may have fewer."""
    n = args.gradient_accumulation_steps
    if not has_length(loader) or update != _updates(args, loader) - 1:
        return n
    return len(loader) % n or n


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _name(args: Any) -> str:
    return "fastpeft_procedures.pt" if args.world_size == 1 else f"fastpeft_procedures_{args.process_index}.pt"


def _fingerprint(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """A sum over the bits of each parameter that the optimiser holds: the same on every device."""
    own = held(optimizer)
    return {n: _bits(p.detach()) for n, p in model.named_parameters() if p in own}


def _bits(t: Tensor) -> int:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()]
    return int(t.contiguous().view(whole).sum(dtype=torch.int64))
