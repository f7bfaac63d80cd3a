"""The augmented least squares of Scholz's note (2023): K with the constraints as further rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._system import System
from .kkt import formed


@dataclass(frozen=True)
class AugmentedLeastSquares:
    """``min ‖[K; σUᵀ 0; 0 σVᵀ] x − [φ; ψ; 0; 0]‖`` by QR, one column after the other; a reference.

    The matrix is tall with full column rank and the system consistent, so the minimiser is the
    solution.  Constraint rows are scaled by σ, so that the scale of A does not change the
    conditioning (docs/errata.md, A14).  The driver is named because torch's default on the CPU,
    ``gelsy``, reads memory that it never wrote (https://github.com/pytorch/pytorch/issues/71222).

    Cost: forms A; O((m + n)³) a column.
    """

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """See :class:`~bulkedge.triplet.adjoint.AdjointSolver`."""
        m, k = system.A.shape[0], len(system.sigma)
        E = torch.block_diag(system.U, system.V)
        rhs = torch.cat([*system.filled, E.new_zeros(2 * k, k)])
        columns = [
            torch.linalg.lstsq(torch.cat([K, s * E.mT]), rhs[:, i : i + 1], driver="gels").solution
            for i, (K, s) in enumerate(zip(formed(system), system.sigma, strict=True))
        ]
        x = torch.cat(columns, dim=1)
        return x[:m], x[m:]
