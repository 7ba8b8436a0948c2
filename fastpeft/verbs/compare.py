"""`fastpeft compare`: its arguments, and what it prints."""

from __future__ import annotations

import argparse

HELP = "run recipes on the main job, each at its best learning rate, and draw them beside each other"
DESCRIPTION = (
    "Run recipes on the main job: pilot runs with every rate of one grid on a seed that is not reported, then the best rate on the reported "
    "seeds, beside the frozen model and PEFT's LoRA. Writes report.md, pareto.png (accuracy against kept memory), pareto_time.png (against "
    "step time), curves.png, rates.png and a result file per run in the schema of PEFT's method comparison. The same command continues what was stopped, and makes "
    "no finished run again; recipes, seeds and rates may be added to a folder."
)
EXAMPLES = """examples:
  fastpeft compare                                        every recipe, seeds 0 1 2 (hours on one core)
  fastpeft compare --recipes lora,dora,melora --seeds 0 1 --grid 1e-3 4e-3 --out three
  fastpeft compare --recipes lora,dora --quick            does it run? (one epoch, few texts, one seed)
  fastpeft compare --out three --recipes lora,dora,melora --timings   step times; with nothing else on the machine
"""
QUICK_GRID, SEEDS, QUICK_SEEDS = (2e-3, 8e-3), (0, 1, 2), (0,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments, and what it runs."""
    from fastpeft.job.compare import GRID, PILOT_SEED
    from fastpeft.job.settings import DTYPES, Settings

    d = Settings()
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--recipes", metavar="A,B,...", help="names that `fastpeft methods` lists (default: all)")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="reported ones; default: 0 1 2, with --quick 0")
    add("--grid", type=float, nargs="+", metavar="RATE", help=f"learning rates to choose from; default: {' '.join(f'{r:g}' for r in GRID)}")
    add("--pilot-seed", type=int, default=PILOT_SEED, help="that rates are chosen on; default: %(default)s")
    add("--out", default="fastpeft-compare", metavar="DIR", help="report folder; default: %(default)s")
    what = parser.add_argument_group("what to learn, as in `fastpeft finetune`")
    what.add_argument("--model", help="Transformers model: a folder or a name (default: the carried encoder)")
    what.add_argument("--data", help="classified texts (default: docstrings of the standard library)")
    what.add_argument("--eval-data", help="held-out rows (default: the data's own held-out split, else a seeded one)")
    for column in ("text", "label", "domain"):
        what.add_argument(f"--{column}-column", default=getattr(d, f"{column}_column"), help="default: %(default)s")
    add("--epochs", type=int, default=d.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=d.batch_size, help="default: %(default)s")
    add("--max-length", type=int, default=d.max_length, help="tokens; default: %(default)s")
    add("--weight-decay", type=float, default=d.weight_decay, help="default: %(default)s")
    add("--split-seed", type=int, default=d.split_seed, help="of the split, the same for all seeds; default: %(default)s")
    add("--threads", type=int, help="default: every core that this process may use")
    add("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    add("--dtype", choices=DTYPES, default=d.dtype, help="of the model's weights; default: %(default)s")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--timings", action="store_true", help="do not train: time a step of each recipe, and complete the report in --out")
    instead.add_argument("--draw", action="store_true", help="run nothing: make the report of what --out holds")
    add("--rounds", type=int, default=15, help="of --timings; default: %(default)s")
    add("--json", action="store_true", help="print the rows for machines; progress goes to stderr")
    add("--quick", action="store_true", help="one epoch, few built-in examples, two rates, one seed: does everything work?")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the comparison and print its table. Raises JobError."""
    import contextlib
    import sys

    from fastpeft.job.compare import GRID, Plan, as_json, compare
    from fastpeft.job.compare_page import as_text
    from fastpeft.job.errors import JobError
    from fastpeft.job.settings import Settings

    if arguments.rounds < 1:
        raise JobError(f"compare: --rounds {arguments.rounds}; it must be at least 1.")
    same = ("model", "data", "eval_data", "text_column", "label_column", "domain_column", "batch_size", "max_length", "weight_decay")
    same += ("split_seed", "threads", "device", "dtype", "quick")
    settings = Settings(
        **{name: getattr(arguments, name) for name in same},
        epochs=1 if arguments.quick else arguments.epochs,
        seeds=tuple(arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)),
        output=arguments.out,
    )
    names = None if arguments.recipes is None else tuple(n.strip() for n in arguments.recipes.split(",") if n.strip())
    if names == ():
        raise JobError("compare: --recipes names none; leave it out for all.")
    grid = tuple(arguments.grid or (QUICK_GRID if arguments.quick else GRID))
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        rows = compare(Plan(settings, names, grid, arguments.pilot_seed), timings=arguments.timings, rounds=arguments.rounds, draw=arguments.draw)
    print(as_json(rows) if arguments.json else f"\n{as_text(rows)}\n\nreport: {settings.output}/report.md")
