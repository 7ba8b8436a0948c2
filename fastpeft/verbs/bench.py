"""`fastpeft bench`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json

from fastpeft.verbs.options import add_method, method_options

HELP = "time one layer: frozen, under PEFT, under fastpeft"
DESCRIPTION = "Time one linear layer, forward and backward: frozen, under stock PEFT, under fastpeft."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=int, default=512, help="default: %(default)s")
    add("--in-features", type=int, default=768, help="default: %(default)s")
    add("--out-features", type=int, default=768, help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="default: %(default)s")
    add("--device", default="cpu", help="default: %(default)s")
    add("--rounds", type=int, default=30, help="default: %(default)s")
    add("--json", action="store_true", help="for machines")
    add_method(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    import torch

    from fastpeft.job.errors import JobError
    from fastpeft.job.layerbench import Shape, layer_bench

    numbers = ("tokens", "in_features", "out_features", "rounds")
    for name in numbers:
        if getattr(arguments, name) < 1:
            raise JobError(
                f"bench: --{name.replace('_', '-')} {getattr(arguments, name)}; it must be at least 1."
            )
    tokens, in_features, out_features, rounds = (getattr(arguments, name) for name in numbers)
    shape = Shape(tokens, in_features, out_features, getattr(torch, arguments.dtype), arguments.device)
    try:
        timings = layer_bench(shape, arguments.method, method_options(arguments), rounds=rounds)
    except (ValueError, TypeError, RuntimeError, AssertionError) as e:
        raise JobError(str(e).splitlines()[0]) from None
    if arguments.json:
        print(json.dumps([dataclasses.asdict(t) for t in timings]))
        return
    print(
        f"forward + backward, x [{tokens}, {in_features}] -> [{tokens}, {out_features}], {arguments.dtype}, "
        f"{rounds} rounds"
    )
    for t in timings:
        print(
            f"{t.name:9} {1000 * t.seconds:9.3f} ms   {t.ratio:5.2f} of frozen   saved beyond x "
            f"{t.saved_bytes:,d} bytes"
        )
