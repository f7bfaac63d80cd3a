"""What the methods for one pair of vectors share: their loop, their start, and deflation.

The second triplet of A is the first of ``A − σ₁u₁v₁ᵀ`` (Hotelling's deflation): a method that finds
one finds k, one after the other.  Rayleigh-Ritz on all the v at the end corrects the errors that
the deflation with an inexact v₁ has made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap, LowRank, Sum
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._thin_svd import thin_svd

from ._start import Randomness
from .block_krylov import BlockKrylov


class VectorPair(NamedTuple):
    """An approximate singular triplet, and the products that judge it.

    Attributes:
        u: Unit left vector, shape ``(m, 1)``.
        v: Unit right vector, shape ``(n, 1)``.
        Av: Shape ``(m, 1)``.
        Atu: ``Aᵀu``, shape ``(n, 1)``.
        sigma: σ, 0-dimensional.
        residual: ``‖[Av − σu; Aᵀu − σv]‖₂``, 0-dimensional.
    """

    u: Tensor
    v: Tensor
    Av: Tensor
    Atu: Tensor
    sigma: Tensor
    residual: Tensor


class Starts(NamedTuple):
    """Where the searches begin.

    Attributes:
        v: A guess of each right vector, shape ``(n, k)``.
        below: The (k+1)-th singular value, shape ``(1,)``, if it is known.
        passes: Passes that were spent to find these.
    """

    v: Tensor
    below: Tensor | None = None
    passes: int = 0


class Found(NamedTuple):
    """Where a search for one triplet ended, after how many steps and passes."""

    pair: VectorPair
    steps: int
    passes: int


@dataclass(frozen=True)
class Goal:
    """When a pair is good enough: relative to σ₁ of the matrix, not of what deflation left of it.

    Attributes:
        rtol: The tolerance of the solver.
        scale: σ₁, or 0 while it is sought.
    """

    rtol: float
    scale: Tensor

    def tolerance(self, pair: VectorPair) -> Tensor:
        """The residual allowed: half of what is promised; deflation may add the other half."""
        return 0.5 * self.rtol * torch.maximum(pair.sigma, self.scale)

    def reached(self, pair: VectorPair) -> bool:
        """Whether the pair is good enough."""
        return bool(pair.residual <= self.tolerance(pair))


Search = Callable[[LinearMap, Tensor, Goal], Found]


def relative_tolerance(rtol: float | None, dtype: torch.dtype) -> float:
    """``rtol``, or eps^¾ of the dtype."""
    return torch.finfo(dtype).eps ** 0.75 if rtol is None else rtol


def unit(x: Tensor) -> Tensor:
    """``x / ‖x‖``; the zero vector stays."""
    return x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)


def vector_pair(
    u: Tensor, v: Tensor, Av: Tensor, Atu: Tensor, sigma: Tensor | None = None
) -> VectorPair:
    """The pair with its residual; σ is the Rayleigh quotient ``uᵀAv`` unless it is given."""
    sigma = (u * Av).sum() if sigma is None else sigma
    norm = torch.linalg.vector_norm
    return VectorPair(
        u, v, Av, Atu, sigma, torch.hypot(norm(Av - sigma * u), norm(Atu - sigma * v))
    )


def normalised_pair(A: LinearMap, u: Tensor, v: Tensor, sigma: Tensor | None = None) -> VectorPair:
    """The pair of the two vectors, brought to unit length; two passes."""
    u, v = unit(u), unit(v)
    return vector_pair(u, v, A.matmat(v), A.rmatmat(u), sigma)


def pair_of_right(A: LinearMap, v: Tensor) -> VectorPair:
    """The best u for a given v, ``Av / ‖Av‖``; two passes."""
    v = unit(v)
    Av = A.matmat(v)
    u = unit(Av)
    return vector_pair(u, v, Av, A.rmatmat(u))


def iterate(
    A: LinearMap,
    v: Tensor,
    step: Callable[[LinearMap, VectorPair], VectorPair],
    goal: Goal,
    max_steps: int,
) -> Found:
    """Repeat ``step``, of two passes, from ``v`` to the goal or the limit; return the best pair."""
    best = pair = pair_of_right(A, v)
    steps = 0
    while not goal.reached(best) and steps < max_steps:
        pair = step(A, pair)
        steps += 1
        # A Newton method that was started too far off may diverge; NaN compares false.
        best = pair if bool(pair.residual < best.residual) else best
    return Found(best, steps, passes=2 + 2 * steps)


def by_deflation(A: LinearMap, starts: Starts, search: Search, rtol: float) -> SingularTriplets:
    """A triplet for each of the starts, by deflation, and Rayleigh-Ritz at the end.

    Cost: k searches, and two passes.

    Args:
        A: Shape ``(m, n)``, m ≥ n.
        starts: A guess of each right vector, and the (k+1)-th singular value if that is known.
        search: From a map and a guess to the leading triplet of the map.
        rtol: Residual promised, in units of σ₁.

    Returns:
        k triplets with orthonormal vectors, descending.
    """
    (m, n), k = A.shape, starts.v.shape[1]
    U, S, V = starts.v.new_empty(m, 0), starts.v.new_empty(0), starts.v.new_empty(n, 0)
    steps, passes = 0, starts.passes
    for column in range(k):
        rest = Sum([A, LowRank(-U * S, V.mT)]) if column else A
        goal = Goal(rtol, S[:1].sum())
        found = search(rest, starts.v[:, column : column + 1], goal)
        U = torch.cat([U, found.pair.u], dim=1)
        S = torch.cat([S, found.pair.sigma.reshape(1)])
        V = torch.cat([V, found.pair.v], dim=1)
        steps, passes = steps + found.steps, passes + found.passes
    # Beyond the rank a search returns any v; QR makes the columns independent.
    V = torch.linalg.qr(V).Q
    W = A.matmat(V)
    u, sigma, Y = thin_svd(W)
    v = V @ Y
    residuals = torch.hypot(
        torch.linalg.vector_norm(W @ Y - u * sigma, dim=0),
        torch.linalg.vector_norm(A.rmatmat(u) - v * sigma, dim=0),
    )
    converged = bool((residuals <= rtol * sigma[0]).all())
    known = sigma
    if starts.below is not None:
        known = torch.cat([sigma, starts.below.clamp_max(sigma[-1])])
    return SingularTriplets(
        sigma,
        u,
        v,
        residuals,
        neighbour_gaps(known, k, complete=k == n),
        steps=steps,
        passes=passes + 2,
        status=Status.CONVERGED if converged else Status.MAX_STEPS,
    )


def warmed_up(
    A: LinearMap,
    k: int,
    start: Tensor | None,
    generator: Randomness,
    *,
    rtol: float,
    fraction: float,
) -> Starts:
    """Block Krylov iteration, no further than a Newton method needs to find the right triplet.

    Newton's method and the Rayleigh-quotient iteration converge to the triplet they are nearest
    to.  Within the residual of a Ritz value there is a singular value.  Once the residual is a
    small part of the gap to the next Ritz value, the nearest triplet is the right one.  Where
    singular values coincide there is no gap, and the iteration runs to ``rtol``.

    Args:
        A: Shape ``(m, n)``, m ≥ n.
        k: How many triplets.
        start: A guess of the right vectors, or None.
        generator: Source of the rest.
        rtol: The tolerance of the solver: no need to be better.
        fraction: What part of its gap each residual may be.

    Returns:
        The rough right vectors, the value below them, and the passes that they took.
    """
    # A start may be a lower triplet, slightly tilted.  Only a fine tolerance shows that it is not
    # the leading one.
    rough, passes = (0.1 if start is None else 0.5 * rtol), 0
    while True:
        warm = BlockKrylov(rtol=rough).compute(A, k, start, generator)
        passes += warm.passes
        enough = torch.maximum(fraction * warm.gaps, 0.5 * rtol * warm.sigma[:1])
        ready = bool((warm.residuals <= enough).all())
        if ready or rough <= 0.5 * rtol or warm.status is not Status.CONVERGED:
            return Starts(warm.v, None if warm.near is None else warm.near[0][:1], passes)
        start = warm.v if warm.near is None else torch.cat([warm.v, warm.near[1]], dim=1)
        rough = max(0.1 * rough, 0.5 * rtol)


def solve_nearly_singular(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` by LU, where the matrix may be singular to rounding or exactly.

    Near a solution these systems are meant to be singular: the answer is then large, and its
    direction is that of the null vector, which is the answer sought (Peters and Wilkinson, SIAM
    Review 21 (1979), doi:10.1137/1021052).  A pivot that vanishes is replaced by one of the size
    of its rounding error, as LAPACK's inverse iteration does.

    Args:
        matrix: Shape ``(n, n)``.
        right: Shape ``(n, b)``.

    Returns:
        Shape ``(n, b)``.
    """
    LU, order, _ = torch.linalg.lu_factor_ex(matrix)
    pivots = LU.diagonal()
    rounding = torch.finfo(matrix.dtype).eps * matrix.abs().max()
    pivots.copy_(torch.where(pivots.abs() < rounding, rounding, pivots))
    return torch.linalg.lu_solve(LU, order, right)
