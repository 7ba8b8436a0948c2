"""`fastpeft sequence`: classification tasks one after another in one model, and what is left of the earlier ones.

After each task every arm is tested on all tasks so far, with all of its adapters active. No text of an earlier task is seen
again. Each task has a head of its own (fastpeft.job.heads), so the task of a text is known when it is tested; O-LoRA's paper
needs none, as its text-to-text model answers every task with one vocabulary.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastpeft.job import heads
from fastpeft.job.arms import FASTPEFT, FROZEN, Arm, build_arms
from fastpeft.job.errors import JobError, said_by
from fastpeft.job.evaluate import evaluate, logits
from fastpeft.job.loop import train, trainee
from fastpeft.job.models import Source, check_length, find_model, load_tokenizer
from fastpeft.job.procedures import build_procedures
from fastpeft.job.settings import Settings
from fastpeft.job.tasks import Task, load_tasks
from fastpeft.registry import get_recipe

O_LORA, INCREMENTAL, ONE, HEADS = "o_lora", "incremental", "lora", "frozen"
METHODS = (O_LORA, ONE)
TITLES = {O_LORA: "O-LoRA", INCREMENTAL: "incremental LoRA", ONE: "one LoRA", HEADS: "frozen + heads"}
NOTES = {
    O_LORA: "a LoRA per task, the earlier ones frozen and active, with the penalty",
    INCREMENTAL: "the same without the penalty",
    ONE: "one LoRA that learns the tasks in turn",
    HEADS: "the model is frozen and has a head per task, so it can forget nothing: a yardstick",
}


@dataclass(frozen=True)
class Plan:
    """settings: of each task's training; its `data` and `eval_data` are not used.

    data: a source per task, none for the built-in ones.   eval_data: none, or one per task.
    compare: train the controls too; the adapter that is kept is that of settings.method either way.
    """

    settings: Settings
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    compare: bool = False

    @property
    def arms(self) -> list[str]:
        return [O_LORA, INCREMENTAL, ONE, HEADS] if self.compare else [self.settings.method]


@dataclass
class Result:
    """One arm in one seed. trainable: numbers that train in each task, with its head.

    accuracy: [task learned last][task tested], of the tasks so far.   losses: [task][step].
    """

    name: str
    trainable: list[int] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.name]

    def average(self, after: int = -1) -> float:
        """Mean accuracy on the tasks so far, after the last task or after task number `after`."""
        row = self.accuracy[after]
        return sum(row) / len(row)

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of: the best accuracy it had before the last task was learned, less its final one
        (Chaudhry et al. 2018, arXiv 1801.10112)."""
        earlier, final = self.accuracy[:-1], self.accuracy[-1]
        lost = [max(row[k] for row in earlier[k:]) - final[k] for k in range(len(earlier))]
        return sum(lost) / len(lost)


@dataclass
class Learner:
    """An arm's model, its settings, and what it has come to."""

    arm: Arm
    settings: Settings
    result: Result


@dataclass
class Job:
    """What all seeds share.   saved: a sentence on the adapter saved so far."""

    plan: Plan
    source: Source
    pad: int
    tasks: list[Task]
    saved: str | None = None

    @property
    def labels(self) -> list[heads.Labels]:
        return [t.labels for t in self.tasks]


