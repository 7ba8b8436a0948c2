"""`fastpeft laplace`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

from fastpeft.job.calibrate import EVIDENCE, LAYERS, VALIDATION, Calibration
from fastpeft.job.errors import JobError, said_by
from fastpeft.job.settings import DTYPES, Settings

HELP = "a posterior over a saved classifier's adapter: calibrated predictions"
DESCRIPTION = (
    "Laplace-LoRA, after the training: fit a Gaussian posterior to a LoRA classifier on its training data, tune the prior precision, "
    "predict the evaluation data, and write laplace.json, reliability.png and laplace.safetensors. FOLDER is a report folder of "
    "`fastpeft finetune` (model, data and split come from its report), or an adapter folder that fastpeft or PEFT wrote, with --model and --data."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    d, s = Calibration(""), Settings()
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="report folder, or adapter folder")
    add("--output", metavar="DIR", help="where the results go (default: FOLDER; the posterior beside its adapter)")
    add(
        "--prior",
        type=_prior,
        default=d.prior,
        metavar=f"{EVIDENCE}|{VALIDATION}|NUMBER",
        help="how its precision is chosen: by the marginal likelihood, by held-out data (those of early stopping, else a fifth of "
        "the training data, held out of the fit), or given; default: %(default)s",
    )
    add(
        "--layers",
        choices=LAYERS,
        default=d.layers,
        help='what is random: the factors of all adapted layers, or of the one that runs last. A classifier\'s head trains whole and has no '
        'factors, so that "last" is the last adapted layer before it, where the paper has the language model\'s head; default: %(default)s',
    )
    add("--samples", type=int, default=d.samples, help="draws of the logits for mc; default: %(default)s")
    add("--n-kfac", type=_n_kfac, default=d.n_kfac, metavar="N|all", help="eigenvalues kept of a large side; default: %(default)s")
    add("--large", type=int, default=d.large, metavar="SIZE", help="a side is large above this size; default: %(default)s")
    add("--bins", type=int, default=d.bins, help="of confidence, for ECE and the diagram; default: %(default)s")
    add("--seed", type=int, default=d.seed, help="of the held-out share and the draws; default: %(default)s")
    add("--batch-size", type=int, default=d.batch_size, help="samples whose Jacobians are formed at once; default: %(default)s")
    add("--threads", type=int, help="default: every core that this process may use")
    add("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    add("--json", action="store_true", help="for machines: print laplace.json, and nothing else")
    lone = parser.add_argument_group("what an adapter folder without a report belongs to (as `fastpeft finetune` takes them)")
    lone.add_argument("--model", help="Transformers model: a folder or a name")
    lone.add_argument("--data", help="the rows that it was trained on")
    lone.add_argument(
        "--eval-data",
        help="rows that it was not trained on (default: the data's own held-out split, else the seeded one that finetune makes)",
    )
    lone.add_argument("--text-column", help=f"default: {s.text_column}")
    lone.add_argument("--label-column", help=f"default: {s.label_column}")
    lone.add_argument("--classes", nargs="+", metavar="LABEL", help="labels in the order of the model's outputs (default: sorted)")
    lone.add_argument("--max-length", type=int, help=f"tokens; default: {s.max_length}")
    lone.add_argument("--split-seed", type=int, help=f"default: {s.split_seed}")
    lone.add_argument("--dtype", choices=DTYPES, help=f"default: {s.dtype}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from fastpeft.job.laplace import as_table, calibrate

    given = {name: value for name, value in vars(arguments).items() if name in Calibration.__dataclass_fields__}
    given["classes"] = None if arguments.classes is None else tuple(arguments.classes)
    try:
        found = calibrate(
            Calibration(**given), say=partial(print, flush=True, file=sys.stderr if arguments.json else sys.stdout)
        )
    except JobError as e:
        raise JobError(said_by("laplace", e), code=e.code) from None
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2, allow_nan=False))
        return
    print(f"\n{as_table(found)}\n\nresults: {found.asked.target}/laplace.json, reliability.png")


def _prior(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _n_kfac(text: str) -> int | None:
    return None if text == "all" else int(text)
