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
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bulkedge._precision import exact
from bulkedge.triplet import Ritz
from bulkedge.triplet._rounding import UNIT

SLACK = 0.04
"""μ: a cell of σ costs a factor (1 + α + 2μ)/(1 + α) on the squared bound."""
WIDE_SLACK = 0.2
"""μ for the wide intervals of :meth:`ComponentBound.projection`."""
WEIGHT = 0.3
"""α: how much ‖b‖² counts beside ‖a‖²; for small σ they have little to do with each other."""
CELL_GROWTH = 1.25
"""Beyond the largest Ritz value each cell of σ ends at this multiple of where it begins."""
MIN_RADIUS = 1e-7
"""A cell of σ counts as no narrower than this, in units of the largest Ritz value."""
MAX_BISECTIONS = 40
"""Rounds of bisection before a cell counts as above its limit."""
TABLES_UP_TO = 64
"""Up to this size of w the products of its rows are formed once, for the cells all together."""
MAX_CELLS = 4096
"""With more cells than this the bound counts as above its limit: this bounds the memory."""


@dataclass(frozen=True)
class ComponentBound:
    """Bounds the component of k directions on any singular vector, as a function of its σ.

    Attributes:
        ritz: The Ritz vectors of the Krylov space.
        directions: Coordinates of the directions in the left Ritz vectors, shape ``(d, k)``.
        noise: Bound on the error of the recurrences, ``max(‖E₁‖₂, ‖E₂‖₂)``.
    """

    ritz: Ritz
    directions: Tensor
    noise: float

    def evaluate(self, centre: Tensor, radius: Tensor) -> Tensor:
        """Bound on ``⟨y, u⟩²`` for every singular vector u with ``|σ − centre| ≤ radius``.

        Cost: O(G b² d) for G cells and a block of b.

        Args:
            centre: Middle of each cell of σ, shape ``(G,)``.
            radius: Half its width, shape ``(G,)``.

        Returns:
            Shape ``(G, k)``.
        """
        diagonal, root = self._inverse(centre, radius, SLACK)
        bound = diagonal @ self.directions.square() + root.square().sum(dim=1)
        return (1 + WEIGHT + 2 * SLACK) * bound

    def projection(self, centre: float, radius: float) -> Tensor:
        """A matrix M ≥ ``Yᵀ P Y``, P the projection on all u with ``|σ − centre| ≤ radius``.

        Args:
            centre: Middle of the interval of σ.
            radius: Half its width.

        Returns:
            M, shape ``(k, k)``.
        """
        c, r = (torch.tensor([x], dtype=torch.float64) for x in (centre, radius))
        return self.projections(c, r)[0]

    def projections(self, centre: Tensor, radius: Tensor) -> Tensor:
        """:meth:`projection` for several intervals.

        Args:
            centre: Their middles, shape ``(G,)``.
            radius: Half their widths, shape ``(G,)``.

        Returns:
            Shape ``(G, k, k)``.
        """
        diagonal, root = self._inverse(centre, radius, WIDE_SLACK)
        weighted = (self.directions.mT * diagonal[:, None, :]) @ self.directions
        return (1 + WEIGHT + 2 * WIDE_SLACK) * (weighted + root.mT @ root)

    def of(self, chosen: Tensor) -> ComponentBound:
        """The same bound for some of the directions.

        Args:
            chosen: Which, shape ``(k,)``, boolean.

        Returns:
            The bound.
        """
        return ComponentBound(self.ritz, self.directions[:, chosen], self.noise)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """Products of two rows of C, ``(e, b b)``, and of one with a direction."""
        # A border for each cell is then a row of one matrix product.
        C, pairs = self.ritz.lacking, min(len(self.ritz.left), len(self.ritz.right))
        twice = (C[:, None, :] * C[None, :, :]).flatten(0, 1).mT
        once = C[:, :pairs].mT[:, :, None] * self.directions[:pairs, None, :]
        return twice, once.flatten(1)

    def _inverse(self, centre: Tensor, radius: Tensor, slack: float) -> tuple[Tensor, Tensor]:
        """The inverse of the ellipsoid's matrix, on a, for each cell.

        Returns:
            The diagonal of the inverse of the 2×2 blocks, ``(G, d)``, and the root R of what the
            border w adds, ``(G, b, k)``: the directions' form is ``tᵀ diag t + RᵀR``.
        """
        d, e = len(self.ritz.left), len(self.ritz.right)
        s, C = self.ritz.sigma, self.ritz.lacking
        c = centre[:, None]
        # A wider cell is a weaker statement, not a wrong one, and keeps κ within double precision.
        wide = (radius + self.noise).clamp_min(MIN_RADIUS * float(s[0]))
        kappa = slack / wide[:, None].square()
        squares, apart = c.square() + s.square(), (c - s) * (c + s)
        # The determinant and the inverse of the 2×2 block of (a_i, b_i).
        determinant = WEIGHT + kappa * squares * (1 + WEIGHT) + (kappa * apart).square()
        inverse = (WEIGHT + kappa * squares) / determinant
        if len(C) == 0:
            return inverse[:, :d], C.new_zeros(len(centre), 0, self.directions.shape[1])
        stiffness = kappa * (WEIGHT + kappa * (WEIGHT * c.square() + s.square())) / determinant
        coupling = kappa * s * (WEIGHT - kappa * apart) / determinant  # of w with a
        pairs = min(d, e)
        if len(C) <= TABLES_UP_TO:
            twice, once = self._tables
            border = (stiffness[:, :e] @ twice).unflatten(1, (len(C), len(C)))
            right = (coupling[:, :pairs] @ once).unflatten(1, (len(C), -1))
        else:
            border = (C * stiffness[:, None, :e]) @ C.mT  # (G, b, b)
            right = (C[:, :pairs] * coupling[:, None, :pairs]) @ self.directions[:pairs]
        border.diagonal(dim1=-2, dim2=-1).add_(1.0)
        factor = torch.linalg.cholesky(border)
        root = torch.linalg.solve_triangular(factor, right, upper=False)
        # The border is at least I, so that float64 loses no more than b² u ‖border‖ of the form.
        trace = border.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        lost = 8 * len(C) ** 2 * UNIT * trace
        return inverse[:, :d], root * (1 + lost).sqrt()[:, None, None]


