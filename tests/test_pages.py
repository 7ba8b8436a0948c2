"""docs/methods: a page for every method, as bench.pages makes it, whose example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from bench.machine import ROOT
from bench.pages import FOLDER, escape, pages, prose
from fastpeft.registry import every_recipe

PAGES = pages()
NAMES = [r.name for r in every_recipe()]
# one of each kind in every run: no procedure, a procedure, an FFN, experts, one after the other
QUICK = {"lora", "rosa", "krona_b", "moa"}


def test_there_is_a_page_for_every_method_and_no_other():
    assert sorted(f.stem for f in FOLDER.glob("*.md")) == sorted(NAMES) == sorted(PAGES)


@pytest.mark.parametrize("name", NAMES)
def test_page_is_what_the_code_says(name):
    assert (FOLDER / f"{name}.md").read_text() == PAGES[name], "run: python -m bench.pages"


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_page_resolve(name):
    targets = re.findall(r"\]\(([^)#\s]+)\)", PAGES[name])
    assert len(targets) >= 2
    for target in targets:
        assert target.startswith("https://") or (FOLDER / target).exists(), target


def code_of(name):
    (code,) = re.findall(r"```python\n(.*?)```", (FOLDER / f"{name}.md").read_text(), re.S)
    assert f'fastpeft.adapt(model, "{name}"' in code
    return code


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.accept]) for n in NAMES])
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(name), f"{name}.md", "exec"), {"__name__": name})
    assert "trainable params" in capsys.readouterr().out
    assert (tmp_path / "my-adapter/adapter_model.safetensors").exists()


@pytest.mark.accept
def test_examples_need_nothing_from_the_tests(tmp_path):
    """One of them as a user would run it: a script in an empty folder."""
    pytest.importorskip("transformers")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code_of("lora")], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainable params" in done.stdout


def test_prose():
    assert prose("    a\n      b") == "```text\na\n  b\n```"
    assert prose("xi: the threshold;\n    more of it.\nBut: 3") == "xi: the threshold;\n  more of it.\nBut: 3"
    assert prose("xi: the threshold;\n    more of it.\nBut: 3", items=True) == "- xi: the threshold;\n  more of it.\n\nBut: 3"
    assert escape("a*b <c> `d*e` f_g _h") == "a\\*b \\<c> `d*e` f_g \\_h"
