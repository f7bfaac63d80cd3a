"""A product of two thin factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bulkedge._errors import InputError

from .base import Gradients, LinearMap, frobenius, times_power


class LowRank(LinearMap):
    """The map ``scale · B A``, kept as its factors.

    Args:
        B: Shape ``(m, r)``.
        A: Shape ``(r, n)``, of the same dtype and device.
        scale: The number in front, α/r or α/√r for a LoRA.

    Raises:
        InputError: If the factors do not fit together.

    Example:
        >>> update = LowRank(torch.ones(4, 1), torch.ones(1, 3), scale=2.0)
        >>> update.matmat(torch.ones(3, 1)).squeeze().tolist()
        [6.0, 6.0, 6.0, 6.0]
    """

    def __init__(self, B: Tensor, A: Tensor, scale: float = 1.0) -> None:
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise InputError(
                f"expected factors B (m, r) and A (r, n), got {tuple(B.shape)} and {tuple(A.shape)}"
            )
        if (B.dtype, B.device) != (A.dtype, A.device):
            raise InputError(
                f"expected factors alike, got B {B.dtype} on {B.device} and A {A.dtype} on "
                f"{A.device}; convert one of them"
            )
        if isinstance(scale, Tensor):
            raise InputError(
                "expected a number as scale, got a tensor, which would have no gradient; multiply "
                "it into B, or pass float(scale)"
            )
        self.B, self.A, self.scale = B, A, scale
        self.shape = (B.shape[0], A.shape[1])
        self.dtype = B.dtype
        self.device = B.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return self.scale * (self.B @ (self.A @ X))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return self.scale * (self.A.mT @ (self.B.mT @ Y))

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        # factors of order one: the product of two small ones may be below every number
        b, a = (math.frexp(frobenius(x))[1] for x in (self.B, self.A))
        unit = LowRank(times_power(self.B, -b), times_power(self.A, -a))
        return abs(self.scale) * times_power(frobenius(unit.singular_values()), a + b)

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return abs(self.scale) * frobenius(self.B) * frobenius(self.A)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.scale * (self.B @ self.A)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.B, self.A

    def with_tensors(self, *tensors: Tensor) -> LowRank:
        """See :meth:`LinearMap.with_tensors`."""
        return LowRank(*tensors, scale=self.scale)

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        return self.scale * L @ (self.A @ R).mT, self.scale * (self.B.mT @ L) @ R.mT

    def pushforward(self, *tangents: Tensor) -> LinearMap:
        """See :meth:`LinearMap.pushforward`; the product rule."""
        dB, dA = tangents
        return LowRank(dB, self.A, self.scale) + LowRank(self.B, dA, self.scale)

    def __repr__(self) -> str:
        m, n = self.shape
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.scale} * LowRank({m}×{n}, rank {self.B.shape[1]}, {kind})"

    def singular_values(self) -> Tensor:
        """All ``min(r, m, n)`` non-trivial singular values, from thin QR factors in O((m+n)r²)."""
        R_B = torch.linalg.qr(self.B, mode="r").R
        R_A = torch.linalg.qr(self.A.mT, mode="r").R
        return torch.linalg.svdvals(self.scale * (R_B @ R_A.mT))
