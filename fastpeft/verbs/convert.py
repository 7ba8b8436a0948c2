"""`fastpeft convert`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "between PEFT folders and the .safetensors files of kohya and LyCORIS"
DESCRIPTION = (
    "Convert an adapter. SOURCE is a PEFT folder and TARGET a .safetensors file as kohya's sd-scripts and LyCORIS write them (LoRA, DoRA, "
    "LoHa, LoKr of linear layers), or the other way round. The file's names have _ for '.', so reading one needs the --model that it is for."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("--model", help="Transformers model that a file's layers belong to: a folder or a name")
    parser.add_argument("--prefix", default="lycoris", help="of the file's keys, such as lora_unet; default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from fastpeft.job.errors import JobError

    source, target = Path(arguments.source), Path(arguments.target)
    try:
        if source.is_dir():
            _to_file(source, target, arguments.prefix)
        else:
            _to_folder(source, target, arguments)
    except (FileNotFoundError, ValueError) as e:
        raise JobError(str(e) if isinstance(e, JobError) else f"convert: {str(e).removeprefix('load_adapter: ')}") from None
    except OSError as e:
        raise JobError(f"convert: {e}", code=1) from None


def _to_file(source: Any, target: Any, prefix: str) -> None:
    from fastpeft.integrations.to_lycoris import to_lycoris
    from fastpeft.job.errors import JobError

    if target.suffix != ".safetensors" or target.is_dir():
        raise JobError(f"convert: {target}: a folder becomes a file; name one that ends in .safetensors.")
    layers = to_lycoris(source, target, prefix=prefix)
    print(f"{len(layers)} layers of {source} -> {target}, keys {prefix}_...")


def _to_folder(source: Any, target: Any, arguments: argparse.Namespace) -> None:
    import fastpeft
    from fastpeft.integrations.lycoris import load_lycoris
    from fastpeft.job.arms import peft_counterpart
    from fastpeft.job.errors import JobError, require
    from fastpeft.record import adaptation

    if not source.is_file():
        raise JobError(f"convert: {source}: no such file or folder.")
    if target.exists() and not target.is_dir():
        raise JobError(f"convert: {target} is a file; a file becomes a folder.")
    if arguments.model is None:
        raise JobError(f"convert: {source} names its layers with _ for '.'; give the --model that they belong to.")
    require("convert", "transformers")
    model = _model(arguments.model)
    report = load_lycoris(model, source, prefix=arguments.prefix)
    fastpeft.save_adapter(model, target)
    record = adaptation(model, "convert")
    plain = peft_counterpart(record.methods[0], record.options)
    loads = "stock PEFT loads it too" if plain else "PEFT has no such format; fastpeft.load_adapter loads it"
    print(f"{len(report.adapted)} layers of {source} -> {target}: {record.methods[0]}; {loads}")


def _model(name: str) -> Any:
    """The model of its own architecture."""
    import transformers

    from fastpeft.job.errors import JobError

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        return cls.from_pretrained(name)
    except (OSError, ValueError, KeyError) as e:
        raise JobError(f"convert: --model {name}: {(str(e).strip().splitlines() or [type(e).__name__])[0]}") from None
