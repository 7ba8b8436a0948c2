"""Runs a file of kernel tests in Triton's interpreter: TRITON_INTERPRET=1 counts only before Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_interpreted(name: str, *, whole: bool = True) -> int:
    """pytest on tests/<name> in a process of its own; the number of tests that passed. Fails if any did not.

    whole: its tests marked accept too, by two processes: `make accept` runs one test at a time, `make test` two.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "TRITON_INTERPRET": "1"
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(TESTS / name),
        "-q",
        "-n",
        "2" if whole else "0",
        "-o",
        "addopts=-p no:cacheprovider" + ("" if whole else " -m 'not accept'"),
    ]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in last and "failed" not in last, last
    return int(re.search(r"(\d+) passed", last)[1])
