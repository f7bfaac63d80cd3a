"""How large a component on *any* singular vector of a matrix can be, seen from a Krylov space.

Let P, Q be the bases of a :class:`Bidiagonalization` of W0 with ``B = X S Yᵀ``, and (u, v, σ) any
singular triplet of W0.  With ``a = (PX)ᵀu``, ``b = (QY)ᵀv`` and ``w = P₊ᵀu`` the recurrences say

    σ a_i = s_i b_i,      σ b_i = s_i a_i + C_iᵀw,      C = L Y,

while ``‖a‖² + ‖w‖² ≤ 1`` and ``‖b‖² ≤ 1``.  So what (a, b, w) can be is, for each σ, an ellipsoid,
and ``|⟨y, u⟩|`` for y in the span of P is at most its extent in the direction of y.  For a space
grown from y alone this is the Christoffel function of the spectral measure of y, which bounds the
atoms of a measure by its moments (Akhiezer, The Classical Moment Problem, 1965, ch. 2).  Here no
polynomial is formed and nothing is divided by a block that is nearly singular.

For all σ in ``[c − h, c + h]`` at once: the equations hold at c up to ``h(‖a‖² + ‖b‖²)^½``, hence

    ‖a‖² + α‖b‖² + ‖w‖² + κ Σ_i [(c a_i − s_i b_i)² + (c b_i − s_i a_i − C_iᵀw)²]  ≤  1 + α + 2μ

with ``κ = μ/h²``, for any α, μ > 0: one ellipsoid that holds them all.  Its matrix is 2×2 blocks
bordered by w, so that its inverse costs a factorisation of the size of w for each c.  The same
ellipsoid bounds the norm of y's projection on *all* the u_i with σ_i in the interval: a unit vector
in their span obeys the same equations, with ``v = Σ α_i v_i`` for ``u = Σ α_i u_i``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge.triplet import Ritz
from bulkedge.triplet._rounding import UNIT

SLACK = 0.04
"""μ: what an interval of σ costs, a factor (1 + α + 2μ)/(1 + α) on the squared bound."""
WIDE_SLACK = 0.2
"""The same for the one wide interval of :meth:`Extent.form`."""
WEIGHT = 0.3
"""α: how much ‖b‖² counts beside ‖a‖²; for small σ they have little to do with each other."""
WIDER = 1.25
"""From cell to cell beyond the largest Ritz value."""
NARROWEST = 1e-7
"""Radius of the narrowest interval, over the largest Ritz value."""
FINEST = 40
"""Rounds of bisection at most."""
CELLS = 4096
"""Intervals looked at in one go: what bounds the memory."""


@dataclass(frozen=True)
class Extent:
    """The bound of :mod:`bulkedge.intruder._bound` for given directions.

    Attributes:
        ritz: The space.
        directions: Their coordinates in the left Ritz vectors, shape ``(d, k)``.
        noise: To what the recurrences hold.
    """

    ritz: Ritz
    directions: Tensor
    noise: float

    def over(self, centre: Tensor, radius: Tensor) -> Tensor:
        """Bound on ``⟨y, u⟩²`` for every singular vector u with ``|σ − centre| ≤ radius``.

        Cost: O(G b² d) for G intervals and a block of b.

        Args:
            centre: Shape ``(G,)``.
            radius: Shape ``(G,)``.

        Returns:
            Shape ``(G, k)``.
        """
        alone, half = self._parts(centre, radius, SLACK)
        bound = alone @ self.directions.square() + half.square().sum(dim=1)
        return (1 + WEIGHT + 2 * SLACK) * bound

    def form(self, centre: float, radius: float) -> Tensor:
        """The same for all directions together: no ``Yᵀ P Y`` is larger, P the projection."""
        c, r = (torch.tensor([x], dtype=torch.float64) for x in (centre, radius))
        (alone,), (half,) = self._parts(c, r, WIDE_SLACK)
        own = (self.directions.mT * alone) @ self.directions
        return (1 + WEIGHT + 2 * WIDE_SLACK) * (own + half.mT @ half)

    def _parts(self, centre: Tensor, radius: Tensor, slack: float) -> tuple[Tensor, Tensor]:
        """The inverse's diagonal on a, ``(G, d)``, and the root of what w adds, ``(G, b, k)``."""
        d, e = len(self.ritz.left), len(self.ritz.right)
        s, C = self.ritz.sigma, self.ritz.lacking
        c = centre[:, None]
        # a wider interval is a weaker statement, no wrong one, and keeps κ within double precision
        wide = (radius + self.noise).clamp_min(NARROWEST * float(s[0]))
        kappa = slack / wide[:, None].square()
        squares, apart = c.square() + s.square(), (c - s) * (c + s)
        # of the 2×2 block of (a_i, b_i)
        determinant = WEIGHT + kappa * squares * (1 + WEIGHT) + (kappa * apart).square()
        inverse = (WEIGHT + kappa * squares) / determinant
        if len(C) == 0:
            return inverse[:, :d], C.new_zeros(len(centre), 0, self.directions.shape[1])
        stiff = kappa * (WEIGHT + kappa * (WEIGHT * c.square() + s.square())) / determinant
        border = (C * stiff[:, None, :e]) @ C.mT  # (G, b, b)
        border.diagonal(dim1=-2, dim2=-1).add_(1.0)
        moved = kappa * s * (WEIGHT - kappa * apart) / determinant  # how w moves a
        pairs = min(d, e)
        right = (C[:, :pairs] * moved[:, None, :pairs]) @ self.directions[:pairs]  # (G, b, k)
        root = torch.linalg.cholesky(border)
        half = torch.linalg.solve_triangular(root, right, upper=False)
        # The border is at least I, so that float64 loses no more than b² u ‖border‖ of the form.
        trace = border.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        lost = 8 * len(C) ** 2 * UNIT * trace
        return inverse[:, :d], half * (1 + lost).sqrt()[:, None, None]


