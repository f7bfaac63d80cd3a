"""The four systems of Scholz's note (2023), as corrected (docs/errata.md, A21 to A34).

With Ã = A/σ, P = I − ÃÃᵀ on the left and Q = I − ÃᵀÃ on the right side, and φ ⊥ U, ψ ⊥ V::

    P x = φ,   P y = Ãψ,   Q w = Ãᵀφ,   Q z = ψ;        p = (x + y)/σ,   q = (w + z)/σ.

The push-through identity ``P⁻¹Ã = Ã Q⁻¹`` ties them: y = Ãz and w = Ãᵀx.

*Backward substitution* solves on the side of the cotangent: x and z only, then y and w by a
product; an absent cotangent takes its two solutions with it.  *Forward substitution* solves on the
other side: w from ``Q w = Ãᵀφ`` and y from ``P y = Ãψ``, then ``x = φ + Ãw`` and ``z = ψ + Ãᵀy``.
The note goes through the least-squares solution of ``Aμ = σφ`` instead, which loses the part of φ
outside the range of A (A32).

P and Q are singular in the block.  ``P + τUUᵀ`` is positive definite for τ > σ₁²/σ² − 1 and, on
right-hand sides orthogonal to U, has the same solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bulkedge._fields import check_fields, one_of

from ._system import System


@dataclass(frozen=True)
class PushThrough:
    """Dense solves on either side; a reference that keeps the structure of Scholz's note.

    Cost: forms A, AAᵀ and AᵀA; O(m³ + n³) a column.

    Attributes:
        substitution: ``"backward"`` or ``"forward"``.
    """

    substitution: Literal["backward", "forward"] = "backward"

    def __post_init__(self) -> None:
        check_fields(self, substitution=one_of("backward", "forward"))

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """See :class:`~bulkedge.triplet.adjoint.AdjointSolver`."""
        A = system.A.to_dense()
        columns = [self._column(system, A, i) for i in range(len(system.sigma))]
        p, q = (torch.stack(side, dim=1) for side in zip(*columns, strict=True))
        return system.outside_u(p), system.outside_v(q)

    def _column(self, system: System, A: Tensor, i: int) -> tuple[Tensor, Tensor]:
        sigma = system.sigma[i]
        scaled = A / sigma
        lift = (system.sigma[0] / sigma).square()
        p, q = torch.zeros_like(A[:, 0]), torch.zeros_like(A[0])
        if system.Phi is not None:
            phi = system.Phi[:, i]
            if self.substitution == "backward":
                x = _solve(scaled, system.U, lift, phi)
                w = scaled.mT @ x
            else:
                w = _solve(scaled.mT, system.V, lift, scaled.mT @ phi)
                x = phi + scaled @ w
            p, q = p + x, q + w
        if system.Psi is not None:
            psi = system.Psi[:, i]
            if self.substitution == "backward":
                z = _solve(scaled.mT, system.V, lift, psi)
                y = scaled @ z
            else:
                y = _solve(scaled, system.U, lift, scaled @ psi)
                z = psi + scaled.mT @ y
            p, q = p + y, q + z
        return p / sigma, q / sigma


def _solve(scaled: Tensor, basis: Tensor, lift: Tensor, rhs: Tensor) -> Tensor:
    """``(I − ÃÃᵀ) x = rhs`` on the complement of the basis."""
    eye = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    raised = eye - scaled @ scaled.mT + lift * (basis @ basis.mT)
    # LU, because Cholesky fails where the gap is below rounding.
    return torch.linalg.solve_ex(raised, rhs - basis @ (basis.mT @ rhs)).result
