"""The bordered system: no projection needed, the multipliers take up what is not orthogonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._system import System


@dataclass(frozen=True)
class KKT:
    """One dense LU solve of ``[[K, E], [Eᵀ, 0]]`` a column, E = blockdiag(U, V); a reference.

    The matrix of order m + n + 2k is symmetric, indefinite and nonsingular wherever σ_i > σ_{k+1}.

    Cost: forms A; O((m + n)³) a column.
    """

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """See :class:`~bulkedge.triplet.adjoint.AdjointSolver`."""
        (m, n), k = system.A.shape, len(system.sigma)
        E = torch.block_diag(system.U, system.V)
        rhs = torch.cat([*system.filled, E.new_zeros(2 * k, k)])
        x = torch.empty(m + n, k, dtype=E.dtype, device=E.device)
        for i, K in enumerate(formed(system)):
            bordered = torch.cat(
                [torch.cat([K, E], dim=1), torch.cat([E.mT, E.new_zeros(2 * k, 2 * k)], dim=1)]
            )
            x[:, i] = torch.linalg.solve_ex(bordered, rhs[:, i]).result[: m + n]
        return x[:m], x[m:]


def formed(system: System) -> list[Tensor]:
    """The matrix K_i of each column, shape ``(m + n, m + n)``."""
    A = system.A.to_dense()
    m, n = A.shape
    zero = torch.block_diag(A.new_zeros(m, m), A.new_zeros(n, n))
    zero[:m, m:], zero[m:, :m] = -A, -A.mT
    eye = torch.eye(m + n, dtype=A.dtype, device=A.device)
    return [zero + s * eye for s in system.sigma]
