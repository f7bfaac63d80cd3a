"""LAPACK's divide-and-conquer SVD of the formed matrix: the oracle and the last resort."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._guard import matrix as require_matrix
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps

from ._start import Randomness


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of a matrix that is held in memory.

    LAPACK is several times slower on a wide matrix than on its transpose
    (``benchmarks/precision.py``), so the transpose it gets.

    Cost: O(mn·min(m, n)) operations; memory of about eight copies where the matrix is square.

    Args:
        matrix: Shape ``(m, n)``.

    Returns:
        U of shape ``(m, p)``, σ of shape ``(p,)`` descending, V of shape ``(n, p)``, p = min(m, n).

    Raises:
        InputError: If it is no matrix of real floating-point numbers, or not finite.

    Example:
        >>> U, S, V = thin_svd(torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]))
        >>> S.tolist(), V.shape
        ([3.0, 2.0], torch.Size([3, 2]))
    """
    require_matrix("the matrix", matrix)
    wide = matrix.shape[0] < matrix.shape[1]
    U, S, Vt = torch.linalg.svd(matrix.mT if wide else matrix, full_matrices=False)
    return (Vt.mT, S, U) if wide else (U, S, Vt.mT)


@dataclass(frozen=True)
class DenseSVD:
    """All singular triplets by one full SVD in float64, of which k are kept.

    Cost: O(mn·min(m, n)) and several copies of the matrix in float64.
    """

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets; a start helps nothing here, and nothing is drawn."""
        matrix = A.to_dense().double()
        U, S, V = thin_svd(matrix)
        u, sigma, v = U[:, :k], S[:k], V[:, :k]
        residuals = torch.hypot(
            torch.linalg.vector_norm(matrix @ v - u * sigma, dim=0),
            torch.linalg.vector_norm(matrix.mT @ u - v * sigma, dim=0),
        )
        gaps = neighbour_gaps(S, k, complete=True)
        figures = (x.to(A.dtype) for x in (sigma, u, v, residuals, gaps))
        return SingularTriplets(
            *figures,
            steps=1,
            passes=2,
            status=Status.CONVERGED,
            near=(S[k:].to(A.dtype), V[:, k:].to(A.dtype)),
        )
