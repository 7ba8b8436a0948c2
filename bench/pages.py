"""docs/methods/<method>.md, a page per recipe: python -m bench.pages writes them all, and METHODS.md.

A page holds what the code says: the module's docstring, Notes, options, parameters, file format and procedure, and an example
(bench/examples.py). tests/test_pages.py holds the files against this and runs the examples.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from bench.examples import example
from bench.machine import ROOT
from fastpeft import train
from fastpeft.adapter import build_alone
from fastpeft.base import Plain
from fastpeft.catalogue import WIDTH, MethodInfo, markdown, methods, trainable
from fastpeft.registry import Recipe, Site, every_recipe

FOLDER = ROOT / "docs/methods"


def pages() -> dict[str, str]:
    """method -> the text of its page."""
    recipes = {r.name: r for r in every_recipe()}
    return {m.name: page(m, recipes[m.name]) for m in methods()}


def page(m: MethodInfo, r: Recipe) -> str:
    """The page of one recipe."""
    notes = r.notes
    assert notes is not None, f"{m.name} has no NOTES"
    module = inspect.getmodule(r.cls)
    paragraphs = (inspect.getdoc(module) or "").split("\n\n")
    text = [p for p in paragraphs if not re.match(r"Papers?: ", p)]
    about = [f"A recipe of `{r.cls.__module__.rpartition('.')[2]}` with `{_call(dict(r.defaults))}`; what follows is said of that.", ""]
    source = f"fastpeft/method/{r.cls.__module__.rpartition('.')[2]}.py"
    lines = [
        f"# {m.name}",
        "",
        f"`{notes.formula}`",
        "",
        *(about if r.defaults else []),
        *[line for p in text for line in (prose(p), "")],
        *_glance(m, r),
        f"- Source, from which `python -m bench.pages` made this page: [{source}](../../{source}).",
        "",
        "## Use",
        "",
        f"```python\n{example(m, r)}```",
        "",
        "## Options",
        "",
        *_options(r.cls.__init__, m.options),
        "",
        f"Defaults: {escape(notes.defaults)}.",
        "",
        "## Parameters",
        "",
        f"On one {WIDTH} x {WIDTH} {'layer' if m.site == 'linear' else 'FFN'} with the defaults.",
        "",
        *_parameters(r),
        "",
        *_procedure(r),
        "## Held against",
        "",
        f"{escape(notes.oracle)}.",
        "",
    ]
    if notes.deviations:
        lines += ["## Where it differs", "", *(f"- {escape(t)}" for t in notes.deviations), ""]
    return "\n".join(lines)


def _glance(m: MethodInfo, r: Recipe) -> list[str]:
    """What one wants to know first."""
    on = "linear layers" if m.site == "linear" else "beside a whole feed-forward block"
    paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", m.paper)
    return [
        f"- Paper: {paper}.",
        f"- Sits on: {on}. Terms: {', '.join(f'`{t}`' for t in m.terms) or 'none'}.",
        f"- Trains {trainable(r):,d} numbers of a {WIDTH} x {WIDTH} layer with the defaults, shared ones included.",
        f"- `merge`: {'yes' if m.mergeable else 'no'}. `export_lora` as a plain LoRA: {'yes' if m.exportable else 'no'}.",
        f"- {_peft(m, r)}",
        "- With bias, dropout, a 4-bit base, a second adapter, compile, FSDP2, checkpointing: [MATRIX.md](../MATRIX.md).",
    ]


def _peft(m: MethodInfo, r: Recipe) -> str:
    """What PEFT makes of it."""
    form = r.cls.PEFT
    if form is None:
        plain = "; `export_lora` writes a `LoraConfig` folder that PEFT loads" if m.exportable else ""
        return f"PEFT has no such format: `save_adapter` writes a folder of fastpeft's own{plain}."
    keys = ", ".join(f"`{ours}` as `{theirs}`" for ours, theirs in form.keys.items())
    if form.config(r.options) is None:
        return f"`save_adapter` writes PEFT's `{form.config_class}` where that can hold the options ({keys}), not with the defaults."
    return f"`save_adapter` writes PEFT's `{form.config_class}` ({form.peft_type}), which PEFT loads: {keys}."


def _options(function: Any, options: dict[str, Any]) -> list[str]:
    """A table of these options with the types of the function's signature."""
    kinds = {n: p.annotation for n, p in inspect.signature(function).parameters.items()}
    rows = [f"| `{n}` | `{str(kinds[n]).replace('|', 'or')}` | `{value!r}` |" for n, value in options.items()]
    return ["| option | type | default |", "| --- | --- | --- |", *rows] if rows else ["None."]


