"""DoRA's norm kernel under TRITON_INTERPRET=1."""

from __future__ import annotations

from interpreted import run_interpreted


def test_kernel_in_the_interpreter():
    assert run_interpreted("interpreted_dora.py") > 300
