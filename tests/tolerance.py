"""How close is close enough; no number here is picked by hand but the allowance for fp64 rounding."""

from __future__ import annotations

import torch

# fp64 results are equal up to the order of their sums: a few thousand units in the last place of the largest value
FP64_ROUNDING = 4096 * torch.finfo(torch.float64).eps


def assert_fp64(got, want, name="value"):
    """Two fp64 computations of the same formula agree up to rounding; NaN or another shape or dtype fails."""
    assert got is not None and want is not None, f"{name}: got {got}, want {want}"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == want.dtype == torch.float64, f"{name}: {got.dtype} against {want.dtype}"
    if got.numel() == 0:
        return
    error, size = (got - want).abs().max().item(), max(1.0, want.abs().max().item())
    assert error <= FP64_ROUNDING * size, f"{name}: differs by {error:.3e}, largest value {size:.3e}"


def assert_as_good(got, want64, plain, name="value"):
    """`got` is at most twice as far from the fp64 truth as the plain PyTorch composition in the same dtype, plus one rounding."""
    assert got.shape == want64.shape == plain.shape, f"{name}: {got.shape}, {want64.shape}, {plain.shape}"
    assert got.dtype == plain.dtype, f"{name}: {got.dtype}, the plain composition gives {plain.dtype}"
    error, reference = ((t.double() - want64).abs().max().item() for t in (got, plain))
    rounding = torch.finfo(got.dtype).eps * want64.abs().max().item()
    assert error <= 2 * reference + rounding, f"{name}: error {error:.3e}, plain PyTorch {reference:.3e}, rounding {rounding:.3e}"
