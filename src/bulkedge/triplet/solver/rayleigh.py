"""Rayleigh-quotient iteration on ``[[0, A], [Aᵀ, 0]]``, reduced to the shorter side.

The eigenvalues of that matrix are ±σ_i, the eigenvectors ``[u; ±v]``.  A step solves

    −σx + Ay = u,    Aᵀx − σy = v,        σ = uᵀAv,

and takes x and y, each brought to unit length, for u and v.  The first equation gives
``x = (Ay − u)/σ``, and with it the second is ``(AᵀA − σ²) y = σv + Aᵀu``: n equations for m + n.
The squares do no harm where σ is the largest singular value, as it is after deflation: relative to
its norm this matrix has the gap ``1 − (σ₂/σ₁)²``, wider than that of the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import POSITIVE, TOLERANCE, check_fields, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets

from ._deflation import (
    Found,
    Goal,
    VectorPair,
    by_deflation,
    iterate,
    relative_tolerance,
    solve_nearly_singular,
    unit,
    vector_pair,
    warmed_up,
)
from ._start import Randomness


@dataclass(frozen=True)
class RayleighQuotient:
    """Rayleigh-quotient iteration: cubic, for matrices with a short side.

    It converges to the triplet that it is near, not to the top one, so block Krylov iteration leads
    it there first (``warmup``).  The steps after that cube the error.  The systems become singular
    as σ converges; the solution is then long, and its direction the one sought.

    Cost: the passes of the warm-up, then two a step, two for each triplet, and two.  A step forms
    the matrix and solves n equations: O(mn² + n³) operations, n = min(m, n).

    Source: Parlett, Math. Comp. 28 (1974), doi:10.1090/S0025-5718-1974-0405823-3.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype
            (1.8e-12 in float64, 6.4e-6 in float32).
        max_steps: Steps for each triplet before giving up, the warm-up not counted.
        warmup: The warm-up ends when every residual is below this part of the gap between its
            value and the next.

    Example:
        >>> from bulkedge.triplet import singular_triplet
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> round(singular_triplet(A, solver=RayleighQuotient()).sigma.item(), 12)
        3.0
    """

    rtol: float | None = None
    max_steps: int = 20
    warmup: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(0), warmup=POSITIVE)

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n; ``start`` and the generator serve the warm-up."""
        rtol = relative_tolerance(self.rtol, A.dtype)
        return by_deflation(
            A,
            warmed_up(A, k, start, generator, rtol=rtol, fraction=self.warmup),
            self._search,
            rtol,
        )

    def _search(self, A: LinearMap, v: Tensor, goal: Goal) -> Found:
        return iterate(A, v, _rayleigh_step, goal, self.max_steps)


def _rayleigh_step(A: LinearMap, at: VectorPair) -> VectorPair:
    """One step, two passes: ``Ay`` serves x and the next judgement."""
    matrix = A.to_dense()
    shifted = matrix.mT @ matrix
    shifted.diagonal().sub_(at.sigma.square())
    y = solve_nearly_singular(shifted, at.sigma * at.v + at.Atu)
    v = unit(y)
    Av = A.matmat(v)
    u = unit(Av - at.u / torch.linalg.vector_norm(y))  # σx/‖y‖
    return vector_pair(u, v, Av, A.rmatmat(u))
