"""What several verbs ask in the same words: a method with its options, and which layers it adapts."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

_WORDS = {"true": True, "false": False, "null": None}

def add_method(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("method")
    how.add_argument(
        "--method", default="lora", help="a name that `fastpeft methods` lists; default: %(default)s"
    )
    how.add_argument("--rank", type=int)
    how.add_argument("--alpha", type=float)
    how.add_argument("--dropout", type=float)
    how.add_argument("--heads", metavar="N|auto", help="of hydralora; auto: as many as the training texts have kinds (finetune only)")
    how.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any option of the method; repeatable",
    )


def method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """--rank, --alpha, --dropout, --heads and every --option; values are Python literals, true, false or null, else text. JobError for one
    given twice."""
    given = [(name, getattr(arguments, name)) for name in ("rank", "alpha", "dropout")]
    if arguments.heads is not None:
        given.append(("heads", _value(arguments.heads)))
    return named_options(arguments.verb, "option", arguments.option, [(n, v) for n, v in given if v is not None])


def named_options(
    verb: str, flag: str, texts: Sequence[str], given: Sequence[tuple[str, Any]] = ()
) -> dict[str, Any]:
    """What the NAME=VALUE texts of a repeatable flag say, after what was given in another way."""
    from fastpeft.job.errors import JobError

    pairs = list(given)
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise JobError(f"{verb}: --{flag} {text!r}; it must be NAME=VALUE, such as rank=8.")
        pairs.append((name.strip(), _value(value.strip())))
    options: dict[str, Any] = {}
    for name, value in pairs:
        if name in options:
            raise JobError(f"{verb}: {flag.replace('-', ' ')} {name!r} was given twice.")
        options[name] = value
    return options


def _value(text: str) -> Any:
    """A Python literal; true, false and null, as JSON writes them; else the text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def target_modules(names: list[str] | None) -> str | tuple[str, ...]:
    """What --target-modules means to adapt: "all-linear", a regex after "re:", or names."""
    if not names or names == ["all-linear"]:
        return "all-linear"
    if len(names) == 1 and names[0].startswith("re:"):
        return names[0].removeprefix("re:")
    return tuple(names)
