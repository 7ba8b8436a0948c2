"""Triton kernels and their launchers; imports nothing of fastpeft. None has landed yet: docs/KERNELS.md."""
