"""All singular vectors of one side of a matrix in memory, for half the price of an SVD.

The eigenvectors of the Gram matrix of the shorter side are the singular vectors of that side.  In
float64 they are those of the matrix to some ``u σ₁²/(σ_i · gap_i)``, u the unit roundoff, where an
SVD reaches ``u σ₁/gap_i``.  So each value says how far it may be from its neighbours and from zero
to be told apart that way, and where one is nearer LAPACK's SVD is asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._linmap import Dense
from bulkedge._precision import exact
from bulkedge.triplet import SingularTriplets, Status, thin_svd
from bulkedge.triplet._result import neighbour_gaps
from bulkedge.triplet._rounding import UNIT

SVD_UP_TO = 64
"""Up to this length of the shorter side an SVD costs no more than a Gram matrix."""
TOLD_APART = 1e6
"""A gap is this many times the rounding of a Gram matrix, so that no vector is off by 1e-6."""

Factors = tuple[Tensor, Tensor, Tensor]
"""U, σ and V."""


def base_factors(matrix: Tensor, *, long_side: int) -> Factors:
    """All singular values of a matrix and its singular vectors.

    Args:
        matrix: Shape ``(m, n)``, float64.
        long_side: How many leading vectors of the longer side are wanted at least.

    Returns:
        U of shape ``(m, p)``, σ descending and V of shape ``(n, p)``, p = min(m, n); maybe fewer
        columns of the longer side, if fewer are wanted.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix
    found = _by_gram(tall)
    if found is None:
        return thin_svd(matrix)
    sigma, V = found
    U = Dense(tall).matmat(V[:, :long_side]) / sigma[:long_side]
    return (V, sigma, U) if wide else (U, sigma, V)


def svd_triplets(matrix: Tensor, k: int) -> SingularTriplets:
    """The k leading triplets of a matrix by an SVD, with their residuals as measured.

    Args:
        matrix: Shape ``(m, n)``, float64.
        k: How many.

    Returns:
        The triplets.
    """
    U, sigma, V = thin_svd(matrix)
    rows = torch.contiguous_format
    # not views that hold all of them
    u, v = (x[:, :k].clone(memory_format=rows) for x in (U, V))
    s = sigma[:k]
    residuals = torch.hypot(
        torch.linalg.vector_norm(matrix @ v - u * s, dim=0),
        torch.linalg.vector_norm(matrix.mT @ u - v * s, dim=0),
    )
    gaps = neighbour_gaps(sigma, k, complete=True)
    return SingularTriplets(
        s, u, v, residuals=residuals, gaps=gaps, steps=1, passes=3, status=Status.CONVERGED
    )


def leading_triplets(matrix: Tensor, k: int) -> SingularTriplets:
    """The k leading triplets of a matrix, with their residuals as measured.

    Args:
        matrix: Shape ``(m, n)``, float64.
        k: How many.

    Returns:
        The triplets.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.mT if wide else matrix
    found = _by_gram(tall, k)
    if found is None:
        return svd_triplets(matrix, k)
    sigma, v = found[0], found[1][:, :k]
    image = Dense(tall).matmat(v)  # a thin product, for which the plain order is slow
    leading = torch.linalg.vector_norm(image, dim=0)
    u = image / leading
    residuals = torch.linalg.vector_norm(Dense(tall).rmatmat(u) - v * leading, dim=0)
    return SingularTriplets(
        leading,
        *((v, u) if wide else (u, v)),
        residuals=residuals,
        gaps=neighbour_gaps(sigma, k, complete=True),
        steps=1,
        passes=2,
        status=Status.CONVERGED,
    )


def _by_gram(tall: Tensor, leading: int | None = None) -> tuple[Tensor, Tensor] | None:
    """σ and V of a matrix with m ≥ n; None where an SVD is cheaper, or tells more of them apart."""
    if tall.shape[1] <= SVD_UP_TO:
        return None
    squares, V = torch.linalg.eigh(Dense(exact(tall)).gram())
    sigma, V = squares.flip(0).clamp_min(0.0).sqrt(), V.flip(1)
    down = sigma - torch.cat([sigma[1:], sigma.new_zeros(1)])
    rounding = UNIT * float(sigma[0]) ** 2 / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    apart = (down > TOLD_APART * rounding)[:leading]
    return (sigma, V) if bool(apart.all()) else None
