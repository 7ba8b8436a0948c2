"""The low-rank products in C++ (csrc/lowrank.h), registered in torch.library; fastpeft.ops.lowrank decides when they run.

Factors come as they are, A [r, c] or [n, r, c], or as B [c, r] or [n, c, r] with `up`; their constants are folded in while
they are read, in fp32. They are rounded to x's dtype only where the processor multiplies bfloat16 itself. Operators without
an autograd formula, with fakes; only the seam's Functions call them. Plain tensors skip the dispatcher, which costs as much
as a small product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from fastpeft.ops.dropout import _EXTENSION, _threshold, backend
from fastpeft.ops.library import register

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_BUILT = hasattr(_EXTENSION, "lowrank_read")
_BF16 = _BUILT and _EXTENSION.build_info()["bf16_products"]
_NO_FACTOR = (0, 0, 0)
OWN = (Tensor, Parameter)
# numbers of x below which one C++ product costs as much as torch's; several in one call are always worth it
SMALL = 1 << 15


def runs(x: Tensor, numbers: int | None = None) -> bool:
    """Whether the C++ products take x [rows, cols]: on the CPU, of rows of stride one, at least `numbers` large, not traced."""
    # (first: a graph must not be for one side of the threshold)
    if not _BUILT or torch.compiler.is_compiling() or x.numel() < (SMALL if numbers is None else numbers):
        return False
    if x.device.type != "cpu" or x.dtype not in DTYPES or x.stride(1) != 1:
        return False
    return backend() != "torch"


def writes(u: Tensor, cols: int, blocks: int, p: float, z: Tensor | None = None) -> bool:
    """Whether they write [t, cols] of u's dtype, fresh or onto z: with a mask or blocks; else BLAS is as quick."""
    if (blocks == 1 and p == 0.0) or not runs(u, 0) or u.shape[0] * cols < SMALL:
        return False
    return z is None or (z.dtype is u.dtype and z.stride(1) == 1)


def gains(z: Tensor, v: Tensor, blocks: int) -> bool:
    """Whether they write z and gain * z in one pass: with blocks, in bfloat16 where it is multiplied, or little of it."""
    if v.dtype is not z.dtype or not runs(z, 0):
        return False
    return blocks > 1 or z.numel() < SMALL or (_BF16 and z.dtype is torch.bfloat16)


