"""The low-rank kernels under TRITON_INTERPRET=1, and what their operators say where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from interpreted import run_interpreted

ROOT = Path(__file__).parent.parent


def test_kernels_in_the_interpreter():
    assert run_interpreted("interpreted_lowrank.py") > 400


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
