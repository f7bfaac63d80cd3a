"""Linear maps known by their products: ``Dense``, ``LowRank``, ``Sum``, ``Adjoint``, ``Scaled``.

A fine-tuned weight ``W0 + s·B·A`` is the sum of a dense and a low-rank map.  Everything that this
package asks of it is a product with a thin block, so the sum is never formed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Union

import torch
from torch import Tensor

from ._errors import InputError

STRIP = 512  # columns of a symmetric product that are computed together

Gradients = tuple[Union[Tensor, None], ...]  # noqa: UP007 — evaluated on Python 3.10


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
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the map is made of: gradients go to these."""

    @abstractmethod
    def with_tensors(self, *tensors: Tensor) -> LinearMap:
        """The same map made of other tensors, in the order of :attr:`tensors`."""

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """The gradient of ``tr(Lᵀ W R)``, one for each of :attr:`tensors`, itself differentiable.

        Args:
            L: Shape ``(m, b)``.
            R: Shape ``(n, b)``.
            needs: Which tensors' gradients are wanted; empty for all.

        Returns:
            Tensors shaped like those of the map, None for what is not wanted.
        """

        def product(*tensors: Tensor) -> Tensor:
            return self.with_tensors(*tensors).matmat(R)

        return torch.func.vjp(product, *self.tensors)[1](L)

    def pushforward(self, *tangents: Tensor) -> LinearMap:
        """The derivative of the map in the direction of ``tangents``, one for each tensor.

        This default is for a map that is linear in its tensors.

        Returns:
            A map of the same shape.
        """
        return self.with_tensors(*tangents)

    def widened(self) -> LinearMap:
        """The same map with products in float64."""
        return self.with_tensors(*(tensor.double() for tensor in self.tensors))

    def gram(self) -> Tensor:
        """``WᵀW``, shape ``(n, n)``; two products with all n unit vectors, a block at a time."""
        identity = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return torch.cat([self.rmatmat(self.matmat(e)) for e in identity.split(512, dim=1)], dim=1)

    def norm_bound(self) -> float:
        """An upper bound on ``‖W‖_F``: that of a matrix in memory, else no more than is cheap."""
        return float(torch.linalg.vector_norm(self.to_dense()))

    def rounding_scale(self) -> float:
        """Bound on ``‖·‖_F`` of the sum of absolute values behind an entry of a product.

        The rounding error of a product grows with it: of ``B A`` it is ``‖B‖_F ‖A‖_F``, which
        may be far more than ``‖B A‖_F``.

        Returns:
            The bound; of a matrix in memory its Frobenius norm.
        """
        return self.norm_bound()

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

    def widened(self) -> LinearMap:
        """See :meth:`LinearMap.widened`; the matrix itself is not copied."""
        return Widened(self.matrix)


