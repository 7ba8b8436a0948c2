"""Triton kernels and their launchers, without autograd; imports nothing of fastpeft. What is here: docs/KERNELS.md."""
