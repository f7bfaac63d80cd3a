"""Decompositions in float64: of a base, and of the leading part of a tuned matrix.

The eigenvectors of the Gram matrix of the shorter side are the singular vectors of that side.  In
float64 they are those of the matrix to some ``u σ₁²/(σ_i · gap_i)``, u the unit roundoff, where an
SVD reaches ``u σ₁/gap_i``.  So for each value there is a least distance to its neighbours and to
zero; if one is closer, LAPACK's SVD is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bulkedge._linmap import Dense, LinearMap, LowRank, Sum, Upcast
from bulkedge.triplet import SingularTriplets, Status, thin_svd
from bulkedge.triplet._result import neighbour_gaps
from bulkedge.triplet._rounding import UNIT
from bulkedge.triplet._size import divisor

from ._eigen import Eigenvectors, eigenvectors, leading_eigenvectors
from .score import VectorSide

SVD_UP_TO = 64
"""Up to this length of the shorter side an SVD costs no more than a Gram matrix."""
TOLD_APART = 1e6
"""A gap is this many times the rounding of a Gram matrix, so that no vector is off by 1e-6."""
SMALLEST_TRACE = 1e-250
"""A Gram matrix with a smaller trace has lost digits of its entries to underflow."""

Factors = tuple[Tensor, Tensor, Tensor]
"""U, σ and V."""

Remember = Callable[[str, Callable[[], Any]], Any]
"""Called as ``remember(what, compute)``: what was computed of the same base before, or
``compute()``.  ``what`` is ``"factors"`` (a :data:`Base`), which is made of ``"svd"`` (its thin
SVD) or ``"eigen"`` (:attr:`Eigenvectors.parts` of its Gram matrix), or ``"values"`` (its singular
values)."""


def compute_anew(what: str, compute: Callable[[], Any]) -> Any:
    """Remember nothing: the :data:`Remember` of a base that is judged once."""
    return compute()


@dataclass(frozen=True)
class BaseBySVD:
    """All singular vectors of a base, from its thin SVD.

    Attributes:
        U: Left vectors, shape ``(m, p)``.
        sigma: Descending, shape ``(p,)``.
        V: Right vectors, shape ``(n, p)``.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    def coordinates(self, Y: Tensor, side: VectorSide) -> Tensor:
        """``UᵀY``, or ``VᵀY``, shape ``(p, k)``."""
        vectors = self.U if side == "left" else self.V
        return vectors.mT @ Y.to(vectors)

    def leading(self, count: int) -> Factors:
        """The first columns of U and V, and their values."""
        return self.U[:, :count], self.sigma[:count], self.V[:, :count]


@dataclass(frozen=True)
class BaseByGram:
    """All singular vectors of a base, from the eigenvectors of the Gram matrix of its shorter side.

    Attributes:
        source: The base as it was given.
        tall: The base, or its transpose where that is the taller one, float64.
        transposed: Whether it is the transpose.
        gram: ``tallᵀ tall``.
        eigen: Its eigenvectors.
        sigma: The roots of its eigenvalues, shape ``(p,)``.
    """

    source: LinearMap
    tall: Dense
    transposed: bool
    gram: Tensor
    eigen: Eigenvectors
    sigma: Tensor

    def coordinates(self, Y: Tensor, side: VectorSide) -> Tensor:
        """``UᵀY``, or ``VᵀY``, shape ``(p, k)``."""
        Y = Y.to(self.sigma)
        if (side == "left") == self.transposed:
            return self.eigen.coordinates(Y)
        # U = A V Σ⁻¹ need not be formed
        return self.eigen.coordinates(self.tall.rmatmat(Y)) / self.sigma[:, None]

    def leading(self, count: int) -> Factors:
        """The first columns of U and V, and their values."""
        V, sigma = self.eigen.leading(count), self.sigma[:count]
        U = self.tall.matmat(V) / sigma
        return (V, sigma, U) if self.transposed else (U, sigma, V)


Base = BaseBySVD | BaseByGram


def factor_base(W0: LinearMap, remember: Remember = compute_anew) -> Base:
    """All singular values and vectors of a base.

    Args:
        W0: The base, float64.
        remember: Where its decomposition is kept; the numbers are the same with and without.

    Returns:
        What its singular vectors say of other vectors.
    """
    matrix = W0.to_dense()
    if min(W0.shape) <= SVD_UP_TO:
        return _base_by_svd(matrix, remember)
    tall, transposed = _tall(matrix)
    gram = tall.gram()
    if _is_usable(gram):
        parts = remember("eigen", lambda: eigenvectors(gram.clone()).parts)
        eigen = Eigenvectors.of(parts)
        sigma = eigen.values.clamp_min(0.0).sqrt()
        if _told_apart(sigma, float(sigma[0])):
            return BaseByGram(W0, tall, transposed, gram, eigen, sigma)
    return _base_by_svd(matrix, remember)


def _base_by_svd(matrix: Tensor, remember: Remember) -> BaseBySVD:
    """From the thin SVD, in the layout that it has after it was on disk."""
    return BaseBySVD(*remember("svd", lambda: tuple(x.contiguous() for x in thin_svd(matrix))))


