"""docs/TROUBLESHOOTING.md and docs/MIGRATION.md: every heading is a message of the source, every block runs."""

from __future__ import annotations

import ast
import functools
import re

import pytest
import torch
from torch import nn

import fastpeft
from bench.machine import ROOT

TROUBLE = (ROOT / "docs/TROUBLESHOOTING.md").read_text()
HEADINGS = re.findall(r"^### `(.+)`$", TROUBLE, re.M)
MIGRATION = (ROOT / "docs/MIGRATION.md").read_text()
HOLE = "\0"


def text_of(node: ast.expr) -> str | None:
    """A string expression with HOLE for what is filled in."""
    match node:
        case ast.Constant(value=str()):
            return node.value
        case ast.JoinedStr():
            return "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
        case ast.BinOp(op=ast.Add()):
            parts = text_of(node.left), text_of(node.right)
            return None if None in parts else "".join(parts)
    return None


def docstrings(tree: ast.Module) -> set[ast.expr]:
    owners = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    return {n.body[0].value for n in owners if n.body and isinstance(n.body[0], ast.Expr)}


@functools.cache
def messages() -> list[str]:
    """Every string of the package but docstrings."""
    found = []
    for file in sorted((ROOT / "fastpeft").rglob("*.py")):
        tree = ast.parse(file.read_text())
        skipped = docstrings(tree)
        texts = (text_of(n) for n in ast.walk(tree) if isinstance(n, ast.expr) and n not in skipped)
        found += [t for t in texts if t]
    return found


def occurs(heading: str) -> bool:
    """Whether some message has the heading's words in a row, with something filled in at every `...` but the ends."""
    words = heading.removesuffix(" ...").removeprefix("... ")
    pattern = re.compile(rf"[^\n]*?{HOLE}[^\n]*?".join(re.escape(w) for w in words.split("...")), re.S)
    return any(pattern.search(m) for m in messages())


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_a_message(heading):
    assert len(re.sub(r"\W", "", heading)) > 20, "too short to be told apart"
    assert occurs(heading), f"no message of the package says {heading!r}"


def test_headings_are_found_and_can_be_wrong():
    assert len(HEADINGS) == len(set(HEADINGS)) == TROUBLE.count("\n### ") > 40
    assert occurs("adapt: method ... does not exist; choose one of ...")
    assert not occurs("adapt: method ... is unknown; choose one of ...")
    assert not occurs("What a sharing method's holder is")  # a docstring's words would not count


def test_every_entry_says_something():
    for entry in TROUBLE.split("\n### ")[1:]:
        assert len(entry.split("\n## ")[0].split("\n", 1)[1].strip()) > 30, entry


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.out(self.up(x))


def adapted(method, **options):
    model = Narrow()
    fastpeft.adapt(model, method, target_modules=["up"], **options)
    return model


def tied():
    model = Narrow()
    model.twin = nn.Linear(16, 32)
    model.twin.weight = model.up.weight
    fastpeft.adapt(model, "lora", target_modules=["up"])
    fastpeft.merge(model)


# what a user does to read the message, by the heading's beginning
DONE = {
    "adapt: method": lambda: adapted("qlora"),
    "adapt: option": lambda: adapted("lora", r=8),
    "adapt: target_modules": lambda: fastpeft.adapt(Narrow(), "lora", target_modules=["query"]),
    "adapt: no layer is left": lambda: adapted("lora", exclude_modules=["up"]),
    "rank=...": lambda: fastpeft.adapt(Narrow(), "lora", target_modules=["up", "out"]),
    "adapt: ... is adapted already": lambda: fastpeft.adapt(adapted("lora"), "lora"),
    "adapt: ... replaces the base weight of ..., and so": lambda: adapted("loftq", quantize="nf4"),
    "training needs its procedure": lambda: adapted("galore").train()(torch.randn(3, 16)),
    "rosa: ... has no mask": lambda: adapted("rosa", density=0.1).train()(torch.randn(3, 16)),
    "adapted_linear: x is ... but the base": lambda: adapted("lora")(torch.randn(3, 16, dtype=torch.float64)),
    "so no single weight": lambda: fastpeft.merge(adapted("hydralora")),
    "merge: ... shares its weight": tied,
    "this ... was not adapted": lambda: fastpeft.merge(Narrow()),
    "the base weight was replaced": lambda: fastpeft.unload(adapted("lora", quantize="nf4", keep_base=False)),
    "export_lora: ... has a": lambda: fastpeft.export_lora(adapted("random_masking"), "nowhere"),
    "accelerate: this": lambda: fastpeft.accelerate(Narrow()),
}


@pytest.mark.parametrize("start", DONE)
def test_what_leads_to_the_message(start):
    (heading,) = [h for h in HEADINGS if h.startswith(start)]
    words = heading.removesuffix(" ...").removeprefix("... ").split("...")  # what is between the holes
    with pytest.raises((ValueError, TypeError, RuntimeError), match=".*?".join(re.escape(w) for w in words)):
        DONE[start]()


def blocks(section: str) -> list[str]:
    """The Python of a section that is ours to run."""
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", MIGRATION, re.M | re.S)
    found = re.findall(r"(<!-- the other side -->\n)?```python\n(.*?)```", body, re.S)
    return [code for other, code in found if not other]


def test_every_block_is_in_a_section_that_runs():
    sections = re.findall(r"^## (.*)$", MIGRATION, re.M)
    assert sections == ["From PEFT", "From Unsloth", "From LyCORIS"]
    assert sum(len(blocks(s)) for s in sections) + MIGRATION.count("<!-- the other side -->") == MIGRATION.count("```python")


@pytest.mark.parametrize(("section", "needs"), [("From PEFT", "peft"), ("From Unsloth", "transformers"), ("From LyCORIS", "lycoris")])
def test_migration_runs(section, needs, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "migration"}
    for code in blocks(section):
        exec(compile(code, f"MIGRATION.md, {section}", "exec"), scope)
    assert any(tmp_path.iterdir())
