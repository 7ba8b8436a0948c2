"""METHODS.md against the code, and that what it claims of each method is what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_methods import METHODS, adapted

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


def test_counts_are_those_of_real_layers():
    """LoRA's formula at WIDTH, and at a width where a layer can be made, whatever a recipe counts."""
    assert trainable(RECIPES["lora"]) == 2 * 8 * WIDTH
    assert trainable(RECIPES["dora"]) == 2 * 8 * WIDTH + WIDTH


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.site == "linear"])
def test_to_lora_is_what_export_does(name, tmp_path):
    """An exportable method's LoRA is as good as its merged weights; the others refuse."""
    torch.manual_seed(0)
    model = adapted(name).eval()
    if METHODS[name].exportable:
        fastpeft.export_lora(model, tmp_path)
    else:
        with pytest.raises(ValueError, match="export_lora"):
            fastpeft.export_lora(model, tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.exportable])
def test_the_exported_lora_in_stock_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    from checks import MLP, rand

    model, x = adapted(name).eval(), rand(5, 16, grad=False)
    fastpeft.export_lora(model, tmp_path)
    plain = MLP()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k})
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(x), model(x), rtol=1e-9, atol=1e-10)