def largest(
    extent: Extent, groups: Tensor, limits: Tensor, span: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """The maximum of the bound over σ, for those directions where it stays below a limit.

    Intervals of σ are bisected until each is below the limits, or a point in it is not.

    Args:
        extent: The bound for k directions.
        groups: The number of the group of each direction, shape ``(k,)``: tied directions are
            bounded together, by the sum of their bounds.
        limits: What each group's squared bound is to stay below, shape ``(groups,)``.
        span: Where to look for σ: from the first to the second number, and in widening cells on to
            the third, where there is not much to be expected.

    Returns:
        The squared bound of each group, shape ``(groups,)``, infinite where it is not below the
        limit; and up to which σ a point was found where it is not, 0 without one.
    """
    low, high, furthest = span
    together = torch.nn.functional.one_hot(groups, len(limits)).double()
    bound, where = torch.zeros_like(limits), torch.zeros_like(limits)
    edges = torch.linspace(low, high, 2 * len(extent.ritz.sigma) + 2, dtype=torch.float64)
    beyond = torch.arange(1, 2 + max(0.0, math.log(furthest / high) / math.log(WIDER)))
    edges = torch.cat([edges, high * WIDER ** beyond.double()])
    centre, radius = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    for turn in range(FINEST):
        found = extent.over(centre, radius) @ together  # (G, groups)
        over = (found >= limits) & bound.isfinite()
        bound = torch.maximum(bound, torch.where(over, 0.0, found).amax(dim=0))
        pending = over.any(dim=1)
        if not bool(pending.any()):
            break
        centre, radius, over = centre[pending], radius[pending], over[pending]
        exact = extent.over(centre, torch.zeros_like(radius)) @ together
        failed = over if turn == FINEST - 1 or len(centre) > CELLS else (exact >= limits) & over
        where = torch.where(failed, (centre + radius)[:, None], where).amax(dim=0)
        bound = torch.where(failed.any(dim=0), torch.inf, bound)
        open_still = (over & bound.isfinite()).any(dim=1)
        centre, radius = centre[open_still], radius[open_still] / 2
        if len(centre) == 0:
            break
        centre, radius = torch.cat([centre - radius, centre + radius]), radius.repeat(2)
    return bound, where
