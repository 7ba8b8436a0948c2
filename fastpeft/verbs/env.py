"""`fastpeft env`: what is installed here, to paste into an issue."""

from __future__ import annotations

import argparse

HELP = "what is installed here, to paste into an issue"
DESCRIPTION = "Print versions, devices and what fastpeft was built with."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from fastpeft import env

    print(env.describe())
