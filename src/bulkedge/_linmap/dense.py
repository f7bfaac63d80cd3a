"""A matrix in memory: as it is, with wider products, or as the difference of two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._guard import require_strided
from bulkedge._precision import converted, exact_device

from .base import TILE_ENTRIES, Gradients, LinearMap, frobenius, made_by_arithmetic

STRIP = 128
"""A symmetric product of so few columns is computed whole."""


@made_by_arithmetic
class Dense(LinearMap):
    """A matrix held in memory.

    Args:
        matrix: Shape ``(m, n)``, a floating dtype.

    Raises:
        InputError: If it is not a real floating-point matrix.

    Example:
        >>> W0 = Dense(torch.eye(3, 2))
        >>> W0.T.shape
        (2, 3)
    """

    def __init__(self, matrix: Tensor) -> None:
        require_strided("the matrix", matrix)
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise InputError(
                f"expected a real floating-point matrix, got shape {tuple(matrix.shape)} of "
                f"{matrix.dtype}; reshape or convert it first"
            )
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype = matrix.dtype
        self.device = matrix.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return (X.mT @ self.matrix.mT).mT  # several times faster for thin X than the plain order

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return (Y.mT @ self.matrix).mT

    def gram(self) -> Tensor:
        """See :meth:`LinearMap.gram`; half of one product."""
        total = self.matrix.new_zeros(self.shape[1], self.shape[1])
        _add_gram(total, self.matrix)
        return total.tril_().add_(total.tril(-1).mT)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.matrix

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return (self.matrix,)

    def with_tensors(self, *tensors: Tensor) -> Dense:
        """See :meth:`LinearMap.with_tensors`."""
        return Dense(*tensors)

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`; here it is ``L Rᵀ``."""
        return (L @ R.mT if all(needs) else None,)

    def pushforward(self, *tangents: Tensor) -> LinearMap:
        """See :meth:`LinearMap.pushforward`."""
        return self.with_tensors(*tangents)

    def to(self, dtype: torch.dtype) -> LinearMap:
        """See :meth:`LinearMap.to`."""
        return Dense(self.matrix) if dtype == self.matrix.dtype else Upcast(self.matrix, dtype)


class Upcast(Dense):
    """A matrix of any floating dtype whose products are taken in a wider one, a tile at a time.

    Args:
        matrix: Shape ``(m, n)``.
        dtype: The dtype of the products.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(matrix)
        self.dtype = dtype
        self.device = exact_device(matrix.device) if dtype is torch.float64 else matrix.device

    @property
    def rows(self) -> int:
        """The rows of a tile, so few that it stays in the cache between conversion and product."""
        return max(2 * TILE_ENTRIES // max(self.shape[1], 1), 1)

    def _tiles(self) -> Iterator[Tensor]:
        """Blocks of rows in the wider dtype, each valid until the next: they share one buffer."""
        rows = self.matrix.detach().split(self.rows)
        # a fresh one each would cost more
        buffer = torch.empty_like(rows[0], dtype=self.dtype, device=self.device)
        for tile in rows:
            yield buffer[: len(tile)].copy_(tile)

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        rows = X.mT.contiguous()  # a fifth faster in float64
        return torch.cat([rows @ tile.mT for tile in self._tiles()], dim=1).mT

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        total = Y.new_zeros(Y.shape[1], self.shape[1])
        for tile, y in zip(self._tiles(), Y.split(self.rows), strict=True):
            total.addmm_(y.mT, tile)
        return total.mT

    def gram(self) -> Tensor:
        """See :meth:`LinearMap.gram`."""
        n = self.shape[1]
        total = torch.zeros(n, n, dtype=self.dtype, device=self.device)
        for tile in self._tiles():
            _add_gram(total, tile)
        return total.tril_().add_(total.tril(-1).mT)

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return math.hypot(*(frobenius(tile) for tile in self._tiles()))

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return converted(self.matrix, self.dtype)

    def with_tensors(self, *tensors: Tensor) -> Upcast:
        """See :meth:`LinearMap.with_tensors`."""
        return Upcast(*tensors, dtype=self.dtype)


class Difference(Upcast):
    """``matrix − other`` with products in a wider dtype, subtracted a tile at a time.

    Args:
        matrix: Shape ``(m, n)``.
        other: Of the same shape.
        dtype: The dtype of the difference and of the products.
    """

    def __init__(self, matrix: Tensor, other: Tensor, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(matrix, dtype)
        self.other = other

    def _tiles(self) -> Iterator[Tensor]:
        for tile, other in zip(super()._tiles(), self.other.split(self.rows), strict=True):
            yield tile.sub_(other.to(tile))

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return (found := super().to_dense()) - self.other.to(found)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.matrix, self.other

    def with_tensors(self, *tensors: Tensor) -> Difference:
        """See :meth:`LinearMap.with_tensors`."""
        return Difference(*tensors, dtype=self.dtype)

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        gradient = L @ R.mT
        return gradient, -gradient

    def to(self, dtype: torch.dtype) -> LinearMap:
        """See :meth:`LinearMap.to`."""
        return Difference(self.matrix, self.other, dtype)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rowsᵀ rows`` to the lower triangle of a matrix: below one block, then in two halves."""
    n = len(total)
    if n <= STRIP:
        total.addmm_(rows.mT, rows)
        return
    half = n // 2
    total[half:, :half].addmm_(rows[:, half:].mT, rows[:, :half])
    _add_gram(total[:half, :half], rows[:, :half])
    _add_gram(total[half:, half:], rows[:, half:])