def leading_triplets(W: LinearMap, k: int, base: Base | None = None) -> SingularTriplets:
    """The k leading triplets of a matrix, with their residuals as measured.

    Args:
        W: The matrix, float64.
        k: How many.
        base: What is known of the first term of W, where W is a sum: the Gram matrix of the sum
            then takes thin products alone.

    Returns:
        The triplets.
    """
    p = min(W.shape)
    found = _by_gram(W, k, base) if p > SVD_UP_TO else None
    if found is None:
        return _svd_triplets(W, k)
    (sigma, V), (tall, transposed) = found, _tall_map(W)
    V = V[:, :k]
    image = tall.matmat(V)
    leading = torch.linalg.vector_norm(image, dim=0)
    U = image / leading
    residuals = torch.linalg.vector_norm(tall.rmatmat(U) - V * leading, dim=0)
    return SingularTriplets(
        leading,
        *((V, U) if transposed else (U, V)),
        residuals=residuals,
        gaps=neighbour_gaps(sigma, k, complete=len(sigma) == p),
        steps=1,
        passes=2,
        status=Status.CONVERGED,
    )


def _svd_triplets(W: LinearMap, k: int) -> SingularTriplets:
    """:func:`leading_triplets` by an SVD."""
    matrix = W.to_dense()
    U, sigma, V = thin_svd(matrix)
    rows = torch.contiguous_format
    # not views that hold all of them
    u, v = (x[:, :k].clone(memory_format=rows) for x in (U, V))
    s = sigma[:k]
    # in units of σ₁: squares of 10⁻¹⁶ σ₁ must not under- or overflow
    unit = divisor(float(sigma[0]))
    matrix, near = matrix / unit, s / unit
    residuals = unit * torch.hypot(
        torch.linalg.vector_norm(matrix @ v - u * near, dim=0),
        torch.linalg.vector_norm(matrix.mT @ u - v * near, dim=0),
    )
    gaps = neighbour_gaps(sigma, k, complete=True)
    return SingularTriplets(
        s, u, v, residuals=residuals, gaps=gaps, steps=1, passes=3, status=Status.CONVERGED
    )


def _by_gram(W: LinearMap, k: int, base: Base | None) -> tuple[Tensor, Tensor] | None:
    """σ and V of the leading triplets, k + 1 of them; None where they lie too close."""
    gram, size = _gram_of_sum(W, base)
    if gram is None:
        gram = _tall(W.to_dense())[0].gram()
    if not _is_usable(gram):
        return None
    squares, V = leading_eigenvectors(gram, min(k + 1, len(gram)))
    sigma = squares.clamp_min(0.0).sqrt()
    return (sigma, V) if _told_apart(sigma, max(size, float(sigma[0])), k) else None


def _gram_of_sum(W: LinearMap, base: Base | None) -> tuple[Tensor | None, float]:
    """``(A + P Qᵀ)ᵀ (A + P Qᵀ)`` from ``AᵀA`` by thin products, and the size of its terms."""
    if not (isinstance(base, BaseByGram) and isinstance(W, Sum) and len(W.terms) == 2):
        return None, 0.0
    first, update = W.terms
    if not (_same_matrix(first, base.source) and isinstance(update, LowRank)):
        return None, 0.0
    P, Q = update.scale * update.B, update.A.mT
    if base.transposed:
        P, Q = Q, P
    half = base.tall.rmatmat(P) + Q @ (P.mT @ P) / 2
    added = half @ Q.mT
    return base.gram + added + added.mT, float(base.sigma[0]) + update.norm_bound()


def _same_matrix(first: LinearMap, second: LinearMap) -> bool:
    """Whether two maps are one matrix in memory."""
    plain = all(type(each) in (Dense, Upcast) for each in (first, second))
    return plain and first.tensors[0] is second.tensors[0]


def _is_usable(gram: Tensor) -> bool:
    """Whether the squares of all values of interest are numbers that float64 holds in full."""
    return SMALLEST_TRACE < float(gram.trace()) < float("inf")


def _tall(matrix: Tensor) -> tuple[Dense, bool]:
    """The matrix, or its transpose where that is taller."""
    transposed = matrix.shape[0] < matrix.shape[1]
    return Dense(matrix.mT if transposed else matrix), transposed


def _tall_map(W: LinearMap) -> tuple[LinearMap, bool]:
    """The same of a map."""
    transposed = W.shape[0] < W.shape[1]
    return (W.T if transposed else W), transposed


def _told_apart(sigma: Tensor, size: float, count: int | None = None) -> bool:
    """Whether a Gram matrix separates each value from its neighbours, and from zero.

    Args:
        sigma: Descending.
        size: σ₁, or more where what was added up to the matrix is larger.
        count: How many of the leading ones are asked for; all if None.

    Returns:
        True if each gap is far above rounding.
    """
    down = sigma - torch.cat([sigma[1:], sigma.new_zeros(1)])
    rounding = UNIT * size**2 / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    return bool((down > TOLD_APART * rounding)[:count].all())
