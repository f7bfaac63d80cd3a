"""Linear maps known by their products: ``Dense``, ``LowRank``, ``Sum``, ``Adjoint``, ``Scaled``.

A fine-tuned weight ``W0 + s·B·A`` is the sum of a dense and a low-rank map.  Everything that this
package asks of it is a product with a thin block, so the sum is never formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

from ._errors import InputError


class LinearMap(ABC):
    """A real m×n matrix, known by its products with thin blocks.

    Attributes:
        shape: ``(m, n)``.
        dtype: The dtype of its products.
        device: Where its products live.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def matmat(self, X: Tensor) -> Tensor:
        """The product ``W X`` for ``X`` of shape ``(n, b)``; one pass over the matrix."""

    @abstractmethod
    def rmatmat(self, Y: Tensor) -> Tensor:
        """The product ``Wᵀ Y`` for ``Y`` of shape ``(m, b)``; one pass over the matrix."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix itself, shape ``(m, n)``: for tests, oracles and the last resort."""

    @property
    def T(self) -> LinearMap:
        """The transposed map, shape ``(n, m)``."""
        return Adjoint(self)

    def __add__(self, other: LinearMap) -> LinearMap:
        return Sum([self, other])


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
        return self.matrix @ X

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return self.matrix.mT @ Y

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.matrix


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

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.scale * (self.B @ self.A)

    def singular_values(self) -> Tensor:
        """All ``min(r, m, n)`` non-trivial singular values, from thin QR factors in O((m+n)r²)."""
        R_B = torch.linalg.qr(self.B, mode="r").R
        R_A = torch.linalg.qr(self.A.mT, mode="r").R
        return torch.linalg.svdvals(self.scale * (R_B @ R_A.mT))


class Sum(LinearMap):
    """The sum of maps of one shape, dtype and device.

    Args:
        terms: At least one map.

    Raises:
        InputError: If the maps differ in shape, dtype or device.

    Example:
        >>> W0 = Dense(torch.eye(3))
        >>> (W0 + LowRank(torch.ones(3, 1), torch.ones(1, 3))).to_dense()[0].tolist()
        [2.0, 1.0, 1.0]
    """

    def __init__(self, terms: Sequence[LinearMap]) -> None:
        kinds = {(term.shape, term.dtype, term.device) for term in terms}
        if len(kinds) != 1:
            raise InputError(f"expected maps of one shape, dtype and device, got {kinds}")
        self.terms = tuple(terms)
        ((self.shape, self.dtype, self.device),) = kinds

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        first, *rest = self.terms
        return sum((term.matmat(X) for term in rest), start=first.matmat(X))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        first, *rest = self.terms
        return sum((term.rmatmat(Y) for term in rest), start=first.rmatmat(Y))

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        first, *rest = self.terms
        return sum((term.to_dense() for term in rest), start=first.to_dense())


class Adjoint(LinearMap):
    """The transpose of a map.

    Args:
        inner: The map, shape ``(m, n)``; this one has shape ``(n, m)``.
    """

    def __init__(self, inner: LinearMap) -> None:
        self.inner = inner
        self.shape = (inner.shape[1], inner.shape[0])
        self.dtype = inner.dtype
        self.device = inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return self.inner.rmatmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return self.inner.matmat(Y)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.inner.to_dense().mT

    @property
    def T(self) -> LinearMap:
        """The map that was transposed."""
        return self.inner


class Scaled(LinearMap):
    """The map ``factor · W``.

    Args:
        inner: The map W.
        factor: The number in front.
    """

    def __init__(self, inner: LinearMap, factor: float) -> None:
        self.inner, self.factor = inner, factor
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return self.inner.matmat(X) * self.factor

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return self.inner.rmatmat(Y) * self.factor

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.inner.to_dense() * self.factor


MatrixLike = Union[Tensor, LinearMap]  # noqa: UP007 — evaluated at run time on Python 3.10


def as_map(matrix: MatrixLike) -> LinearMap:
    """``matrix`` itself if it is a map, else :class:`Dense` around it.

    Args:
        matrix: A tensor or a map.

    Returns:
        A map.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(matrix, LinearMap):
        return matrix
    if not isinstance(matrix, Tensor):
        raise InputError(
            f"expected a torch tensor or a LinearMap, got {type(matrix).__name__}; "
            "torch.as_tensor converts arrays and lists"
        )
    return Dense(matrix)