def _parameters(r: Recipe) -> list[str]:
    base = Plain(torch.empty(WIDTH, WIDTH, device="meta"))
    found: dict[str, tuple[tuple[int, ...], str, bool]] = {}
    with torch.random.fork_rng(devices=[]):
        if r.site == "linear":
            adapter, holders = build_alone("example", base, [r], {})
            (method,) = adapter.methods().values()
        else:
            method, holders = r.build(Site("example", base, torch.float32), {}), torch.nn.ModuleDict()
    for path, owner in ((f"adapter.{r.name}.", method), *((f"adapter_shared.{k}.", h) for k, h in holders.items())):
        roles = getattr(owner, "ROLES", {})
        for n, p in owner.named_parameters():
            role = roles.get(n.split(".")[0], "")
            found[path + n] = (tuple(p.shape), role, p.requires_grad)
    rows = [f"| `{n}` | `{list(s)}` | {role} | {'yes' if own else 'no'} |" for n, (s, role, own) in found.items()]
    if not rows:
        return ["None beside the model's own."]
    return ["| name | shape | role | trains |", "| --- | --- | --- | --- |", *rows]


def _procedure(r: Recipe) -> list[str]:
    if not r.cls.PROCEDURE:
        return []
    cls = getattr(train, r.cls.PROCEDURE)
    own = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
    text = [line for p in (inspect.getdoc(cls) or "").split("\n\n") for line in (prose(p, items=True), "")]
    shown = {n: _name(v) for n, v in own.items()}
    return [f"## Procedure: train.{r.cls.PROCEDURE}", "", *text, *_options(cls.__init__, shown), ""]


class _Named:
    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _name(value: Any) -> Any:
    """The value, or a partial function as it would be written: its repr holds an address."""
    func = getattr(value, "func", None)
    return value if func is None else _Named(f"{func.__name__} with {_call(value.keywords)}")


def _call(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in options.items())


def prose(paragraph: str, items: bool = False) -> str:
    """A paragraph of a docstring as Markdown, an indented one as it is; items: a line `name: what it is` begins an item."""
    lines = paragraph.split("\n")
    if all(s.startswith("    ") for s in lines):
        return "\n".join(["```text", *(s[4:] for s in lines), "```"])
    found: list[str] = []
    inside = False
    for line in lines:
        if items and re.match(r"[a-z_]\w*(, \w+)*: \S", line):
            found.append(f"- {escape(line)}")
            inside = True
        elif line.startswith(" "):
            found.append(f"  {escape(line.strip())}")
        else:
            found += [""] * inside + [escape(line)]
            inside = False
    return "\n".join(found)


def escape(text: str) -> str:
    """Characters that Markdown would read, outside of code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*<]|(?<!\w)_|_(?!\w))", r"\\\1", p) for p in parts[::2]]
    return "`".join(parts)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    found = pages()
    for name, text in found.items():
        (FOLDER / f"{name}.md").write_text(text)
    for file in FOLDER.glob("*.md"):
        if file.stem not in found:
            file.unlink()
    (ROOT / "METHODS.md").write_text(markdown())
    print(f"wrote {len(found)} pages to {FOLDER}, and METHODS.md")


if __name__ == "__main__":
    main()
