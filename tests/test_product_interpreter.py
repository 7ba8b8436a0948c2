"""The base product with the low-rank share in it, under TRITON_INTERPRET=1."""

from __future__ import annotations

from interpreted import run_interpreted


def test_kernels_in_the_interpreter():
    assert run_interpreted("interpreted_product.py") == 4 * 2 * 2 * 3 * 2