def read(
    x: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
    *,
    up: bool = False,
    scale: float = 1.0,
    gain: Tensor | None = None,
    need_u: bool = True,
    w: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over x [t, n * c]: u = drop(x) F^T [t, n * r] in `dtype`, the gradient of F for u's gradient w in the factor's
    shape, and dgain = the sum over t of x * z [n * c]; the last two in fp32. F is scale * gain * factor, gain [n * c] or None;
    with `up` the factor is [c, r] or [n, c, r]. w [t, n * r] has `dtype`, z x's. What is not asked for is None or empty."""
    factor = factor if factor.dtype is torch.float32 else factor.float()
    gain = gain if gain is None or (gain.dtype is torch.float32 and gain.is_contiguous()) else gain.float().contiguous()
    run = _read_into if _plain(x, factor) else _READ
    return run(x, factor, dtype, up, scale, gain, need_u, w, seed, p, z)


def write(
    z: Tensor, u: Tensor, factor: Tensor, *, up: bool = False, scale: float = 1.0, seed: Tensor | None = None, p: float = 0.0
) -> None:
    """z += scale * mask * (u F) in place; z [t, n * c], u [t, n * r] of z's dtype, F the factor or with `up` its transpose."""
    _WRITE(z, u, factor.float(), up, scale, seed, p)


def write_gain(z: Tensor, u: Tensor, B: Tensor, scale: float, gain: Tensor, bias: Tensor | None) -> Tensor:
    """z += scale * u B^T in place, and y = gain * z + bias [t, n * c] in z's dtype; gain, bias [n * c]."""
    bias = None if bias is None else bias.float().contiguous()
    run = _run_write_gain if _plain(z, B) else _WRITE_GAIN
    return run(z, u, B.float(), scale, gain.float().contiguous(), bias)


def scale_columns(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain * z + bias, [t, c] in z's dtype; gain, bias [c] in any dtype."""
    return _SCALE(z, gain.float().contiguous(), None if bias is None else bias.float().contiguous())


def fresh(
    u: Tensor,
    factor: Tensor,
    *,
    up: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """scale * mask * (u F) + bias, [t, n * c] in u's dtype; bias [n * c]."""
    return _FRESH(u, factor.float(), up, scale, None if bias is None else bias.float().contiguous(), seed, p)


def norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale B A||^2 of each row, [o] in fp32; W [o, c], A [r, c], B [o, r]."""
    return _NORM(W, A.float().contiguous(), B.float().contiguous(), scale)


def inverse_norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """1 / ||W + scale B A|| of each row and 0, [o] in fp32; where that norm is zero, 0 and 1."""
    run = _run_inverse if _plain(W, A) else _INVERSE
    return run(W, A.float().contiguous(), B.float().contiguous(), scale)


def _plain(x: Tensor, factor: Tensor) -> bool:
    """Whether these are torch's own tensors and no subclass that must see the call (fake, functional, distributed)."""
    return type(x) in OWN and type(factor) in OWN


def _mask(seed: Tensor | None, p: float) -> tuple[bool, int, int, float]:
    if p == 0.0 or seed is None:
        return False, 0, 0, 1.0
    return True, int(seed.item()) & 0xFFFFFFFFFFFFFFFF, _threshold(p), 1.0 / (1.0 - p)


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _layout(factor: Tensor, up: bool) -> tuple[int, int, int, tuple[int, int, int]]:
    """n, r, c and the strides of n, r and c of A, or with `up` of B."""
    if factor.dim() == 2:
        (r, c), (sr, sc), n, sn = factor.shape, factor.stride(), 1, factor.numel()
    else:
        (n, r, c), (sn, sr, sc) = factor.shape, factor.stride()
    return (n, c, r, (sn, sc, sr)) if up else (n, r, c, (sn, sr, sc))


def _run_read(x, factor, dtype, up, scale, gain, need_u, w, seed, p, z):
    found = _read_into(x, factor, dtype, up, scale, gain, need_u, w, seed, p, z)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _read_into(x, factor, dtype, up, scale, gain, need_u, w, seed, p, z):
    """u, g, dgain; None for what is not asked for."""
    n, r, c, strides = _layout(factor, up)
    u = g = dgain = None
    u_at = w_at = w_stride = g_at = z_at = z_stride = dgain_at = 0
    if need_u:
        u = x.new_empty((x.shape[0], n * r), dtype=dtype)
        u_at = u.data_ptr()
    if w is not None:
        g = factor.new_empty(factor.shape)
        if factor.stride() != g.stride():
            factor = factor.contiguous()
            strides = _layout(g, up)[3]
        w = w if w.stride(1) == 1 else w.contiguous()
        w_at, w_stride, g_at = w.data_ptr(), w.stride(0), g.data_ptr()
    if z is not None:
        dgain = factor.new_empty(x.shape[1])
        z_at, z_stride, dgain_at = z.data_ptr(), z.stride(0), dgain.data_ptr()
    _EXTENSION.lowrank_read(
        x.data_ptr(), x.stride(0), DTYPES[x.dtype], x.shape[0], n, c, r, *_mask(seed, p),
        factor.data_ptr() if need_u else 0, strides, scale, 0 if gain is None else gain.data_ptr(),
        u_at, w_at, w_stride, g_at, z_at, z_stride, dgain_at, DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return u, g, dgain


def _fake_read(x, factor, dtype, up, scale, gain, need_u, w, seed, p, z):
    n, r, _, _ = _layout(factor, up)
    return (
        x.new_empty((x.shape[0], n * r) if need_u else 0, dtype=dtype),
        x.new_empty(factor.shape if w is not None else 0, dtype=torch.float32),
        x.new_empty(x.shape[1] if z is not None else 0, dtype=torch.float32),
    )


def _run(z, u, factor, up, scale, seed, p, is_fresh, bias, gain, y) -> None:
    n, r, c, strides = (1, 0, z.shape[1], _NO_FACTOR) if factor is None else _layout(factor, up)
    u = u if u is None or u.stride(1) == 1 else u.contiguous()
    _EXTENSION.lowrank_write(
        z.data_ptr(), z.stride(0), DTYPES[z.dtype], z.shape[0], n, c, r, *_mask(seed, p), _at(factor), strides, scale,
        _at(u), 0 if u is None else u.stride(0), is_fresh, _at(bias), _at(gain), _at(y), torch.get_num_threads(),
    )  # fmt: skip


def _run_write(z, u, factor, up, scale, seed, p):
    _run(z, u, factor, up, scale, seed, p, False, None, None, None)


def _run_write_gain(z, u, B, scale, gain, bias):
    y = z.new_empty(z.shape)
    _run(z, u, B, True, scale, None, 0.0, False, bias, gain, y)
    return y


def _run_scale(z, gain, bias):
    y = z.new_empty(z.shape)
    _run(z, None, None, False, 1.0, None, 0.0, False, bias, gain, y)
    return y


def _run_fresh(u, factor, up, scale, bias, seed, p):
    z = _fake_fresh(u, factor, up, scale, bias, seed, p)
    _run(z, u, factor, up, scale, seed, p, True, bias, None, None)
    return z


def _fake_fresh(u, factor, up, scale, bias, seed, p):
    n, _, c, _ = _layout(factor, up)
    return u.new_empty((u.shape[0], n * c))


def _norm(W, A, B, scale, out, inverse, rest) -> None:
    _EXTENSION.lowrank_norm(
        W.data_ptr(), W.stride(0), DTYPES[W.dtype], W.shape[0], W.shape[1], A.shape[0], A.data_ptr(), B.data_ptr(), scale,
        out, inverse, rest, torch.get_num_threads(),
    )  # fmt: skip


def _run_norm(W, A, B, scale):
    out = A.new_empty(W.shape[0])
    _norm(W, A, B, scale, out.data_ptr(), 0, 0)
    return out


def _run_inverse(W, A, B, scale):
    inverse, rest = A.new_empty(W.shape[0]), A.new_empty(W.shape[0])
    _norm(W, A, B, scale, 0, inverse.data_ptr(), rest.data_ptr())
    return inverse, rest


_OPERATORS = (
    (
        "cpu_lowrank_read(Tensor x, Tensor factor, ScalarType dtype, bool up, float scale, Tensor? gain, bool need_u, Tensor? w,"
        " Tensor? seed, float p, Tensor? z) -> (Tensor u, Tensor g, Tensor dgain)",
        _run_read,
        _fake_read,
    ),
    (
        "cpu_lowrank_write(Tensor(a!) z, Tensor u, Tensor factor, bool up, float scale, Tensor? seed, float p) -> ()",
        _run_write,
        lambda *a: None,
    ),
    (
        "cpu_lowrank_write_gain(Tensor(a!) z, Tensor u, Tensor B, float scale, Tensor gain, Tensor? bias) -> Tensor",
        _run_write_gain,
        lambda z, *a: z.new_empty(z.shape),
    ),
    (
        "cpu_lowrank_scale(Tensor z, Tensor gain, Tensor? bias) -> Tensor",
        _run_scale,
        lambda z, *a: z.new_empty(z.shape),
    ),
    (
        "cpu_lowrank_fresh(Tensor u, Tensor factor, bool up, float scale, Tensor? bias, Tensor? seed, float p) -> Tensor",
        _run_fresh,
        _fake_fresh,
    ),
    (
        "cpu_lowrank_norm(Tensor W, Tensor A, Tensor B, float scale) -> Tensor",
        _run_norm,
        lambda W, A, *a: A.new_empty(W.shape[0]),
    ),
    (
        "cpu_lowrank_inverse_norm(Tensor W, Tensor A, Tensor B, float scale) -> (Tensor inverse, Tensor rest)",
        _run_inverse,
        lambda W, A, *a: (A.new_empty(W.shape[0]), A.new_empty(W.shape[0])),
    ),
)
register(_OPERATORS, "CPU")

# looked up once: resolving torch.ops.fastpeft.<name> costs microseconds a call
_READ = torch.ops.fastpeft.cpu_lowrank_read.default
_WRITE = torch.ops.fastpeft.cpu_lowrank_write.default
_WRITE_GAIN = torch.ops.fastpeft.cpu_lowrank_write_gain.default
_SCALE = torch.ops.fastpeft.cpu_lowrank_scale.default
_FRESH = torch.ops.fastpeft.cpu_lowrank_fresh.default
_NORM = torch.ops.fastpeft.cpu_lowrank_norm.default
_INVERSE = torch.ops.fastpeft.cpu_lowrank_inverse_norm.default
