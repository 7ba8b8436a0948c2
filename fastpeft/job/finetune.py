"""`fastpeft finetune`: from settings to a report folder."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path

import torch

from fastpeft.job import identity, measure, memory
from fastpeft.job.arms import FASTPEFT, Arm, arm_names, build_arms
from fastpeft.job.data import encode, load_texts
from fastpeft.job.errors import JobError
from fastpeft.job.kinds import with_experts, with_heads
from fastpeft.job.loop import Trainee, train, trainee
from fastpeft.job.models import check_length, find_model, load_tokenizer
from fastpeft.job.outcome import ArmResult, Outcome
from fastpeft.job.reload import check_reload
from fastpeft.job.report import write_report
from fastpeft.job.resume import Run, open_run
from fastpeft.job.settings import Settings
from fastpeft.job.state import Job
from fastpeft.job.validation import hold_out


def finetune(settings: Settings, *, resume: bool = False, restart: bool = False) -> Outcome:
    """Run the job: train every arm for every seed, measure, save the adapter, check that it reloads, write
    the report.

    resume: continue the unfinished run in the output folder; on the CPU, with the same number of threads, all figures
    but the measured times and memory are then those of a run that was never stopped.   restart: discard it.
    Raises JobError with a message for the user, for bad input before any training; an interrupt and a
    training that cannot go on also say what was saved. Finished, a JobError, if there is nothing left to resume.
    """
    began = time.perf_counter()
    if settings.quick:
        settings = replace(settings, epochs=1)
    settings.check()
    run = open_run(settings, resume=resume, restart=restart, began=began)
    torch.set_num_threads(settings.thread_count)
    job = _prepare(settings, run)
    try:
        _train_seeds(job)
        _measure_memory(job)
        outcome = _outcome(job)
        write_report(outcome, Path(settings.output))
        run.finish()
    except KeyboardInterrupt:
        raise JobError(f"finetune: interrupted; {job.saved}.", code=130) from None
    except JobError as e:
        if job.run.position is None:
            raise
        raise JobError(f"{e} So far, {job.saved}.", code=e.code) from None
    except OSError as e:
        raise JobError(f"finetune: {e}; {job.saved}.", code=1) from None
    return outcome


def _prepare(settings: Settings, run: Run) -> Job:
    source = find_model(settings)
    texts, validation = hold_out(load_texts(settings), settings)
    settings = with_experts(with_heads(settings, texts.train), texts.domains)
    tokenizer = load_tokenizer(source)
    data = encode(texts.train, texts.train_labels, tokenizer, settings, texts.train_domains)
    held = encode(texts.evaluation, texts.evaluation_labels, tokenizer, settings, texts.evaluation_domains)
    watched = encode(validation.texts, validation.labels, tokenizer, settings, validation.domains) if validation else None
    parts = {"training": data, "evaluation": held, "validation": watched}
    run.check(identity.of_examples(parts, texts.classes))
    results, reload = run.results()
    job = Job(settings, source, texts, tokenizer, data, held, watched, run, results=results, reload=reload)
    kind = "windows" if texts.classes is None else f"texts in {len(texts.classes)} classes"
    print(f"model: {source.name}\ndata: {len(data)} + {len(held)} {kind}: {texts.description}", flush=True)
    return job


def _train_seeds(job: Job) -> None:
    """Train the seeds that are not done yet."""
    settings = job.settings
    job.run.restore_generators()
    done = len(job.results[FASTPEFT].losses) if job.results else 0
    for seed in settings.seeds[done:]:
        model, new = job.load(seed)
        check_length(model, settings)
        if seed == settings.seeds[done]:
            job.run.check(identity.of_model(model, new))
        arms = build_arms(arm_names(settings), model, new, settings, seed=seed)
        del model
        if not job.results:
            _describe_arms(job, arms)
        _train_seed(job, [trainee(arm, settings) for arm in arms], seed)
        del arms
        # a model and its hooks can be a cycle; two seeds' models at once would be for nothing
        gc.collect()


def _train_seed(job: Job, trainees: list[Trainee], seed: int) -> None:
    """Train one seed, or the rest of it, and add its results; of the first one the adapter is kept and checked."""
    job.run.restore(trainees)
    if job.run.position is None:
        # from here on the folder is this run's; a resumed process notes that it started
        job.run.save(job.results, job.reload, trainees)
    keep = trainees[-1] if job.reload is None else None
    train(
        trainees,
        job.data,
        job.held,
        job.settings,
        seed=seed,
        validation=job.validation,
        after_step=lambda steps: _after_step(job, trainees, steps),
        after_epoch=lambda epochs: _after_epoch(job, trainees, keep, seed),
    )
    for t in trainees:
        job.results[t.arm.name].add(t)
    if keep is not None:
        job.reload = check_reload(job, keep.arm, seed)
    job.run.save(job.results, job.reload, None)


def _describe_arms(job: Job, arms: list[Arm]) -> None:
    """Start the result of each arm with what needs no training: counts, notes, bytes saved for backward."""
    device = job.settings.torch_device
    batch = {k: v.to(device) for k, v in job.longest_batch().items()}
    for arm in arms:
        saved = measure.step_bytes(arm.model, arm.inputs(batch), arm.procedures)
        job.results[arm.name] = ArmResult(arm.name, arm.title, arm.note, arm.trainable, arm.parameters, saved)


def _after_step(job: Job, trainees: list[Trainee], steps: int) -> None:
    every = job.settings.save_every
    if every and steps % every == 0:
        job.run.save(job.results, job.reload, trainees)


def _after_epoch(job: Job, trainees: list[Trainee], keep: Trainee | None, seed: int) -> None:
    """Save the adapter, if this epoch's is the one to keep, and then the state: a kill between the two repeats
    the epoch's end and saves the same adapter again."""
    if keep is not None and keep.epochs == keep.kept_epoch:
        import fastpeft

        fastpeft.save_adapter(keep.arm.model, job.adapter_folder)
        job.adapter = f"the adapter of seed {seed} after epoch {keep.epochs} is in {job.adapter_folder}"
    job.run.save(job.results, job.reload, trainees)


def _measure_memory(job: Job) -> None:
    batch = job.longest_batch()
    for name, result in job.results.items():
        result.memory = memory.measure(
            name, job.source, job.settings, batch, classes=job.classes, pad=job.tokenizer.pad_token_id
        )


def _outcome(job: Job) -> Outcome:
    assert job.reload is not None
    batch = job.longest_batch()
    return Outcome(
        settings=job.settings,
        model={
            "name": job.source.name,
            "sha256": job.source.sha256,
            "parameters": job.results[FASTPEFT].parameters,
        },
        data={
            "description": job.texts.description,
            "train": len(job.data),
            "evaluation": len(job.held),
            "validation": len(job.validation) if job.validation else 0,
            "classes": job.classes,
            "domains": job.texts.domains,
            "majority_accuracy": job.texts.majority,
        },
        measured_batch=list(batch["input_ids"].shape),
        arms=list(job.results.values()),
        reload=job.reload,
        sessions=job.run.sessions,
        run=job.run.identity,
    )
