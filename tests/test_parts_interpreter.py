"""Kronecker and Khatri-Rao terms of whole layers on Triton kernels, under TRITON_INTERPRET=1."""

from __future__ import annotations

from interpreted import run_interpreted


def test_layers_in_the_interpreter():
    assert run_interpreted("interpreted_parts.py") == 10
