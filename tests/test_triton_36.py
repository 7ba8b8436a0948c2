"""The kernels under Triton 3.6.0 as well as under the newest Triton; run by `make accept`, fetches both from PyPI.

Triton and a NumPy go into a folder that precedes the installed ones on the path: a venv of a venv would not see torch.
NumPy, because 3.6's interpreter turns a loop bound of one element into an int, which NumPy 2.4 refuses.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreted import TESTS, run_interpreted
from test_interpreter import FILES

pytestmark = pytest.mark.accept

VERSION = "3.6.0"
PACKAGES = (f"triton=={VERSION}", "numpy<2.4")
FAMILIES = ("lowrank", "dora", "sparse", "kron", "hadamard", "nf4", "grouped")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with Triton 3.6.0 and NumPy; deleted afterwards, it holds 700 MB."""
    folder = tmp_path_factory.mktemp("triton")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, "-c", str(TESTS.parent / "constraints.txt"), *PACKAGES], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def older(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started by the test get Triton 3.6.0 and an empty cache: nothing built by another Triton counts."""
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=os.pathsep)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = "import triton; print(triton.__version__, triton.__file__)"
    assert run("-c", code).split() == [VERSION, str(packages / "triton" / "__init__.py")]


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compile_gate(family: str, tmp_path: Path) -> None:
    """Every tile for every target, and that the gate sees what it forbids."""
    said = run("-m", "pytest", str(TESTS / f"test_compile_gate_{family}.py"), "-q", "-n", "2", "-o", "addopts=-p no:cacheprovider")
    last = said.strip().splitlines()[-1]
    assert re.fullmatch(r"\d+ passed(, \d+ warnings?)? in .*", last), last
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_interpreter(family: str) -> None:
    """The sweeps thinned, as in `make test`; whole ones run under the newest Triton."""
    assert run_interpreted(f"interpreted_{family}.py", whole=False) >= FILES[family][0]
