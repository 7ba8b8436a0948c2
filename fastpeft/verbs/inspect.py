"""`fastpeft inspect`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json

HELP = "what an adapter folder or file holds"
DESCRIPTION = "Print the config and the tensors of an adapter folder (fastpeft's or PEFT's) or a .safetensors file of kohya or LyCORIS. No model is needed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    from fastpeft.inspection import inspect
    from fastpeft.job.errors import JobError, said_by

    try:
        found = inspect(arguments.adapter)
    except (FileNotFoundError, ValueError) as e:
        words = str(e).removeprefix("load_adapter: ")
        raise JobError(said_by("inspect", JobError(words))) from None
    print(json.dumps(dataclasses.asdict(found)) if arguments.json else found)
