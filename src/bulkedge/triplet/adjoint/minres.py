"""MINRES on K itself: Paige, Saunders, SIAM J. Numer. Anal. 12 (1975), doi:10.1137/0712047."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields, optional, whole

from ._system import System, tolerance


@dataclass(frozen=True)
class Minres:
    """Minimal residuals on the (m + n)-dimensional system K, for all k columns at once.

    Needs no elimination and no definiteness, at about twice the steps of :class:`DeflatedCG`: the
    condition number of K is four times larger, and its spectrum lies on both sides of σ.

    Cost: two passes a step over A with k columns.

    Attributes:
        rtol: Stop when every residual is below ``rtol`` times its right-hand side; None takes
            eps^¾ in float64 and 3e-4 in float32, where the caller refines the solution.
        max_steps: Steps before giving up; the caller judges by the residual.
    """

    rtol: float | None = None
    max_steps: int = 4000

    def __post_init__(self) -> None:
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(1))

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """See :class:`~bulkedge.triplet.adjoint.AdjointSolver`."""
        m = system.A.shape[0]
        z = torch.cat(system.filled)  # (m + n, k), the next Lanczos vector
        beta = torch.linalg.vector_norm(z, dim=0)
        target = tolerance(self.rtol, z.dtype) * beta
        z = z / _nonzero(beta)
        z_old = w = w_old = x = torch.zeros_like(z)
        eta = beta  # the residual norm, with sign
        beta_old = torch.zeros_like(beta)
        cos = cos_old = torch.ones_like(beta)
        sin = sin_old = torch.zeros_like(beta)
        for _ in range(self.max_steps):
            active = eta.abs() > target
            if not bool(active.any()):
                break
            Kz = self._product(system, z)
            alpha = (z * Kz).sum(dim=0)
            following = Kz - alpha * z - beta_old * z_old
            # Rounding would otherwise drift into the null space.
            following = torch.cat(
                [system.outside_u(following[:m]), system.outside_v(following[m:])]
            )
            beta = torch.linalg.vector_norm(following, dim=0)
            # Apply the two last rotations to the new column of the tridiagonal matrix.
            rho3 = sin_old * beta_old
            rho2 = sin * alpha + cos * cos_old * beta_old
            diagonal = cos * alpha - sin * cos_old * beta_old
            rho1 = _nonzero(torch.hypot(diagonal, beta))
            cos_old, sin_old, cos, sin = cos, sin, diagonal / rho1, beta / rho1
            w, w_old = (z - rho3 * w_old - rho2 * w) / rho1, w
            x = x + torch.where(active, cos * eta, 0.0) * w
            eta = torch.where(active, -sin * eta, eta)
            z, z_old, beta_old = following / _nonzero(beta), z, beta
        return system.outside_u(x[:m]), system.outside_v(x[m:])

    @staticmethod
    def _product(system: System, z: Tensor) -> Tensor:
        A, sigma = system.A, system.sigma
        p, q = z[: A.shape[0]], z[A.shape[0] :]
        return torch.cat([sigma * p - A.matmat(q), sigma * q - A.rmatmat(p)])


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)
