"""Conjugate gradients on the smaller side, the found triplets deflated.

Eliminating ``p = (A q + φ)/σ`` from K leaves the Schur complement on the shorter side::

    (σ² I − AᵀA) q = σψ + Aᵀφ,        q ⊥ V,

positive definite there with eigenvalues σ² − σ_j², j > k, and σ².  Its condition number is
σ²/(σ² − σ_{k+1}²) ≈ σ/(2·gap), a quarter of that of K itself: the squared condition number of AᵀA
plays no part (docs/errata.md, A26).

What the forward solve saw of the next singular values, (θ_j, z_j), preconditions the few small
eigenvalues away: ``M⁻¹ = I + Z diag(σ²/(σ² − θ²) − 1) Zᵀ`` maps each of them near to σ².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields, optional, whole

from ._system import System, tolerance


@dataclass(frozen=True)
class DeflatedCG:
    """Preconditioned conjugate gradients for all k columns at once.

    Cost: two passes a step over A with k columns, and two more at the ends.

    Attributes:
        rtol: Stop when every residual is below ``rtol`` times its right-hand side; None takes
            eps^¾ in float64 and 3e-4 in float32, where the caller refines the solution.
        max_steps: Steps before giving up; the caller judges by the residual.
    """

    rtol: float | None = None
    max_steps: int = 2000

    def __post_init__(self) -> None:
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(1))

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """See :class:`~bulkedge.triplet.adjoint.AdjointSolver`."""
        A, sigma = system.A, system.sigma
        rhs = torch.zeros_like(system.V) if system.Psi is None else sigma * system.Psi
        if system.Phi is not None:
            rhs = rhs + A.rmatmat(system.Phi)
        Q = self._conjugate_gradients(system, system.outside_v(rhs))
        P = A.matmat(Q) if system.Phi is None else A.matmat(Q) + system.Phi
        return system.outside_u(P / sigma), Q

    def _conjugate_gradients(self, system: System, rhs: Tensor) -> Tensor:
        A, squares = system.A, system.sigma.square()
        eps = torch.finfo(rhs.dtype).eps
        target = tolerance(self.rtol, rhs.dtype) * _norms(rhs)
        theta, Z = system.near
        distance = (squares - theta.square()[:, None]).clamp_min(eps * squares)
        lift = squares / distance - 1  # (b, k)

        def precondition(R: Tensor) -> Tensor:
            return system.outside_v(R + Z @ (lift * (Z.mT @ R)))

        Q = torch.zeros_like(rhs)
        R = rhs
        S = D = precondition(R)
        energy = (R * S).sum(dim=0)
        for _ in range(self.max_steps):
            active = _norms(R) > target
            if not bool(active.any()):
                break
            HD = system.outside_v(squares * D - A.rmatmat(A.matmat(D)))
            curvature = (D * HD).sum(dim=0)
            # Without curvature the gap is below rounding, and a further step would be noise.
            active &= curvature > eps * squares * (D * D).sum(dim=0)
            if not bool(active.any()):
                break
            alpha = torch.where(active, energy / curvature, 0.0)
            Q, R = Q + alpha * D, R - alpha * HD
            S = precondition(R)
            energy, before = (R * S).sum(dim=0), energy
            D = torch.where(active, S + (energy / before) * D, 0.0)
        return Q


def _norms(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=0)
