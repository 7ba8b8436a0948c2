"""`fastpeft finetune`: from settings to a report folder."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastpeft.job import measure, memory
from fastpeft.job.arms import FASTPEFT, Arm, arm_names, build_arms
from fastpeft.job.data import encode, load_texts
from fastpeft.job.errors import JobError
from fastpeft.job.loop import train, trainee
from fastpeft.job.models import check_length, find_model, load_tokenizer
from fastpeft.job.outcome import ArmResult, Outcome, Reload
from fastpeft.job.reload import check_reload
from fastpeft.job.report import write_report
from fastpeft.job.settings import Settings
from fastpeft.job.state import Job


def finetune(settings: Settings) -> Outcome:
    """Run the job: train every arm for every seed, measure, save the adapter, check that it reloads, write
    the report.

    Raises JobError with a message for the user, for bad input before any training; an interrupt and a
    training that cannot go on also say what was saved.
    """
    if settings.quick:
        settings = replace(settings, epochs=1)
    settings.check()
    began = time.perf_counter()
    torch.set_num_threads(settings.thread_count)
    job = _prepare(settings)
    try:
        reload = _train_seeds(job)
        _measure_memory(job)
        outcome = _outcome(job, reload, time.perf_counter() - began)
        write_report(outcome, Path(settings.output))
    except KeyboardInterrupt:
        raise JobError(f"finetune: interrupted; {job.saved}.", code=130) from None
    except JobError as e:
        raise JobError(f"{e} So far, {job.saved}.", code=e.code) from None
    except OSError as e:
        raise JobError(f"finetune: {e}; {job.saved}.", code=1) from None
    return outcome


def _prepare(settings: Settings) -> Job:
    source = find_model(settings)
    texts = load_texts(settings)
    tokenizer = load_tokenizer(source)
    data = encode(texts.train, texts.train_labels, tokenizer, settings)
    held = encode(texts.evaluation, texts.evaluation_labels, tokenizer, settings)
    job = Job(settings, source, texts, tokenizer, data, held)
    kind = "windows" if texts.classes is None else f"texts in {len(texts.classes)} classes"
    print(f"model: {source.name}\ndata: {len(data)} + {len(held)} {kind}: {texts.description}", flush=True)
    return job


def _train_seeds(job: Job) -> Reload:
    settings = job.settings
    reload: Reload | None = None
    for seed in settings.seeds:
        model, new = job.load(seed)
        check_length(model, settings)
        arms = build_arms(arm_names(settings), model, new, settings, seed=seed)
        del model
        if not job.results:
            _describe_arms(job, arms)
        trainees = [trainee(arm, settings) for arm in arms]
        keep = arms[-1] if reload is None else None
        train(trainees, job.data, job.held, settings, seed=seed, after_epoch=_saver(job, keep, seed))
        for t in trainees:
            job.results[t.arm.name].add(t.losses, t.seconds, t.scores)
        if reload is None:
            reload = check_reload(job, arms[-1], seed)
        del arms, trainees, keep
        # a model and its hooks can be a cycle; two seeds' models at once would be for nothing
        gc.collect()
    assert reload is not None
    return reload


def _describe_arms(job: Job, arms: list[Arm]) -> None:
    """Start the result of each arm with what needs no training: counts, notes, bytes saved for backward."""
    device = job.settings.torch_device
    batch = {k: v.to(device) for k, v in job.longest_batch().items()}
    for arm in arms:
        saved = measure.step_bytes(arm.model, batch)
        job.results[arm.name] = ArmResult(arm.name, arm.title, arm.note, arm.trainable, arm.parameters, saved)


def _saver(job: Job, arm: Arm | None, seed: int) -> Any:
    """What to do after an epoch: save the adapter, if this seed's is the one to keep."""

    def save(epochs: int) -> None:
        if arm is None:
            return
        import fastpeft

        fastpeft.save_adapter(arm.model, job.adapter_folder)
        job.saved = f"the adapter of seed {seed} after epoch {epochs} is in {job.adapter_folder}"

    return save


def _measure_memory(job: Job) -> None:
    batch = job.longest_batch()
    for name, result in job.results.items():
        result.memory = memory.measure(
            name, job.source, job.settings, batch, classes=job.classes, pad=job.tokenizer.pad_token_id
        )


def _outcome(job: Job, reload: Reload, seconds: float) -> Outcome:
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
            "classes": job.classes,
            "majority_accuracy": job.texts.majority,
        },
        measured_batch=list(batch["input_ids"].shape),
        arms=list(job.results.values()),
        reload=reload,
        seconds=seconds,
    )
