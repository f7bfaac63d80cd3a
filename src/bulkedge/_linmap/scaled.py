"""Maps times a number, or times a number for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import as_real
from bulkedge._precision import converted

from .base import Gradients, LinearMap, as_map, frobenius, made_by_arithmetic
from .dense import Dense


def lift(dtype: torch.dtype) -> float:
    """A power of two that turns the smallest numbers of a dtype into ordinary ones."""
    return 2.0**900 if dtype is torch.float64 else 2.0**100


@made_by_arithmetic
class Scaled(LinearMap):
    """The map ``factor · W``.

    Args:
        inner: The map W.
        factor: The number in front.

    Raises:
        InputError: If the factor is no finite number.

    Example:
        >>> from bulkedge._linmap import Dense
        >>> Scaled(Dense(torch.eye(2)), 3.0), 3.0 * Dense(torch.eye(2)) - torch.eye(2)
        (3.0 * (Dense(2×2, float32)), 3.0 * (Dense(2×2, float32)) + -1.0 * (Dense(2×2, float32)))
    """

    def __init__(self, inner: LinearMap, factor: float) -> None:
        number = None if isinstance(factor, Tensor) else as_real(factor)
        if number is None or not math.isfinite(number):
            got = "a tensor" if isinstance(factor, Tensor) else repr(factor)
            raise InputError(
                f"expected a finite number to scale a map by, got {got}; a tensor would have "
                "no gradient: pass float(factor), or scale the tensors of the map"
            )
        self.inner, self.factor = as_map(inner), number
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        before, after = self._split()
        return self.inner.matmat(X if before == 1 else X * before) * after

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        before, after = self._split()
        return self.inner.rmatmat(Y if before == 1 else Y * before) * after

    def _split(self) -> tuple[float, float]:
        """The parts of the factor before and after a product, so that none over- or underflows."""
        largest, size = lift(self.dtype), abs(self.factor)
        if size > largest**0.5:
            return largest, self.factor / largest
        if 0 < size < largest**-0.5:
            before = 2.0 ** (math.frexp(size)[1] // 2)
            return before, self.factor / before
        return 1.0, self.factor

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        bound = self.inner.norm_bound()
        return abs(self.factor) * bound if math.isfinite(bound) else frobenius(self.to_dense())

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        scale = self.inner.rounding_scale()
        if math.isfinite(scale) or not isinstance(self.inner, Dense):
            return abs(self.factor) * scale
        return self.norm_bound()

    def agreed(self, digest: bytes) -> bytes:
        """See :meth:`LinearMap.agreed`."""
        return self.inner.agreed(digest)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        before, after = self._split()
        if before == 1:
            return self.inner.to_dense() * after
        # a product of tiny factors that is formed before it is scaled would lose its digits
        return self.matmat(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))

    def __repr__(self) -> str:
        return f"{self.factor} * ({self.inner!r})"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.inner.tensors

    def with_tensors(self, *tensors: Tensor) -> Scaled:
        """See :meth:`LinearMap.with_tensors`."""
        return Scaled(self.inner.with_tensors(*tensors), self.factor)

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        before, after = self._split()
        return self.inner.pullback(L * before * after, R, needs)

    def pushforward(self, *tangents: Tensor) -> Scaled:
        """See :meth:`LinearMap.pushforward`."""
        return Scaled(self.inner.pushforward(*tangents), self.factor)

    def to(self, dtype: torch.dtype) -> Scaled:
        """See :meth:`LinearMap.to`."""
        return Scaled(self.inner.to(dtype), self.factor)


class RowScaled(LinearMap):
    """The map ``diag(d) W``, each output scaled by a factor of its own.

    Args:
        inner: The map W, shape ``(m, n)``.
        factors: Shape ``(m,)``, of the same dtype and device.

    Raises:
        InputError: If the factors do not fit the map.

    Example:
        >>> from bulkedge._linmap import Dense
        >>> RowScaled(Dense(torch.eye(2)), torch.tensor([2.0, 3.0])).to_dense().tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """

    def __init__(self, inner: LinearMap, factors: Tensor) -> None:
        inner = as_map(inner)
        if factors.shape != inner.shape[:1] or factors.dtype != inner.dtype:
            raise InputError(
                f"expected {inner.shape[0]} factors in {inner.dtype}, one per row, got "
                f"{tuple(factors.shape)} in {factors.dtype}"
            )
        self.inner, self.factors = inner, factors
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return self.factors[:, None] * self.inner.matmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return self.inner.rmatmat(self.factors[:, None] * Y)

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return float(self.factors.abs().max()) * self.inner.rounding_scale()

    def agreed(self, digest: bytes) -> bytes:
        """See :meth:`LinearMap.agreed`."""
        return self.inner.agreed(digest)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.factors[:, None] * self.inner.to_dense()

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return float(self.factors.abs().max()) * self.inner.norm_bound()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return *self.inner.tensors, self.factors

    def with_tensors(self, *tensors: Tensor) -> RowScaled:
        """See :meth:`LinearMap.with_tensors`."""
        return RowScaled(self.inner.with_tensors(*tensors[:-1]), tensors[-1])

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        inner = self.inner.pullback(self.factors[:, None] * L, R, needs[:-1])
        return *inner, (L * self.inner.matmat(R)).sum(dim=1)

    def pushforward(self, *tangents: Tensor) -> LinearMap:
        """See :meth:`LinearMap.pushforward`; the product rule."""
        moved = RowScaled(self.inner.pushforward(*tangents[:-1]), self.factors)
        return moved + RowScaled(self.inner, tangents[-1])

    def to(self, dtype: torch.dtype) -> RowScaled:
        """See :meth:`LinearMap.to`."""
        inner = self.inner.to(dtype)
        return RowScaled(inner, converted(self.factors, dtype).to(inner.device))
