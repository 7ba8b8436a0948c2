"""docs/MATRIX.md against runs: every cell is what its probe gives, and the page is what bench.matrix would write of its cells."""

from __future__ import annotations

import pytest
from probes import FAST, PROBES, Outcome, clause, outcome

from bench.matrix import COLUMNS, FILE, read, render
from fastpeft.registry import every_recipe

TEXT = FILE.read_text()
CELLS, WRITTEN = read(TEXT)
NAMES = [r.name for r in every_recipe()]


def claimed(name, column):
    return Outcome(*CELLS[name][column])


def test_every_method_has_a_row_and_every_probe_a_column():
    assert list(CELLS) == NAMES
    assert all(list(row) == list(COLUMNS) for row in CELLS.values())
    assert set(COLUMNS) == {*PROBES, "FSDP2"}


def test_the_page_is_made_of_its_cells():
    assert WRITTEN and render(CELLS, WRITTEN) == TEXT, "run: python -m bench.matrix"


@pytest.mark.parametrize("column", list(FAST))
@pytest.mark.parametrize("name", NAMES)
def test_cell(name, column):
    assert claimed(name, column) == outcome(name, FAST[column]), "run: python -m bench.matrix"


@pytest.mark.accept
@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    assert claimed(name, "compile") == outcome(name, PROBES["compile"])


@pytest.mark.accept
def test_fsdp2(tmp_path):
    import sharding

    found = sharding.outcomes(NAMES, tmp_path)
    for name in NAMES:
        assert claimed(name, "FSDP2") == found[name], name


def test_a_defect_is_no_cell():
    """Neither a wrong number nor an error of somebody else's becomes a footnote."""

    def wrong(name):
        raise AssertionError("y: differs")

    def theirs(name):
        raise RuntimeError("size mismatch")

    for probe, error in ((wrong, AssertionError), (theirs, RuntimeError)):
        with pytest.raises(error):
            outcome("lora", probe)


def test_clause():
    assert clause("adapt: lora has no x; choose y.", "lora") == "adapt: METHOD has no x"
    assert clause("adapt: lora_fa trains 4 (up.weight, ...), not lora.", "lora") == "adapt: lora_fa trains 4 (up.weight, ...), not METHOD"


@pytest.mark.parametrize("cell", ["maybe", "yes (dropout)", "no", "no[^x]"])
def test_a_cell_that_says_nothing_is_refused(cell):
    row = f"| [lora](methods/lora.md) | {' | '.join([cell] * len(COLUMNS))} |"
    head = f"| method | {' | '.join(COLUMNS)} |\n{'| --- ' * (len(COLUMNS) + 1)}|\n"
    with pytest.raises(ValueError, match="is no cell"):
        read(head + row)
