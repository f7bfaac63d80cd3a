"""Newton's method on the equations of a singular triplet.

The equations ``f(σ, u, v) = (σ − uᵀAv; σ²u − σAv; σ²v − σAᵀu) = 0`` have, at σ ≠ 0, the unit
singular vectors for their only solutions, and the Jacobian

        [ 1          −(Av)ᵀ    −(Aᵀu)ᵀ ]
    J = [ 2σu − Av    σ² I      −σ A   ]
        [ 2σv − Aᵀu  −σ Aᵀ      σ² I   ]

is nonsingular at a simple triplet: its eigenvalues are 2σ², ``(1 ± √(1 − 8σ²))/2``, ``σ² ± σσ_i``
and σ².  They mix powers of σ, so that a small A makes J ill-conditioned for no reason; Newton's
method does not care for the scale, and is here applied to A/σ.
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
    normalised_pair,
    relative_tolerance,
    solve_nearly_singular,
    warmed_up,
)
from ._start import Randomness


@dataclass(frozen=True)
class Newton:
    """Newton's method with the full Jacobian, ``x ← x − J⁻¹f``: quadratic, for small matrices.

    Newton's method converges to the triplet that it is near, not to the top one, so block Krylov
    iteration leads it there first (``warmup``).  The steps after that square the error.

    Cost: the passes of the warm-up, then two a step, two for each triplet, and two.  A step forms
    the matrix and solves ``1 + m + n`` equations: O((m + n)³) operations, (m + n)² memory.

    Source: Newton's method as inverse iteration, Peters and Wilkinson, SIAM Review 21 (1979),
    doi:10.1137/1021052.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype
            (1.8e-12 in float64, 6.4e-6 in float32).
        max_steps: Newton steps for each triplet before giving up; 0 for the warm-up alone.
        warmup: The warm-up ends when every residual is below this part of the gap between its
            value and the next.

    Example:
        >>> from bulkedge.triplet import singular_triplet
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> round(singular_triplet(A, solver=Newton()).sigma.item(), 12)
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
        return iterate(A, v, _newton_step, goal, self.max_steps)


def _newton_step(A: LinearMap, at: VectorPair) -> VectorPair:
    """Solve ``J d = f`` for A/σ, and subtract."""
    u, v, a, b = at.u, at.v, at.Av / at.sigma, at.Atu / at.sigma
    m = len(u)
    unknowns = 1 + m + len(v)
    J = torch.eye(unknowns, dtype=u.dtype, device=u.device)
    J[0, 1:] = -torch.cat([a, b]).squeeze(1)
    J[1:, :1] = torch.cat([2 * u - a, 2 * v - b])
    J[1 : m + 1, m + 1 :] = A.to_dense() / -at.sigma
    J[m + 1 :, 1 : m + 1] = J[1 : m + 1, m + 1 :].mT
    f = torch.cat([1 - u.mT @ a, u - a, v - b])
    d = solve_nearly_singular(J, f)
    # u and v are normalised, σ is Newton's own: with the Rayleigh quotient in its place this would
    # be a Rayleigh-quotient iteration.
    return normalised_pair(A, u - d[1 : m + 1], v - d[m + 1 :], sigma=at.sigma * (1 - d[0, 0]))