class Widened(Dense):
    """A matrix of any floating dtype whose products are taken in a wider one, a tile at a time.

    Args:
        matrix: Shape ``(m, n)``.
        dtype: The dtype of the products.
    """

    rows = 128  # of a tile: it stays in the cache between conversion and product

    def __init__(self, matrix: Tensor, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(matrix)
        self.dtype = dtype

    def _tiles(self) -> Iterator[Tensor]:
        """Blocks of rows in the wider dtype, each valid until the next: they share one buffer."""
        rows = self.matrix.detach().split(self.rows)
        # a fresh one each would cost more
        buffer = torch.empty_like(rows[0], dtype=self.dtype)
        for tile in rows:
            yield buffer[: len(tile)].copy_(tile)

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return torch.cat([X.mT @ tile.mT for tile in self._tiles()], dim=1).mT

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
        return math.sqrt(sum(float(tile.square().sum()) for tile in self._tiles()))

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.matrix.to(self.dtype)

    def with_tensors(self, *tensors: Tensor) -> Widened:
        """See :meth:`LinearMap.with_tensors`."""
        return Widened(*tensors, dtype=self.dtype)

    def widened(self) -> LinearMap:
        """See :meth:`LinearMap.widened`."""
        return Widened(self.matrix)


class Difference(Widened):
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
            yield tile.sub_(other)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return super().to_dense() - self.other

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

    def widened(self) -> LinearMap:
        """See :meth:`LinearMap.widened`."""
        return Difference(self.matrix, self.other)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rowsᵀ rows`` to the lower triangle of a matrix, a strip of columns at a time."""
    n = len(total)
    for first in range(0, n, STRIP):
        total[first:, first : first + STRIP].addmm_(
            rows[:, first:].mT, rows[:, first : first + STRIP]
        )


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
        return float(torch.linalg.vector_norm(self.singular_values()))

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        norms = [float(torch.linalg.vector_norm(factor)) for factor in (self.B, self.A)]
        return abs(self.scale) * norms[0] * norms[1]

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

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return sum(term.norm_bound() for term in self.terms)

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return sum(term.rounding_scale() for term in self.terms)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        first, *rest = self.terms
        return sum((term.to_dense() for term in rest), start=first.to_dense())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return tuple(tensor for term in self.terms for tensor in term.tensors)

    def with_tensors(self, *tensors: Tensor) -> Sum:
        """See :meth:`LinearMap.with_tensors`."""
        left = iter(tensors)
        return Sum([term.with_tensors(*islice(left, len(term.tensors))) for term in self.terms])

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        left, gradients = iter(needs), []
        for term in self.terms:
            wanted = tuple(islice(left, len(term.tensors)))
            skipped = bool(wanted) and not any(wanted)
            gradients += [None] * len(wanted) if skipped else term.pullback(L, R, wanted)
        return tuple(gradients)

    def pushforward(self, *tangents: Tensor) -> Sum:
        """See :meth:`LinearMap.pushforward`."""
        left = iter(tangents)
        return Sum([term.pushforward(*islice(left, len(term.tensors))) for term in self.terms])

    def widened(self) -> Sum:
        """See :meth:`LinearMap.widened`."""
        return Sum([term.widened() for term in self.terms])


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

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return self.inner.norm_bound()

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return self.inner.rounding_scale()

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.inner.to_dense().mT

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.inner.tensors

    def with_tensors(self, *tensors: Tensor) -> Adjoint:
        """See :meth:`LinearMap.with_tensors`."""
        return Adjoint(self.inner.with_tensors(*tensors))

    def pushforward(self, *tangents: Tensor) -> Adjoint:
        """See :meth:`LinearMap.pushforward`."""
        return Adjoint(self.inner.pushforward(*tangents))

    def widened(self) -> Adjoint:
        """See :meth:`LinearMap.widened`."""
        return Adjoint(self.inner.widened())

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        return self.inner.pullback(R, L, needs)

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

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return abs(self.factor) * self.inner.norm_bound()

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return abs(self.factor) * self.inner.rounding_scale()

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.inner.to_dense() * self.factor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.inner.tensors

    def with_tensors(self, *tensors: Tensor) -> Scaled:
        """See :meth:`LinearMap.with_tensors`."""
        return Scaled(self.inner.with_tensors(*tensors), self.factor)

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        return self.inner.pullback(L * self.factor, R, needs)

    def pushforward(self, *tangents: Tensor) -> Scaled:
        """See :meth:`LinearMap.pushforward`."""
        return Scaled(self.inner.pushforward(*tangents), self.factor)

    def widened(self) -> Scaled:
        """See :meth:`LinearMap.widened`."""
        return Scaled(self.inner.widened(), self.factor)


class RowScaled(LinearMap):
    """The map ``diag(d) W``, each output scaled by a factor of its own.

    Args:
        inner: The map W, shape ``(m, n)``.
        factors: Shape ``(m,)``, of the same dtype and device.

    Raises:
        InputError: If the factors do not fit the map.

    Example:
        >>> RowScaled(Dense(torch.eye(2)), torch.tensor([2.0, 3.0])).to_dense().tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """

    def __init__(self, inner: LinearMap, factors: Tensor) -> None:
        if factors.shape != inner.shape[:1] or factors.dtype != inner.dtype:
            raise InputError(
                f"expected {inner.shape[0]} factors in {inner.dtype}, one a row, got "
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

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.factors[:, None] * self.inner.to_dense()

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return float(self.factors.abs().max()) * self.inner.norm_bound()

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return float(self.factors.abs().max()) * self.inner.rounding_scale()

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

    def widened(self) -> RowScaled:
        """See :meth:`LinearMap.widened`."""
        return RowScaled(self.inner.widened(), self.factors.double())


class Counted(LinearMap):
    """A map that counts its products, those of its relatives included.

    Args:
        inner: The map.
        passes: A list of one number, shared between relatives.
    """

    def __init__(self, inner: LinearMap, passes: list[int] | None = None) -> None:
        self.inner, self.passes = inner, [0] if passes is None else passes
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        self.passes[0] += 1
        return self.inner.matmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        self.passes[0] += 1
        return self.inner.rmatmat(Y)

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return self.inner.norm_bound()

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return self.inner.rounding_scale()

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.inner.to_dense()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.inner.tensors

    def with_tensors(self, *tensors: Tensor) -> Counted:
        """See :meth:`LinearMap.with_tensors`."""
        return Counted(self.inner.with_tensors(*tensors), self.passes)

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        return self.inner.pullback(L, R, needs)

    def pushforward(self, *tangents: Tensor) -> Counted:
        """See :meth:`LinearMap.pushforward`."""
        return Counted(self.inner.pushforward(*tangents), self.passes)

    def widened(self) -> Counted:
        """See :meth:`LinearMap.widened`."""
        return Counted(self.inner.widened(), self.passes)


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
    if matrix.layout is not torch.strided or matrix.device.type == "meta":
        raise InputError(
            f"expected a dense tensor with entries, got {matrix.layout} on {matrix.device}; "
            "to_dense() converts a sparse one"
        )
    return Dense(matrix)
