"""Bulks and what a spike does to them: the Baik–Ben Arous–Péché transition.

A weight ``W0 + θ u vᵀ`` whose unit vectors u and v are independent of W0 (isotropic, as Haar
vectors are) has a singular value beyond the bulk edge b if and only if θ passes a threshold.  All
follows from the two normalised traces of the resolvent of the Hermitisation
``[[0, W0], [W0ᵀ, 0]]``,

    φ_u(z) = (1/m) tr z/(z² − W0 W0ᵀ),      φ_v(z) = (1/n) tr z/(z² − W0ᵀ W0),      D = φ_u φ_v:

    threshold   θ_c = D(b⁺)^(−1/2)
    location    D(ρ) = 1/θ²
    overlaps    |⟨u, û⟩|² = −2 φ_u(ρ) / (θ² D'(ρ)),     |⟨v, v̂⟩|² = −2 φ_v(ρ) / (θ² D'(ρ))

(Benaych-Georges and Nadakuditi, arXiv:1103.2221).  The standard deviation of the location is
that of the forms ``uᵀ(·)u``, ``vᵀ(·)v`` and ``uᵀ(·)v`` of independent Haar vectors, carried to the
root by the delta method.  Several spikes in general position act each alone, at leading order.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._arrays import Array, enter_finite, enter_real, real, slack

HALVINGS = 80
"""Bisections of a bracket that is a few edges wide: then it has the width of rounding."""
NEWTON_STEPS = 20
"""After so many steps of Newton's method the bracket is only bisected: at a soft edge 4 to 7 do."""
QUADRATIC = 1e-8
"""A step of Newton's method below this part of the distance from the edge is the last."""
SAME = 4e-16
"""Two points whose relative distance is below this are the same, to rounding."""
NEAREST = 1e-15
"""The relative distance from the edge at which float64 distinguishes an outlier from it."""
FAR = 1e4
"""For strengths beyond this many edges the spread is taken from its limit."""
FARTHEST = 1e60
"""For strengths beyond this many edges the outlier is at the strength itself, to rounding."""


class Traces(NamedTuple):
    """φ_u, φ_v and their derivatives at the same points z."""

    left: Tensor
    right: Tensor
    left_slope: Tensor
    right_slope: Tensor


@dataclass(frozen=True)
class Spike:
    """The effect of a spike of strength θ; fields have the shape of θ.

    Attributes:
        theta: Its strength, a singular value of the update.
        threshold: The strength θ_c beyond which it creates an outlier: one number, or one for each
            θ where its sign matters (:class:`~bulkedge.rmt.SymmetricLawBulk`).
        location: The position of the outlier; the bulk edge below the threshold.
        left_overlap: |⟨u, û⟩|² with the outlier's left singular vector; 0 below the threshold.
        right_overlap: |⟨v, v̂⟩|², likewise.
        sd: Standard deviation of the location, for one draw of u and v; NaN below the threshold,
            where the edge fluctuates by the Tracy–Widom law.
        supercritical: Whether θ > θ_c, by so much that float64 distinguishes the outlier from
            the edge: see :meth:`Bulk.supercritical`.
    """

    theta: Any
    threshold: Any
    location: Any
    left_overlap: Any
    right_overlap: Any
    sd: Any
    supercritical: Any


