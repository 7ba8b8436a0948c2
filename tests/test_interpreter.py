"""Every kernel under TRITON_INTERPRET=1, and what the operators say where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from interpreted import TESTS, run_interpreted

ROOT = TESTS.parent
# tests/interpreted_<name>.py: at least so many tests, and so many with those that `make test` leaves to `make accept`
FILES = {
    "dora": (150, 370), "grouped": (47, 47), "hadamard": (112, 184), "kron": (56, 116), "lowrank": (320, 740), "nf4": (210, 210),
    "parts": (10, 10), "product": (96, 96), "seam": (65, 85), "sparse": (200, 290),
}  # fmt: skip


def test_no_file_is_forgotten():
    assert {p.stem.removeprefix("interpreted_") for p in TESTS.glob("interpreted_*.py")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name):
    assert run_interpreted(f"interpreted_{name}.py", whole=False) >= FILES[name][0]


@pytest.mark.accept
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter_whole(name):
    assert run_interpreted(f"interpreted_{name}.py") >= FILES[name][1]


def fresh(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_operators_imports_no_triton():
    fresh("""
        import sys, torch
        before = "triton" in sys.modules
        import fastpeft.ops.lowrank_triton, fastpeft.ops.rownorm_triton
        assert ("triton" in sys.modules) == before
        assert not [name for name in sys.modules if "triton_kernels" in name]
    """)


CALL = """
    import sys, torch
    {before}
    from fastpeft.ops import lowrank_triton as ops
    try:
        ops.down(torch.randn(3, 8), torch.randn(2, 8), torch.float32, seed=None, p=0.0, blocks=1)
    except RuntimeError as error:
        print(error)
"""


def test_without_triton_the_error_says_so():
    said = fresh(CALL.format(before='sys.modules["triton"] = None'))
    assert "need Triton, which is not installed" in said and "impl='torch'" in said


def test_a_cpu_tensor_is_refused_outside_the_interpreter():
    said = fresh(CALL.format(before=""))
    assert "lowrank down: x is on cpu" in said and "need a GPU" in said and "TRITON_INTERPRET=1" in said
