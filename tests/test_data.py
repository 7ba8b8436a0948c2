"""How many heads HydraLoRA should have for some texts; `fastpeft finetune --heads auto`."""

from __future__ import annotations

import json
import random

import pytest
from job_models import WORDS, tiny_model, write_rows

from fastpeft.cli import main
from fastpeft.data import _elbow, suggest_heads


def texts_of(kinds, each, seed=0):
    """Texts of as many kinds, each with words of its own."""
    draw = random.Random(seed)
    return [" ".join(f"k{kind}w{draw.randrange(12)}" for _ in range(15)) for kind in range(kinds) for _ in range(each)]


@pytest.mark.parametrize("rule", ["silhouette", "elbow"])
@pytest.mark.parametrize("kinds", [2, 3, 5])
def test_finds_the_kinds_of_text(kinds, rule):
    found = suggest_heads(texts_of(kinds, 20), rule=rule, most=8)
    if rule == "silhouette" or kinds > 2:  # two is an end of the line that an elbow is measured from
        assert found.heads == kinds
    assert list(found.silhouette) == list(found.inertia) == list(range(2, 9))
    assert max(found.silhouette, key=found.silhouette.get) == kinds
    assert all(-1 <= s <= 1 for s in found.silhouette.values()) and found.inertia[2] > found.inertia[8] >= 0


def test_is_a_function_of_texts_and_seed():
    texts = texts_of(4, 15)
    again = random.Random(1).sample(texts, len(texts)) + texts[:9]
    assert suggest_heads(texts) == suggest_heads(again)
    assert suggest_heads(texts, sample=30, seed=3) == suggest_heads(texts, sample=30, seed=3) != suggest_heads(texts, sample=30, seed=4)
    assert suggest_heads(texts, dimensions=None).heads == suggest_heads(texts, dimensions=5).heads == 4


def test_the_elbow_is_the_point_farthest_below_the_line():
    assert _elbow({2: 10.0, 3: 4.0, 4: 3.5, 5: 3.0}) == 3
    assert _elbow({2: 10.0, 3: 8.0, 4: 3.0, 5: 2.5}) == 4
    assert _elbow({2: 1.0}) == 2


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["a b", "c d", "e f", "g h"], {"rule": "gap"}, "rule='gap'; it must be one of 'silhouette', 'elbow'"),
        (["a b", "c d", "e f"], {}, "3 different texts"),
        (["a b"] * 9, {}, "1 different texts"),
        ("a text", {}, "sequence of strings"),
        ([1, 2, 3, 4], {}, "sequence of strings"),
        (["!", "?", ".", ","], {}, "no words to tell them apart"),
        (["ab cd", "cd  ab", "ab, cd", "cd. ab"], {}, "all alike in their words"),
        (["a b", "c d", "e f", "g h"], {"most": 1}, "most=1; it must be a whole number of at least 2"),
        (["a b", "c d", "e f", "g h"], {"dimensions": -1}, "dimensions=-1"),
        (["a b", "c d", "e f", "g h"], {"dimensions": 0}, "dimensions=0; it must be a whole number"),
    ],
)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_errors(texts, options, words):
    with pytest.raises(ValueError, match=words):
        suggest_heads(texts, **options)


@pytest.mark.accept
def test_in_the_job(tmp_path, capsys):
    model, _ = tiny_model(tmp_path / "bert", "bert")
    draw = random.Random(0)
    rows = [(" ".join(draw.choices(WORDS[8 * kind : 8 * kind + 8], k=6)), f"c{kind % 2}") for kind in range(3) for _ in range(16)]
    data = write_rows(tmp_path / "rows.csv", rows)
    asked = ["--model", str(model), "--data", str(data), "--epochs", "1", "--max-length", "12", "--threads", "1", "--no-compare"]
    asked += ["--output", str(tmp_path / "out"), "--target-modules", "query"]
    assert main(["finetune", *asked, "--method", "hydralora", "--rank", "2", "--heads", "auto"]) == 0
    assert "heads: 3 (mean silhouette" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["options"]["heads"] == 3
    assert main(["finetune", *asked, "--restart", "--method", "lora", "--heads", "2"]) == 2
    assert "option 'heads' does not exist for lora" in capsys.readouterr().err