class Maximum(NamedTuple):
    """The maximum over σ of a :class:`ComponentBound`, for groups of directions.

    Attributes:
        squared: The squared bound of each group, infinite where it is not below the limit.
        exceeded_at: The largest σ at which a bound was found to reach its limit; 0 if none does.
    """

    squared: Tensor
    exceeded_at: Tensor


def maximize(
    bound: ComponentBound, groups: Tensor, limits: Tensor, span: tuple[float, float, float]
) -> Maximum:
    """The maximum of a bound over σ, for those groups of directions where it is below a limit.

    Cells of σ are bisected until the bound on each is below the limits, or a point in it is not.

    Args:
        bound: The bound for k directions.
        groups: The number of the group of each direction, shape ``(k,)``: tied directions are
            bounded together, by the sum of their bounds.
        limits: What each group's squared bound is to stay below, shape ``(groups,)``.
        span: The range of σ: equal cells from the first to the second number, where most singular
            values lie, and growing cells from there to the third.

    Returns:
        The maximum of each group, shape ``(groups,)``, and where it exceeds the limit.
    """
    members = exact(torch.nn.functional.one_hot(groups, len(limits)))
    squared, exceeded_at = torch.zeros_like(limits), torch.zeros_like(limits)
    centre, radius = _cells(2 * len(bound.ritz.sigma) + 2, *span)
    for bisections in range(MAX_BISECTIONS):
        on_cells = bound.evaluate(centre, radius) @ members  # (G, groups)
        over = (on_cells >= limits) & squared.isfinite()
        squared = torch.maximum(squared, torch.where(over, 0.0, on_cells).amax(dim=0))
        pending = over.any(dim=1)
        if not bool(pending.any()):
            break
        centre, radius, over = centre[pending], radius[pending], over[pending]
        at_centre = bound.evaluate(centre, torch.zeros_like(radius)) @ members
        last = bisections == MAX_BISECTIONS - 1 or len(centre) > MAX_CELLS
        failed = over if last else (at_centre >= limits) & over
        exceeded_at = torch.where(failed, (centre + radius)[:, None], exceeded_at).amax(dim=0)
        squared = torch.where(failed.any(dim=0), torch.inf, squared)
        undecided = (over & squared.isfinite()).any(dim=1)
        centre, radius = centre[undecided], radius[undecided] / 2
        if len(centre) == 0:
            break
        centre, radius = torch.cat([centre - radius, centre + radius]), radius.repeat(2)
    return Maximum(squared, exceeded_at)


class Reached(NamedTuple):
    """Where a :class:`ComponentBound` reaches its limit.

    Attributes:
        places: Some such values of σ; none if the bound is below everywhere.
        excess: The largest squared bound there, in units of its limit; 1 if there are none.
    """

    places: Tensor
    excess: float


def reaches(
    bound: ComponentBound,
    groups: Tensor,
    limits: Tensor,
    span: tuple[float, float, float],
    suspects: Tensor,
) -> Reached:
    """Where the bound of some group reaches its limit; see :func:`maximize`, which goes on.

    Args:
        bound: The bound for k directions.
        groups: The number of the group of each direction, shape ``(k,)``.
        limits: What each group's squared bound is to stay below, shape ``(groups,)``.
        span: The range of σ, as for :func:`maximize`.
        suspects: Values of σ that are tried first.

    Returns:
        Some values of σ, none if the bounds of all groups are below their limits everywhere.
    """
    members = exact(torch.nn.functional.one_hot(groups, len(limits)))

    def excess_on(centre: Tensor, radius: Tensor) -> Tensor:
        on = bound.evaluate(centre, radius) @ members / limits
        return torch.where(limits > 0, on, torch.inf).amax(dim=1)

    centre, radius = _cells(2 * len(bound.ritz.sigma) + 2, *span)
    tried = suspects
    for _ in range(MAX_BISECTIONS):
        if len(tried):
            excess = excess_on(tried, torch.zeros_like(tried))
            if bool((over := excess >= 1).any()):
                return Reached(tried[over], float(excess.max()))
        pending = excess_on(centre, radius) >= 1
        centre, radius = centre[pending], radius[pending] / 2
        if len(centre) == 0 or len(centre) > MAX_CELLS:
            break
        tried = centre
        centre, radius = torch.cat([centre - radius, centre + radius]), radius.repeat(2)
    return Reached(centre, 1.0)


def _cells(count: int, low: float, high: float, furthest: float) -> tuple[Tensor, Tensor]:
    """Centres and radii of equal cells from low to high, and of growing ones on to furthest."""
    edges = torch.linspace(low, high, count, dtype=torch.float64)
    beyond = torch.arange(1, 2 + max(0.0, math.log(furthest / high) / math.log(CELL_GROWTH)))
    edges = torch.cat([edges, high * CELL_GROWTH ** exact(beyond)])
    return (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