class Bulk(ABC):
    """The spectrum of a base matrix without its outliers.

    Attributes:
        shape: ``(m, n)`` of the matrix.
    """

    shape: tuple[int, int]

    @property
    @abstractmethod
    def edge(self) -> float:
        """The largest singular value of the bulk, b."""

    @abstractmethod
    def traces(self, z: Tensor) -> Traces:
        """φ_u, φ_v and their derivatives at float64 ``z`` ≥ edge."""

    @property
    def threshold(self) -> float:
        """θ_c = D(b⁺)^(−1/2), the strength beyond which a spike makes an outlier."""
        return self._threshold

    @functools.cached_property
    def _threshold(self) -> float:
        return float(self._strength(torch.tensor(self.edge, dtype=torch.float64)))

    def supercritical(self, theta: Array) -> Any:
        """Whether spikes of these strengths make outliers that float64 distinguishes from the edge.

        At a soft edge that takes a strength of some 1e-8 more than θ_c.  At a hard one, where θ_c
        is 0 but an outlier lies exponentially close to the edge, it takes 6 to 10 % of the edge.

        Args:
            theta: Strengths: number, array or tensor.

        Returns:
            Truth values, shaped and typed like ``theta``.

        Example:
            >>> from bulkedge.rmt import WhiteBulk
            >>> WhiteBulk((400, 400), sigma=0.05).supercritical([0.9, 1.0, 1.1])
            array([False, False,  True])
        """
        strengths, leave = enter_real(theta)
        nearest = torch.tensor(self.edge * (1 + NEAREST), dtype=torch.float64)
        return leave(strengths > max(self.threshold, float(self._strength(nearest))))

    def d_transform(self, z: Array) -> Any:
        """The D-transform ``D(z) = φ_u(z) φ_v(z)``, decreasing from b to infinity.

        Args:
            z: Points ≥ the edge: number, array or tensor.  What rounding to its precision may have
                put inside counts as the edge.

        Returns:
            D(z), shaped and typed like z.

        Raises:
            InputError: If a point lies inside the bulk.

        Example:
            >>> from bulkedge.rmt import WhiteBulk
            >>> round(WhiteBulk((100, 400)).d_transform(30.0) * 200, 6)  # at the edge 1/√(mn)
            1.0
        """
        points, leave = self._beyond(z)
        found = self.traces(points)
        return leave(found.left * found.right)

    def inverse_d(self, w: Array) -> Any:
        """The point z beyond the edge with D(z) = w.

        Cost: 5 to 10 evaluations of D, each O(p) a point for a bulk of p values.

        Args:
            w: Values in (0, D(b⁺)]: number, array or tensor.

        Returns:
            z, shaped and typed like w.

        Raises:
            InputError: If a value is not in that range.

        Example:
            >>> from bulkedge.rmt import WhiteBulk
            >>> bulk = WhiteBulk((100, 400))
            >>> round(bulk.inverse_d(bulk.d_transform(35.0)), 10)
            35.0
        """
        values, leave = enter_real(w)
        theta = values.rsqrt()
        outside = ~((values > 0) & (theta >= self.threshold * (1 - slack(w))))
        if bool(outside.any()):
            raise InputError(
                f"expected values of D between 0 and {self.d_transform(self.edge):.6g}, where the "
                f"bulk ends, got {float(values[outside][0]):.6g}"
            )
        return leave(self._locate(theta.clamp_min(self.threshold)))

    def spike(self, theta: Array) -> Spike:
        """The effect of a spike: threshold, location, overlaps.

        Args:
            theta: Strengths ≥ 0: number, array or tensor.

        Returns:
            The spike, its fields shaped and typed like ``theta``.

        Raises:
            InputError: If a strength is negative or not finite.

        References:
            Benaych-Georges and Nadakuditi, arXiv:1103.2221.

        Example:
            >>> from bulkedge.rmt import WhiteBulk
            >>> spike = WhiteBulk((400, 400), sigma=0.05).spike(1.5)
            >>> spike.threshold, round(spike.location, 4), round(spike.left_overlap, 4)
            (1.0, 2.1667, 0.5556)
        """
        strengths, leave = enter_real(theta)
        if not bool((strengths.isfinite() & (strengths >= 0)).all()):
            raise InputError("expected finite strengths ≥ 0, got a negative one, NaN or infinity")
        critical = self.threshold
        supercritical = self.supercritical(strengths)
        # Below the threshold any supercritical value avoids warnings in the arithmetic.
        found = self._outlier(torch.where(supercritical, strengths, 2 * critical + self.edge))

        def where(value: Tensor, otherwise: float) -> Any:
            return leave(torch.where(supercritical, value, otherwise))

        return Spike(
            theta=theta,
            threshold=critical,
            location=where(found.location, self.edge),
            left_overlap=where(found.left_overlap, 0.0),
            right_overlap=where(found.right_overlap, 0.0),
            sd=where(found.sd, float("nan")),
            supercritical=leave(supercritical),
        )

    def strength(self, location: Array) -> Any:
        """The strength θ whose outlier lies at ``location``: the inverse of :meth:`spike`.

        Args:
            location: Singular values beyond the edge: number, array or tensor.  What rounding to
                its precision may have put inside counts as the edge.

        Returns:
            ``D(location)^(−1/2)``, shaped and typed like the location.

        Raises:
            InputError: If a location lies inside the bulk.

        Example:
            >>> from bulkedge.rmt import WhiteBulk
            >>> bulk = WhiteBulk((400, 400), sigma=0.05)
            >>> round(bulk.strength(bulk.spike(1.5).location), 12)
            1.5
        """
        points, leave = self._beyond(location)
        return leave(self._strength(points))

    def _beyond(self, z: Array) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Points beyond the edge, and the way back to their kind."""
        points, leave = enter_finite(z)
        if bool((points < self.edge * (1 - slack(z))).any()):
            raise InputError(
                f"expected points beyond the bulk edge {self.edge:.6g}, got "
                f"{float(points.min()):.6g}"
            )
        return points.clamp_min(self.edge), leave

    def _strength(self, z: Tensor) -> Tensor:
        """``D(z)^(−1/2)``."""
        found = self.traces(z)
        return found.left.rsqrt() * found.right.rsqrt()

    def _locate(self, theta: Tensor) -> Tensor:
        """The root of D(ρ) = 1/θ² in ``(b, b + θ]``, since norms add up at most."""
        with torch.no_grad():
            root = self._root(theta)
            if not theta.requires_grad:
                return root
            slope = 2 / _steepness(self._scaled(root, theta))
        return root + (theta - theta.detach()) * slope  # adds zero, and its derivative

    def _root(self, theta: Tensor) -> Tensor:
        """The same by Newton's method, in a bracket that is bisected where a step leaves it."""
        # D^(−1/2) is concave in z and, at a soft edge, smooth in x = √(z − b): it is solved for x.
        low, high = torch.full_like(theta, self.edge), self.edge + theta
        beyond = (theta - self.threshold).clamp_min(0.0)
        z = torch.minimum(self.edge + beyond.square() / theta, high)  # exact for square noise
        for step in range(NEWTON_STEPS + HALVINGS):
            found = self._scaled(z, theta)
            square = found.left * found.right
            below = square > 1  # D falls, so the root lies higher
            low, high = torch.where(below, z, low), torch.where(below, high, z)
            x = (z - self.edge).sqrt()
            slope = _steepness(found) / theta * square.pow(-1.5) * x  # of D^(−1/2)/D₀^(−1/2) by x
            following = self.edge + (x + (1 - square.rsqrt()) / slope).square()
            near = SAME * z  # a root that is an end of the bracket, to rounding, has been found
            inside = (following >= low - near) & (following <= high + near) & (step < NEWTON_STEPS)
            following = torch.where(inside, following, (low + high) / 2)
            # the error after a step of Newton's method is about the square of the step
            enough = torch.where(inside, QUADRATIC * (z - self.edge), 0.0) + near
            moved, z = (following - z).abs(), following
            if bool((moved <= enough).all()):
                break
        return z

    def _outlier(self, theta: Tensor) -> Outlier:
        """Location, overlaps and spread of supercritical spikes."""
        near = theta.clamp(max=FARTHEST * self.edge)
        z = self._locate(near)
        found = self._scaled(z, near)
        slope = _steepness(found)
        return Outlier(
            location=z + (theta - near),
            left_overlap=2 * found.left / slope,
            right_overlap=2 * found.right / slope,
            sd=near * self._variance(z, near).sqrt() / slope,
        )

    def _scaled(self, z: Tensor, theta: Tensor) -> Traces:
        """The traces in units of the strength, in which neither powers nor products overflow."""
        left, right, left_slope, right_slope = self.traces(z)
        return Traces(
            theta * left, theta * right, theta * left_slope * theta, theta * right_slope * theta
        )

    def _variance(self, z: Tensor, theta: Tensor) -> Tensor:
        """Variance of ``θ² (uᵀG_u u)(vᵀG_v v) − (1 − θ uᵀG_uv v)²`` for Haar vectors u and v."""
        # Far from the bulk it falls like θ⁻², and differences of traces are mostly rounding.
        scale = (FAR * self.edge / theta).clamp(max=1.0)
        z, theta = (x.clamp(max=FAR * self.edge) for x in (z, theta))
        found, z = self._scaled(z, theta), z / theta
        # A form uᵀGu of a Haar vector in m dimensions has variance (2/m)·(the variance of the
        # eigenvalues of G), a bilinear one (1/mn)·Σ of squared singular values.  Both sums over
        # the bulk follow from the traces and their slopes:
        #   Σ 1/(z² − s²) = (mφ_u − (m−p)/z)/z,   Σ (z² + s²)/(z² − s²)² = −mφ_u' − (m−p)/z²
        m, n = self.shape
        zeros = m - min(m, n)
        first = (m * found.left - zeros / z) / z
        second = -m * found.left_slope - zeros / z**2
        squares, cross = (second + first) / 2, (second - first) / 2  # Σ z²/(·)², Σ s²/(·)²
        left = (squares + zeros / z**2) / m - found.left**2
        right = (squares + (n - min(m, n)) / z**2) / n - found.right**2
        own = found.right**2 * left * (2 / m) + found.left**2 * right * (2 / n)
        return (own + 4 * cross / (m * n)) * scale.square()


def _steepness(found: Traces) -> Tensor:
    """``−D'(z)`` in the units of the traces."""
    return -(found.left_slope * found.right + found.left * found.right_slope)


class Outlier(NamedTuple):
    """The tensors of a :class:`Spike` that is supercritical."""

    location: Tensor
    left_overlap: Tensor
    right_overlap: Tensor
    sd: Tensor


def checked_sigma(sigma: Any) -> float:
    """The standard deviation of an entry; InputError unless it is a positive finite number."""
    number = real(sigma)
    if not 0 < number < float("inf"):
        raise InputError(f"expected a positive finite sigma, got {sigma}")
    return number


def checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """``(m, n)`` as integers ≥ 1.

    Args:
        shape: What the caller gave.

    Returns:
        The two sizes.

    Raises:
        InputError: If it is anything else.
    """
    try:
        sizes = [int(size) for size in shape]
    except (TypeError, ValueError, OverflowError):
        sizes = []
    if len(sizes) != 2 or min(sizes) < 1 or sizes != list(shape):
        raise InputError(f"expected a shape (m, n) of two sizes ≥ 1, got {shape!r}")
    return sizes[0], sizes[1]
