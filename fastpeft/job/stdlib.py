"""Real text that every machine has: docstrings of the running Python's standard library, labelled by their
package.

Nothing is imported: the sources are parsed with `ast`. What would give the label away, or make the test set
easy, is taken
out: every word or dotted name that contains the package's name becomes "it", exact duplicates are dropped
here, and near-copies are kept on one side of the split by fastpeft.job.split.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from fastpeft.job.errors import JobError

# eight packages that exist in every Python from 3.11 to 3.14 and have about as many documented objects each
PACKAGES = ("asyncio", "email", "importlib", "logging", "xml", "multiprocessing", "unittest", "http")
# what they are about, for a method that trains an expert for each
DOMAINS = {"concurrency": ("asyncio", "multiprocessing"), "formats": ("email", "http", "xml"), "tools": ("importlib", "logging", "unittest")}
MAX_CHARACTERS = 600
# "See it." says nothing about its package once the name is masked
MIN_WORDS = 3
MAX_PER_CLASS = 150

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def mask(text: str, package: str) -> str:
    """text with every word or dotted name that contains `package`, in any case, replaced by "it".

    "asyncio.Queue", "HTTPServer" and "xml.dom" go whole: a class name would give the label away as well as
    the package's.
    """
    return re.sub(rf"[\w.]*{re.escape(package)}\w*(?:\.\w+)*", "it", text, flags=re.IGNORECASE)


def docstrings(package: str, root: Path) -> list[str]:
    """Masked docstrings of one package under the library folder `root`, in file and source order; test
    folders are left out.

    Whitespace is collapsed, texts are cut at MAX_CHARACTERS, and texts under MIN_WORDS words are dropped.
    """
    texts = []
    for path in files(package, root):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, _DOCUMENTED) and (doc := ast.get_docstring(node)):
                texts += cleaned([doc], package)
    return texts


def files(package: str, root: Path) -> list[Path]:
    """The sources of one package under the library folder `root`, in order, without test folders."""
    return [p for p in sorted((root / package).rglob("*.py")) if not {"test", "tests"} & set(p.relative_to(root).parts)]


def cleaned(texts: Iterable[str], package: str, least: int = MIN_WORDS) -> list[str]:
    """The texts masked, white space collapsed, cut at MAX_CHARACTERS; those under `least` words are dropped."""
    found = (" ".join(mask(" ".join(t.split()), package).split())[:MAX_CHARACTERS].strip() for t in texts)
    return [t for t in found if len(re.findall(r"\w+", t)) >= least]


def harvest(
    *, per_class: int = MAX_PER_CLASS, seed: int = 0, root: Path | None = None
) -> tuple[list[str], list[str]]:
    """Texts and labels: at most `per_class` docstrings of each of PACKAGES, chosen by `seed`, no text twice.

    root: the library folder; None is the running Python's. A text found in two packages is kept for the first
    alone. Raises JobError where the library has no source files.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    texts: list[str] = []
    labels: list[str] = []
    for package in PACKAGES:
        fresh = []
        for text in docstrings(package, root):
            key = text.lower()
            if key not in seen:
                seen.add(key)
                fresh.append(text)
        if not fresh:
            raise JobError(
                f"finetune: no docstrings of {package!r} under {root}; the built-in data set needs a Python "
                "whose standard "
                "library lies there as .py files. Give your own data with --data."
            )
        chosen = sorted(
            random.Random(f"{seed} {package}").sample(range(len(fresh)), min(per_class, len(fresh)))
        )
        texts += [fresh[k] for k in chosen]
        labels += [package] * len(chosen)
    return texts, labels
