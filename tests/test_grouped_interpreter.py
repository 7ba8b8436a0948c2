"""The grouped kernels under TRITON_INTERPRET=1."""

from __future__ import annotations

from interpreted import run_interpreted


def test_kernels_in_the_interpreter():
    assert run_interpreted("interpreted_grouped.py") > 40
