"""LAPACK's divide-and-conquer SVD of the formed matrix: the oracle and the last resort."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge._precision import exact
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._thin_svd import thin_svd

from ._start import Randomness


@dataclass(frozen=True)
class DenseSVD:
    """All singular triplets by one full SVD in float64, of which k are kept.

    Cost: O(mn·min(m, n)) and several copies of the matrix in float64.

    It multiplies ``to_dense()``, not the map: residuals say nothing of ``matmat`` and ``rmatmat``.
    """

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets; a start helps nothing here, and nothing is drawn."""
        matrix = exact(A.to_dense())
        U, S, V = thin_svd(matrix)
        u, sigma, v = U[:, :k], S[:k], V[:, :k]
        residuals = torch.hypot(
            torch.linalg.vector_norm(matrix @ v - u * sigma, dim=0),
            torch.linalg.vector_norm(matrix.mT @ u - v * sigma, dim=0),
        )
        gaps = neighbour_gaps(S, k, complete=True)
        figures = (x.to(A.device, A.dtype) for x in (sigma, u, v, residuals, gaps))
        return SingularTriplets(
            *figures,
            steps=1,
            passes=2,
            status=Status.CONVERGED,
            near=(S[k:].to(A.device, A.dtype), V[:, k:].to(A.device, A.dtype)),
        )
