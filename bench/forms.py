"""Three domains of text from the standard library, by form: docstrings, comments and code, each with classes of its own.

The packages are those of the main job, three to a domain, and a label is the number of a text's package within its domain: the same three
answers mean something else in each. Names of the package are masked as in the main job, texts are cut at the same length, near-copies stay
on one side of the split. Comments keep their "#", as they stand in the file; code is a function without its docstring.
"""

from __future__ import annotations

import ast
import io
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from fastpeft.job.data import Texts, taken
from fastpeft.job.split import near_copies, split
from fastpeft.job.stdlib import MAX_PER_CLASS, cleaned, docstrings, files

DOMAINS = ("docstrings", "comments", "code")
CLASSES = {
    "docstrings": ("email", "importlib", "unittest"),
    "comments": ("http", "logging", "multiprocessing"),
    "code": ("asyncio", "http", "xml"),
}
MIN_CODE_WORDS = 12


def comments(package: str, root: Path) -> list[str]:
    """Comments that stand on lines of their own, consecutive ones as one."""
    return [t for path in files(package, root) for t in cleaned(_blocks(path), package)]


def _blocks(path: Path) -> Iterator[str]:
    lines: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            if lines and token.start[0] != last + 1:
                yield " ".join(lines)
                lines = []
            lines.append(token.string)
            last = token.start[0]
    if lines:
        yield " ".join(lines)


def code(package: str, root: Path) -> list[str]:
    """Bodies of functions, without docstrings and comments."""
    return [t for path in files(package, root) for t in cleaned(_bodies(path), package, MIN_CODE_WORDS)]


def _bodies(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield "\n".join(map(ast.unparse, body))


READERS: dict[str, Callable[[str, Path], list[str]]] = {"docstrings": docstrings, "comments": comments, "code": code}


def load(*, per_class: int = MAX_PER_CLASS, seed: int = 0, share: float = 0.2) -> Texts:
    """At most `per_class` texts of each class of each domain, chosen by `seed`, no text twice."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    labels: list[int] = []
    domains: list[int] = []
    seen: set[str] = set()
    for d, domain in enumerate(DOMAINS):
        for y, package in enumerate(CLASSES[domain]):
            fresh = [t for t in dict.fromkeys(READERS[domain](package, root)) if t.lower() not in seen]
            own = random.Random(f"{seed} {domain} {package}").sample(fresh, min(per_class, len(fresh)))
            seen |= {t.lower() for t in own}
            texts, labels, domains = texts + own, labels + [y] * len(own), domains + [d] * len(own)
    train, held = split(near_copies(texts), list(zip(domains, labels, strict=True)), share=share, seed=seed)
    sides = [[taken(values, index) or [] for index in (train, held)] for values in (texts, labels, domains)]
    answers = [f"answer {k}" for k in range(3)]
    note = f"{', '.join(DOMAINS)} of the standard library"
    return Texts(sides[0][0], sides[0][1], sides[1][0], sides[1][1], answers, note, list(DOMAINS), sides[2][0], sides[2][1])  # type: ignore[arg-type]
