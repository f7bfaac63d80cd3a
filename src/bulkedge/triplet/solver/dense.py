"""LAPACK's divide-and-conquer SVD of the formed matrix: the oracle and the last resort."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps


@dataclass(frozen=True)
class DenseSVD:
    """All singular triplets by one full SVD, of which k are kept.

    Cost: O(mn·min(m, n)) and several copies of the matrix.
    """

    def compute(self, A: LinearMap, k: int, generator: torch.Generator) -> SingularTriplets:
        """The k leading triplets; nothing is drawn from ``generator``."""
        U, S, Vt = torch.linalg.svd(A.to_dense(), full_matrices=False)
        u, sigma, v = U[:, :k], S[:k], Vt[:k].mT
        residuals = torch.hypot(
            torch.linalg.vector_norm(A.matmat(v) - u * sigma, dim=0),
            torch.linalg.vector_norm(A.rmatmat(u) - v * sigma, dim=0),
        )
        return SingularTriplets(
            sigma, u, v, residuals, neighbour_gaps(S, k), steps=1, passes=2, status=Status.CONVERGED
        )
