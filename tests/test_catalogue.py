"""METHODS.md against the code, and that what it claims of each method is what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import MLP, rand
from test_methods import METHODS, adapted
from tolerance import assert_fp64

import fastpeft
from fastpeft.catalogue import WIDTH, markdown, trainable
from fastpeft.registry import every_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {r.name: r for r in every_recipe()}


def test_methods_md_is_what_the_code_says():
    assert (ROOT / "METHODS.md").read_text() == markdown(), "run: fastpeft methods --markdown > METHODS.md"


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_its_notes(name):
    notes = METHODS[name].notes
    assert notes is not None and all((notes.formula, notes.defaults, notes.oracle))
    for text in (notes.formula, notes.defaults, notes.oracle, *notes.deviations):
        assert text == " ".join(text.split()) and "|" not in text.replace(" | ", "").replace("||", "")


def test_counts_at_width():
    assert trainable(RECIPES["lora"]) == 2 * 8 * WIDTH
    assert trainable(RECIPES["dora"]) == 2 * 8 * WIDTH + WIDTH


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.site == "linear" and not m.exportable])
def test_what_is_no_lora_is_not_exported(name, tmp_path):
    model = adapted(name).eval()
    with pytest.raises(ValueError, match="export_lora"):
        fastpeft.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.exportable])
def test_the_exported_lora_in_stock_peft(name, tmp_path):
    pytest.importorskip("peft")
    from peft_layers import peft_logits

    model, x = adapted(name).eval(), rand(5, 16, grad=False)
    fastpeft.export_lora(model, tmp_path)
    plain = MLP()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k})
    assert_fp64(peft_logits(plain, tmp_path, x), model(x))