@dataclass
class Outcome:
    """runs: [seed][arm].   folders: of the first seed's adapter, after each task.   reload: per task the largest |difference| of
    the logits between the trained and the reloaded model, and the largest |logit|, on its first evaluation batch."""

    job: Job
    runs: list[list[Result]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    reload: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0


def sequence(plan: Plan) -> Outcome:
    """Learn the tasks for every seed, save the first seed's adapter after each, check that it reloads, write the report.

    Raises JobError: bad input before any training; an interrupt and a training that cannot go on say what was saved.
    """
    from fastpeft.job.sequence_report import write_report

    began, job = time.perf_counter(), None
    try:
        job = prepare(plan)
        outcome = _run(job)
        outcome.seconds = time.perf_counter() - began
        write_report(outcome, Path(plan.settings.output))
    except KeyboardInterrupt:
        raise JobError(f"sequence: interrupted; {_saved(job)}.", code=130) from None
    except JobError as e:
        words = said_by("sequence", e)
        raise JobError(words if e.code == 2 else f"{words} So far, {_saved(job)}.", code=e.code) from None
    except OSError as e:
        raise JobError(f"sequence: {e}; {_saved(job)}.", code=1) from None
    return outcome


def _saved(job: Job | None) -> str:
    return "nothing was saved" if job is None or job.saved is None else job.saved


def prepare(plan: Plan) -> Job:
    """Check what can be checked before training, and load what all seeds share. Raises JobError."""
    settings = replace(plan.settings, epochs=1) if plan.settings.quick else plan.settings
    plan = replace(plan, settings=settings)
    if settings.method not in METHODS:
        raise JobError(f"sequence: --method {settings.method}: it must be {' or '.join(METHODS)}.")
    if "previous" in settings.options:
        raise JobError("sequence: option 'previous': the sequence counts the tasks itself; leave it out.")
    for name in plan.arms:
        arm_settings(plan, name).check()
    torch.set_num_threads(settings.thread_count)
    source = find_model(settings)
    tokenizer = load_tokenizer(source)
    return Job(plan, source, tokenizer.pad_token_id, load_tasks(settings, plan.data, plan.eval_data, tokenizer))


def arm_settings(plan: Plan, name: str) -> Settings:
    """Of one arm. Rank, alpha and dropout are O-LoRA's defaults in every arm, unless given; incremental LoRA has no penalty."""
    settings = plan.settings
    method = O_LORA if name in (O_LORA, INCREMENTAL) else ONE
    defaults = get_recipe(O_LORA).options
    options = {k: defaults[k] for k in ("rank", "alpha", "dropout")} | dict(settings.options)
    penalty = dict(settings.procedure_options)
    if name == INCREMENTAL:
        penalty |= {"lambda1": 0.0, "lambda2": 0.0}
    elif method == ONE and plan.compare:
        penalty = {}
    return replace(settings, method=method, options=options, procedure_options=penalty, compare=False)


def _run(job: Job) -> Outcome:
    outcome = Outcome(job)
    for seed in job.plan.settings.seeds:
        keep = _keeper(outcome, seed) if not outcome.runs else None
        learners = learn(job, seed, after_task=keep)
        if keep is not None:
            outcome.reload = _check_reload(job, _kept(job, learners).arm.model, outcome.folders[-1])
        outcome.runs.append([learner.result for learner in learners])
        del learners
        # a model and its hooks can be a cycle; two seeds' models at once would be for nothing
        gc.collect()
    return outcome


def learn(job: Job, seed: int, *, after_task: Callable[[list[Learner]], None] | None = None) -> list[Learner]:
    """Train every arm on every task in turn, side by side: the same batches, and the same start of each task's factors.

    after_task: called when a task is learned and tested. Raises JobError on what does not fit the model, before it trains.
    """
    model, new = heads.load_with_heads(job.source, job.plan.settings, job.labels, pad=job.pad, seed=seed)
    check_length(model, job.plan.settings)
    learners = [_learner(job.plan, name, copy.deepcopy(model), new, seed) for name in job.plan.arms]
    del model
    for k, task in enumerate(job.tasks):
        print(f"task {k + 1} of {len(job.tasks)}: {task.labels.name} ({len(task.data)} + {len(task.held)} texts)", flush=True)
        for learner in learners:
            _begin(job, learner, k, seed)
        trainees = [trainee(learner.arm, learner.settings) for learner in learners]
        train(trainees, task.data, task.held, job.plan.settings, seed=seed)
        for learner, t in zip(learners, trainees, strict=True):
            learner.result.losses.append(t.losses)
            learner.result.trainable.append(learner.arm.trainable)
            learner.result.accuracy.append([_accuracy(job, learner, i) for i in range(k + 1)])
            heads.choose(learner.arm.model, job.labels, k)
        if after_task is not None:
            after_task(learners)
    return learners


def _learner(plan: Plan, name: str, model: Any, new: list[str], seed: int) -> Learner:
    settings = arm_settings(plan, name)
    [arm] = build_arms([FROZEN if name == HEADS else FASTPEFT], model, new, settings, seed=seed)
    arm.title = TITLES[name]
    return Learner(arm, settings, Result(name))


def _begin(job: Job, learner: Learner, k: int, seed: int) -> None:
    """Make task k the one that is learned: its head, and with a LoRA per task new factors and a new procedure."""
    from fastpeft.train import next_task

    arm = learner.arm
    heads.choose(arm.model, job.labels, k)
    heads.train_only(arm.model, k)
    if k and learner.settings.method == O_LORA:
        torch.manual_seed(seed + 1000 * k)
        next_task(arm.model)
        arm.procedures = build_procedures([get_recipe(O_LORA).cls.PROCEDURE], learner.settings.procedure_options)


def _accuracy(job: Job, learner: Learner, task: int) -> float:
    heads.choose(learner.arm.model, job.labels, task)
    score = evaluate(learner.arm.model, job.tasks[task].held, learner.settings)
    assert score.accuracy is not None
    return score.accuracy


def _kept(job: Job, learners: list[Learner]) -> Learner:
    return next(x for x in learners if x.result.name == job.plan.settings.method)


def _keeper(outcome: Outcome, seed: int) -> Callable[[list[Learner]], None]:
    """Saves the adapter after a task: the last one's in `adapter`, the earlier ones' in `after-task-1` and so on."""
    job = outcome.job

    def keep(learners: list[Learner]) -> None:
        done = len(outcome.folders) + 1
        last = done == len(job.tasks)
        folder = Path(job.plan.settings.output) / ("adapter" if last else f"after-task-{done}")
        heads.save(_kept(job, learners).arm.model, folder, job.source, job.plan.settings, job.labels, done)
        outcome.folders.append(str(folder))
        job.saved = f"the adapter of seed {seed} after {done} of {len(job.tasks)} tasks is in {folder}"

    return keep


def _check_reload(job: Job, model: Any, folder: str) -> list[tuple[float, float]]:
    """Load the final adapter into a new model, whose heads start from another seed, and compare."""
    settings, found = job.plan.settings, []
    fresh, labels = heads.load(folder, device=settings.torch_device, seed=settings.seeds[0] + 1)
    for k, task in enumerate(job.tasks):
        batch = task.held.batch(list(range(min(len(task.held), 2 * settings.batch_size))))
        both = []
        for m in (model, fresh):
            heads.choose(m, labels, k)
            both.append(logits(m, batch, settings))
        found.append((float((both[0] - both[1]).abs().max()), float(both[0].abs().max())))
    return found
