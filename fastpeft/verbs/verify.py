"""`fastpeft verify`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastpeft.verbs.options import add_method, method_options, target_modules

HELP = "hold the fused layers against float64, on your model, data and device"
DESCRIPTION = (
    "Run one batch through an adapted model (the fine-tuning job's, or yours) or one layer, and compare the output, dx and every "
    "parameter's gradient of each adapted layer with float64 and with plain PyTorch in the same dtypes; then look whether a step of the loss "
    "reaches every parameter that trains. Exit code 1 if something is wrong."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastpeft.job.settings import DTYPES, TASKS, Settings

    d = Settings()
    add = parser.add_argument
    add("--layer", type=int, nargs=2, metavar=("IN", "OUT"), help="one linear layer on random input, instead of a model")
    add("--tokens", type=int, default=64, help="of --layer; default: %(default)s")
    add("--model", help="Transformers model: a folder or a name (default: the carried encoder)")
    add("--adapter", metavar="DIR", help="a saved adapter, instead of a fresh one of --method")
    add("--data", help="as of finetune (default: the built-in docstrings); one batch is used")
    add("--task", choices=TASKS, default=d.task, help="default: %(default)s")
    add("--text-column", default=d.text_column, help="default: %(default)s")
    add("--label-column", default=d.label_column, help="default: %(default)s")
    add("--domain-column", default=d.domain_column, help="default: %(default)s")
    add("--batch-size", type=int, default=4, help="default: %(default)s")
    add("--max-length", type=int, default=d.max_length, help="tokens; default: %(default)s")
    add("--dtype", choices=DTYPES, default=d.dtype, help="of the model's weights; default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    add("--train", action="store_true", help="in training mode: dropout too")
    add("--json", action="store_true", help="for machines")
    add_method(parser)
    add("--target-modules", nargs="+", metavar="NAME", help='layer names, "all-linear" (default), or one "re:PATTERN"')
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    from fastpeft.job.errors import JobError, said_by
    from fastpeft.verification import verify

    try:
        model, call = _layer(arguments) if arguments.layer else _model(arguments)
    except JobError as e:
        raise JobError(said_by("verify", e), code=e.code) from None
    try:
        found = verify(model.train(arguments.train), *call.pop("", ()), **call)
    except (ValueError, TypeError, RuntimeError) as e:
        raise JobError(f"verify: {str(e).splitlines()[0]}", code=1) from None
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found) | {"wrong": found.wrong}))
    else:
        print(found)
    if not found.right or found.untrained:
        raise JobError(f"verify: {len(found.wrong)} quantities are wrong, {len(found.untrained or ())} parameters do not train.", code=1)


def _layer(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    import torch
    from torch import nn

    import fastpeft
    from fastpeft.job.errors import JobError
    from fastpeft.job.settings import Settings

    settings = Settings(dtype=arguments.dtype, device=arguments.device)
    settings.check_device()
    sizes = [*arguments.layer, arguments.tokens]
    if min(sizes) < 1:
        raise JobError(f"verify: --layer and --tokens are {sizes}; they must be at least 1.")
    if arguments.model or arguments.adapter or arguments.data:
        raise JobError("verify: --layer beside --model, --adapter or --data; give one or the other.")
    torch.manual_seed(0)
    place: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype), "device": settings.torch_device}
    model = nn.Sequential(nn.Linear(sizes[0], sizes[1], **place))
    try:
        fastpeft.adapt(model, arguments.method, **method_options(arguments))
    except (ValueError, TypeError) as e:
        raise JobError(str(e)) from None
    _move(model)
    return model, {"": (torch.randn(sizes[2], sizes[0], **place),)}


def _model(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from dataclasses import replace

    import fastpeft
    from fastpeft.job.arms import FASTPEFT, build_arms
    from fastpeft.job.data import encode, load_texts
    from fastpeft.job.errors import JobError
    from fastpeft.job.kinds import with_experts, with_heads
    from fastpeft.job.models import check_length, find_model, load_model, load_tokenizer
    from fastpeft.job.settings import Settings

    same = ("model", "data", "task", "text_column", "label_column", "domain_column", "method", "batch_size", "max_length", "dtype", "device")
    settings = Settings(**{n: getattr(arguments, n) for n in same}, options=method_options(arguments), compare=False)
    settings = replace(settings, target_modules=target_modules(arguments.target_modules))
    settings.check_values()
    source = find_model(settings)
    texts = load_texts(settings)
    settings = with_experts(with_heads(settings, texts.train), texts.domains)
    tokenizer = load_tokenizer(source)
    data = encode(texts.train[: settings.batch_size], (texts.train_labels or [])[: settings.batch_size] or None, tokenizer, settings, texts.train_domains)
    model, new = load_model(source, settings, classes=texts.classes, pad=tokenizer.pad_token_id, seed=0)
    check_length(model, settings)
    batch = {k: v.to(settings.torch_device) for k, v in data.batch(list(range(min(len(data), settings.batch_size)))).items()}
    if arguments.adapter is None:
        [arm] = build_arms([FASTPEFT], model, new, settings, seed=0)
        _move(model)
        return model, arm.inputs(batch)
    try:
        fastpeft.load_adapter(model, arguments.adapter)
    except (FileNotFoundError, ValueError) as e:
        raise JobError(f"verify: {e}") from None
    return model, batch


def _move(model: Any) -> None:
    """Adapter parameters away from their start, where a factor that is zero would leave nothing to compare."""
    import torch

    from fastpeft.job.loop import is_own

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and is_own(f".{name}") and p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.02)
