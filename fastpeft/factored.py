"""A frozen weight in two factors, W = U V, U [out, R] and V [R, in]: products go through R numbers per token."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.base import Base
from fastpeft.ops.rownorm import row_gain, row_sq_norm


class Factored(Base):
    """U [out, R] and V [R, in] of one dtype and device. W is formed for the terms that change the base weight, and for nobody else."""

    __slots__ = ("U", "V")

    def __init__(self, U: Tensor, V: Tensor):
        self.U, self.V = U, V

    @property
    def out_features(self) -> int:
        return self.U.shape[0]

    @property
    def in_features(self) -> int:
        return self.V.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.U.dtype

    @property
    def device(self) -> torch.device:
        return self.U.device

    def weight(self, after: Tensor | None = None) -> Tensor:
        return self.U @ self.V

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x @ self.V.to(x.dtype).T, self.U.to(x.dtype), bias)

    def forward_onto(self, z: Tensor, x: Tensor) -> None:
        z.addmm_(x @ self.V.to(x.dtype).T, self.U.to(x.dtype).T)

    def grad_linear(self, dz: Tensor, gain: Tensor | None = None) -> Tensor:
        return self._narrow(dz, gain) @ self.V.to(dz.dtype)

    def grad_onto(self, dx: Tensor, dz: Tensor, gain: Tensor | None = None) -> None:
        dx.addmm_(self._narrow(dz, gain), self.V.to(dz.dtype))

    def _narrow(self, dz: Tensor, gain: Tensor | None) -> Tensor:
        """(gain * dz) U, the gain on U."""
        return dz @ (self.U if gain is None else self.U * gain[:, None]).to(dz.dtype)

    def row_sq_norm(self, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        """As of any base: U V + B A is a zero weight of no storage plus [U | B] [V ; A]."""
        A, B = self._joined(A, B)
        return row_sq_norm(self._zero(), A, B)

    def row_gain(self, m: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, *, constant: bool = False) -> Tensor:
        A, B = self._joined(A, B * scale)
        return row_gain(m, self._zero(), A, B, 1.0, not constant)

    def _joined(self, A: Tensor | None, B: Tensor | None) -> tuple[Tensor, Tensor]:
        if A is None or B is None:
            return self.V, self.U
        wide = torch.promote_types(A.dtype, self.dtype)
        return torch.cat([self.V.to(wide), A.to(wide)]), torch.cat([self.U.to(wide), B.to(wide)], 1)

    def _zero(self) -> Tensor:
        return self.U.new_zeros(()).expand(self.out_features, self.in_features)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """U V [out, in], multiplied in `dtype`."""
        return self.U.to(dtype) @ self.V.to(dtype)
