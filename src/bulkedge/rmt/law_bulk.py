"""Bulks that a law gives, by quadrature: of singular values, and of eigenvalues.

A law on [a, b] is integrated over the angle φ, ``s = a + (b − a) sin²(φ/2)``, in which an edge like
a square root is smooth.  Intervals halve towards both ends, so no pole beyond an edge is nearer to
one than its own length, and 16 nodes on each are exact to rounding, far from the edge as at it.  A
point near an end is stored as its distance from there, which is exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._arc import gauss_legendre
from ._arrays import Array, count, enter_finite, enter_real, slack
from ._law import Law
from .bulk import Bulk, Spike, Traces, checked_shape

NODES = 16
"""Gauss–Legendre nodes on each interval."""
NEAREST_SPACINGS = 64.0
"""The intervals that halve towards an edge end this many float spacings from it."""
MASS_TOLERANCE = 1e-6
"""The integral of a density may differ from one by this much."""
HARD_EDGE_DENSITY = 1e-6
"""An edge is hard if the density there, over its mean, exceeds this; rounding leaves √eps."""


class LawBulk(Bulk):
    """The bulk of a large m×n matrix whose singular values follow a law.

    ``φ_u(z) = (1/m)[p·∫ z/(z² − s²) dμ(s) + (m − p)/z]``, p = min(m, n), and so on, by quadrature:
    right to 1e-12 and better for densities that are smooth inside.  Where the density breaks off at
    the edge, or an atom lies there, D(b⁺) is infinite and the threshold 0.

    Args:
        law: Of the p singular values; on a bounded interval of numbers ≥ 0.
        shape: ``(m, n)``.

    Raises:
        InputError: If the law is not one of singular values, is not on a bounded interval, or its
            density does not integrate to one.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221.

    Example:
        >>> from bulkedge.rmt import SingularValueLaw, WhiteBulk
        >>> bulk = LawBulk(SingularValueLaw.of((100, 400)), (100, 400))
        >>> abs(bulk.threshold / WhiteBulk((100, 400)).threshold - 1) < 1e-12
        True
    """

    def __init__(self, law: Law, shape: tuple[int, int]) -> None:
        self.shape = checked_shape(shape)
        self.law = law
        low, self._edge = law.support()
        if low < 0:
            raise InputError(
                f"expected a law of singular values, got one from {low:.6g} on; for eigenvalues "
                "take SymmetricLawBulk"
            )
        # The integrand is z/(z² − s²) = ½/(z − s) + ½/(z + s).
        self._low = low
        self._below, self._above = _ends(law)

    @property
    def edge(self) -> float:
        """See :attr:`Bulk.edge`."""
        return self._edge

    @property
    def threshold(self) -> float:
        """See :attr:`Bulk.threshold`."""
        return 0.0 if self._below.hard else super().threshold

    def traces(self, z: Tensor) -> Traces:
        """See :meth:`Bulk.traces`."""
        m, n = self.shape
        p = min(m, n)
        near, near_slope = self._below.stieltjes(z - self._edge)
        far, far_slope = self._above.stieltjes(z + self._low)
        total, slope = p * (near + far) / 2, p * (near_slope + far_slope) / 2
        return Traces(
            (total + (m - p) / z) / m,
            (total + (n - p) / z) / n,
            (slope - (m - p) / z.square()) / m,
            (slope - (n - p) / z.square()) / n,
        )


class SymmetricLawBulk:
    """The bulk of a large symmetric N×N matrix whose eigenvalues follow a law.

    With ``G(z) = ∫ dμ(x)/(z − x)`` outside [a, b], for a spike θ of either sign added along a unit
    vector that is independent of the matrix, ``W + θ e eᵀ``:

        threshold  1/G(b⁺) for θ > 0, −1/G(a⁻) for θ < 0, both for |θ|
        location   G(λ) = 1/θ
        overlap    −1/(θ² G'(λ))
        sd         √(2(−G'(λ) − G(λ)²)/N) / −G'(λ)

    Args:
        law: Of the eigenvalues; on a bounded interval.
        size: N.

    Raises:
        InputError: If the law is not on a bounded interval, its density does not integrate to one,
            or the size is no whole number ≥ 1.

    References:
        Benaych-Georges and Nadakuditi, arXiv:0910.2120.

    Example:
        >>> from bulkedge.rmt import Semicircle
        >>> round(SymmetricLawBulk(Semicircle(10.0), 100).spike(-20.0).location, 9)
        -25.0
    """

    def __init__(self, law: Law, size: int) -> None:
        size = count("a size", size, 1)
        self.shape = (size, size)
        self.law = law
        self.edges = law.support()
        unit = max(map(abs, self.edges))
        self._sides = tuple(_Side(end, size, unit) for end in reversed(_ends(law)))

    @property
    def thresholds(self) -> tuple[float, float]:
        """Of |θ| for negative and for positive spikes: the lower edge's and the upper's."""
        return self._sides[0].threshold, self._sides[1].threshold

    def spike(self, theta: Array) -> Spike:
        """The effect of a spike of strength ``theta``, of either sign.

        Args:
            theta: Strengths: number, array or tensor.

        Returns:
            The spike; left and right overlap are the same, and there is a threshold of |θ| for
            every θ.

        Raises:
            InputError: If a strength is not finite.

        Example:
            >>> from bulkedge.rmt import Semicircle
            >>> round(SymmetricLawBulk(Semicircle(10.0), 100).spike(12.5).left_overlap, 9)
            0.36
        """
        strengths, leave = enter_real(theta)
        if not bool(strengths.isfinite().all()):
            raise InputError("expected finite strengths, got NaN or infinity")
        negative = strengths < 0
        down, up = (side.spike(strengths.abs()) for side in self._sides)

        def either(name: str) -> Tensor:
            return torch.where(negative, getattr(down, name), getattr(up, name))

        low, high = self.edges
        location = torch.where(
            negative,
            low - (down.location - self._sides[0].edge),
            high + (up.location - self._sides[1].edge),
        )
        thresholds = (torch.full_like(strengths, x) for x in self.thresholds)
        return Spike(
            theta=theta,
            threshold=leave(torch.where(negative, *thresholds)),
            location=leave(location),
            left_overlap=leave(either("left_overlap")),
            right_overlap=leave(either("right_overlap")),
            sd=leave(either("sd")),
            supercritical=leave(either("supercritical")),
        )

    def strength(self, location: Array) -> Any:
        """The θ whose outlier lies at ``location``, ``1/G(location)``.

        Args:
            location: Eigenvalues beyond either edge: number, array or tensor.  What rounding to its
                precision may have put inside counts as the edge.

        Returns:
            θ, shaped and typed like the location.

        Raises:
            InputError: If a location lies inside the bulk.

        Example:
            >>> from bulkedge.rmt import Semicircle
            >>> round(SymmetricLawBulk(Semicircle(10.0), 100).strength(-25.0), 9)
            -20.0
        """
        points, leave = enter_finite(location)
        low, high = self.edges
        below = points < (low + high) / 2
        beyond = torch.where(below, low - points, points - high)
        if bool((beyond < -slack(location) * self._sides[0].edge).any()):
            raise InputError(
                f"expected eigenvalues outside ({low:.6g}, {high:.6g}), got one inside"
            )
        down, up = (side.strength(side.edge + beyond.clamp_min(0.0)) for side in self._sides)
        return leave(torch.where(below, -down, up))


class _End(NamedTuple):
    """A law seen from one of its ends: distances from it, masses, whether G is infinite."""

    gaps: Tensor
    masses: Tensor
    hard: bool

    def stieltjes(self, beyond: Tensor) -> tuple[Tensor, Tensor]:
        """``G = ∫ dμ/(distance from a point beyond the end)``, and its derivative by the point."""
        inverse = 1 / (beyond[..., None] + self.gaps.to(beyond.device))
        masses = self.masses.to(beyond.device)
        return inverse @ masses, -(inverse.square() @ masses)


class _Side(Bulk):
    """One end of the eigenvalues as the edge of a bulk, for positive spikes.

    D = G² has the location and overlaps of G: the symmetric formulas are those of a square matrix
    with φ_u = φ_v = G.
    """

    def __init__(self, end: _End, size: int, unit: float) -> None:
        self.shape = (size, size)
        self._end = end
        self._unit = unit

    @property
    def edge(self) -> float:
        return self._unit

    @property
    def threshold(self) -> float:
        return 0.0 if self._end.hard else super().threshold

    def traces(self, z: Tensor) -> Traces:
        G, slope = self._end.stieltjes(z - self._unit)
        return Traces(G, G, slope, slope)

    def _variance(self, z: Tensor, theta: Tensor) -> Tensor:
        """Of ``θ² (eᵀGe)²``: 8/N times the variance of the eigenvalues of θG, of mean 1."""
        gaps, masses = self._end.gaps.to(z.device), self._end.masses.to(z.device)
        beyond = (z - self._unit)[..., None]
        near = 1 / (beyond + gaps)
        # Far from the bulk 1/(z − b) dominates and has no spread: leave it out.
        x = theta[..., None] * torch.where(beyond > gaps.max(), near * gaps / beyond, near)
        return 8 * ((x - (x @ masses)[..., None]).square() @ masses) / self.shape[0]


def _ends(law: Law) -> tuple[_End, _End]:
    """The law from its upper and from its lower end, atoms included."""
    low, high = law.bulk_support()
    if not -math.inf < low < high < math.inf:
        raise InputError(f"expected a law on a bounded interval, got one on ({low:g}, {high:g})")
    points, below, above, masses = _nodes(law, low, high)
    first, last = law.support()
    places = points.new_tensor([place for place, _ in law.atoms()])
    masses = torch.cat([masses, points.new_tensor([mass for _, mass in law.atoms()])])
    return (
        _End(torch.cat([below + (last - high), last - places]), masses, _infinite(law, last)),
        _End(torch.cat([above + (low - first), places - first]), masses, _infinite(law, first)),
    )


def _infinite(law: Law, end: float) -> bool:
    """Whether G is infinite at an end: an atom lies there, or the density breaks off."""
    low, high = law.bulk_support()
    at_atom = any(place == end for place, _ in law.atoms())
    return at_atom or float(law.pdf(end)) * (high - low) > HARD_EDGE_DENSITY


def _nodes(law: Law, low: float, high: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points of the continuous part, their distances from its ends, and their masses."""
    width, spacing = high - low, math.ulp(max(-low, high))
    halvings = math.log2(math.pi / 4 / math.sqrt(NEAREST_SPACINGS * spacing / width))
    halves = 0.5 ** torch.arange(max(0, math.floor(halvings)), -1, -1, dtype=torch.float64)
    angles = math.pi / 2 * torch.cat([halves.new_zeros(1), halves])
    x, w = map(torch.from_numpy, gauss_legendre(NODES))
    lengths = angles.diff()[:, None]
    gaps = (width * ((angles[:-1, None] + lengths * x) / 2).sin().square()).flatten()
    # Rounding shifts a node.  Its weight and density are then those of the shifted point: the
    # integrand over the angle is smooth, so that a small shift of the nodes does no harm.
    lower, upper = low + gaps.clamp_min(math.ulp(low)), high - gaps.clamp_min(math.ulp(high))
    points = torch.cat([lower, upper])
    below, above = high - points, points - low
    slope = (below * above).sqrt()  # ds/dφ
    masses = (lengths * w).flatten().repeat(2) * slope * law.pdf(points)
    atoms = sum(mass for _, mass in law.atoms())
    total = float(masses.sum())
    if not abs(total + atoms - 1) < MASS_TOLERANCE:
        raise InputError(
            f"expected a law of mass 1, got {total + atoms:.6g}; the quadrature needs a density "
            "that is smooth inside"
        )
    return points, below, above, masses * ((1 - atoms) / total)
