"""The `fastpeft` command: one module of fastpeft.verbs each. Heavy libraries are imported by the verb that needs them, when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 1 for a job that had to stop, 130 for
    Ctrl-C."""
    from fastpeft.job.errors import JobError

    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except JobError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("error: interrupted; nothing was saved.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `fastpeft methods | head`: the reader left, which is its right
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    from fastpeft.verbs import (
        bench,
        compare,
        convert,
        env,
        finetune,
        inspect,
        laplace,
        methods,
        sequence,
        verify,
    )

    parser = argparse.ArgumentParser(prog="fastpeft", description="Adapter fine-tuning for PyTorch models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (finetune, compare, sequence, laplace, verify, inspect, convert, bench, methods, env):
        name = verb.__name__.rpartition(".")[2]
        verb.add_arguments(verbs.add_parser(name, help=verb.HELP, description=verb.DESCRIPTION))
    return parser
