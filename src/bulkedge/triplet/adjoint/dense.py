"""The sum over all other triplets: the textbook formula and the oracle."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bulkedge.triplet._thin_svd import thin_svd

from ._system import System


@dataclass(frozen=True)
class ExplicitSVD:
    """The solution in the basis of a full SVD; a reference.

    With the thin SVD (u_j, σ_j, v_j), j beyond the block::

        p = Σ_j u_j (σ u_jᵀφ + σ_j v_jᵀψ)/(σ² − σ_j²) + (φ − UUᵀφ)/σ
        q = Σ_j v_j (σ_j u_jᵀφ + σ v_jᵀψ)/(σ² − σ_j²)

    for m ≥ n.  Forgetting the last term of p is the classic bug of rectangular matrices.

    Cost: forms A; one full SVD.
    """

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """See :class:`~bulkedge.triplet.adjoint.AdjointSolver`."""
        Phi, Psi = system.filled
        k, sigma = len(system.sigma), system.sigma
        U, S, V = thin_svd(system.A.to_dense())
        U, S, V = U[:, k:], S[k:, None], V[:, k:]
        a, b = U.mT @ Phi, V.mT @ Psi  # (n − k, k)
        resolvent = 1 / (sigma.square() - S.square())
        p = U @ (resolvent * (sigma * a + S * b)) + (Phi - U @ a) / sigma
        q = V @ (resolvent * (S * a + sigma * b))
        return system.outside_u(p), system.outside_v(q)
