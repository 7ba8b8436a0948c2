"""`fastpeft methods`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json

HELP = "list every method with its options"
DESCRIPTION = "List every method with its paper, terms, options and defaults."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines")
    form.add_argument("--markdown", action="store_true", help="METHODS.md")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    import fastpeft
    from fastpeft.catalogue import markdown

    if arguments.markdown:
        print(markdown(), end="")
        return
    table = fastpeft.methods()
    print(json.dumps([dataclasses.asdict(m) for m in table], indent=2) if arguments.json else table)
