"""Bulks and what a spike does to them: the Baik–Ben Arous–Péché transition.

A weight ``W0 + θ u vᵀ`` whose unit vectors u and v know nothing of W0 (isotropic, as Haar vectors
are) has a singular value beyond the bulk edge b if and only if θ passes a threshold.  All follows
from the two normalised traces of the resolvent of the Hermitisation ``[[0, W0], [W0ᵀ, 0]]``,

    φ_u(z) = (1/m) tr z/(z² − W0 W0ᵀ),      φ_v(z) = (1/n) tr z/(z² − W0ᵀ W0),      D = φ_u φ_v:

    threshold   θ_c = D(b⁺)^(−1/2)
    location    D(ρ) = 1/θ²
    overlaps    |⟨u, û⟩|² = −2 φ_u(ρ) / (θ² D'(ρ)),     |⟨v, v̂⟩|² = −2 φ_v(ρ) / (θ² D'(ρ))

(Benaych-Georges and Nadakuditi, arXiv:1103.2221).  The standard deviation of the location is
that of the forms ``uᵀ(·)u``, ``vᵀ(·)v`` and ``uᵀ(·)v`` of independent Haar vectors, carried to the
root by the delta method.  Several spikes in general position act each alone, at leading order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._arrays import Array, enter

HALVINGS = 80  # of a bracket that is a few edges wide: beyond the last bit


class Traces(NamedTuple):
    """φ_u, φ_v and their derivatives at the same points z."""

    left: Tensor
    right: Tensor
    left_slope: Tensor
    right_slope: Tensor


@dataclass(frozen=True)
class Spike:
    """What becomes of a spike of strength θ; fields are shaped like the θ they were asked for.

    Attributes:
        theta: Its strength, a singular value of the update.
        threshold: The strength θ_c beyond which it separates, one number.
        location: The outlier that it makes; the bulk edge below the threshold.
        left_overlap: |⟨u, û⟩|² with the outlier's left singular vector; 0 below the threshold.
        right_overlap: |⟨v, v̂⟩|², likewise.
        sd: Standard deviation of the location, for one draw of u and v; NaN below the threshold,
            where the edge fluctuates by the Tracy–Widom law.
        separated: Whether θ > θ_c.
    """

    theta: Any
    threshold: float
    location: Any
    left_overlap: Any
    right_overlap: Any
    sd: Any
    separated: Any


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
        """θ_c = D(b⁺)^(−1/2), the strength beyond which a spike separates."""
        return float(self.d_transform(self.edge)) ** -0.5

    def d_transform(self, z: Array) -> Any:
        """The D-transform ``D(z) = φ_u(z) φ_v(z)``, decreasing from b to infinity.

        Args:
            z: Points ≥ the edge: number, array or tensor.

        Returns:
            D(z), shaped and typed like z.

        Raises:
            InputError: If a point lies inside the bulk.

        Example:
            >>> round(White((100, 400)).d_transform(30.0) * 200, 6)  # at the edge 1/√(mn)
            1.0
        """
        points, leave = enter(z)
        if bool((points < self.edge * (1 - 1e-14)).any()):
            raise InputError(
                f"expected points beyond the bulk edge {self.edge:.6g}, got "
                f"{float(points.min()):.6g}"
            )
        found = self.traces(points)
        return leave(found.left * found.right)

    def inverse_d(self, w: Array) -> Any:
        """The point z beyond the edge with D(z) = w.

        Cost: 80 evaluations of D, each O(p) a point for a bulk of p values.

        Args:
            w: Values in (0, D(b⁺)): number, array or tensor.

        Returns:
            z, shaped and typed like w.

        Raises:
            InputError: If a value is not in that range.

        Example:
            >>> bulk = White((100, 400))
            >>> round(bulk.inverse_d(bulk.d_transform(35.0)), 10)
            35.0
        """
        values, leave = enter(w)
        theta = values.rsqrt()
        outside = ~((values > 0) & (theta > self.threshold))
        if bool(outside.any()):
            raise InputError(
                f"expected values of D between 0 and {self.d_transform(self.edge):.6g}, where the "
                f"bulk ends, got {float(values[outside][0]):.6g}"
            )
        return leave(self._locate(theta))

    def spike(self, theta: Array) -> Spike:
        """What becomes of a spike: threshold, location, overlaps.

        Args:
            theta: Strengths ≥ 0: number, array or tensor.

        Returns:
            The spike, its fields shaped and typed like ``theta``.

        Raises:
            InputError: If a strength is negative or not finite.

        References:
            Benaych-Georges and Nadakuditi, arXiv:1103.2221.

        Example:
            >>> spike = White((400, 400), sigma=0.05).spike(1.5)
            >>> spike.threshold, round(spike.location, 4), round(spike.left_overlap, 4)
            (1.0, 2.1667, 0.5556)
        """
        strengths, leave = enter(theta)
        if not bool((strengths.isfinite() & (strengths >= 0)).all()):
            raise InputError("expected finite strengths ≥ 0, got a negative one, NaN or infinity")
        critical = self.threshold
        separated = strengths > critical
        # below the threshold any value that separates keeps the arithmetic quiet
        above = torch.where(separated, strengths, 2 * critical + self.edge)
        found = self._outlier(above)
        # so weak a spike that its outlier cannot be told from the edge in these digits is none
        resolved = found.sd.isfinite() & (found.location > self.edge * (1 + 1e-15))
        separated = separated & resolved

        def where(value: Tensor, otherwise: float) -> Any:
            return leave(torch.where(separated, value, otherwise))

        return Spike(
            theta=theta,
            threshold=critical,
            location=where(found.location, self.edge),
            left_overlap=where(found.left_overlap, 0.0),
            right_overlap=where(found.right_overlap, 0.0),
            sd=where(found.sd, float("nan")),
            separated=leave(separated),
        )

    def strength(self, location: Array) -> Any:
        """The strength θ whose outlier lies at ``location``: the inverse of :meth:`spike`.

        Args:
            location: Singular values beyond the edge: number, array or tensor.

        Returns:
            ``D(location)^(−1/2)``, shaped and typed like the location.

        Raises:
            InputError: If a location lies inside the bulk.

        Example:
            >>> bulk = White((400, 400), sigma=0.05)
            >>> round(bulk.strength(bulk.spike(1.5).location), 12)
            1.5
        """
        points, leave = enter(location)
        return leave(self.d_transform(points).rsqrt())

    def _locate(self, theta: Tensor) -> Tensor:
        """The root of D(ρ) = 1/θ², by bisection: ρ ≤ b + θ, since norms add up at most."""
        with torch.no_grad():
            low, high = torch.full_like(theta, self.edge), self.edge + theta
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                found = self.traces(middle)
                below = found.left * found.right > theta**-2  # D falls, so the root lies higher
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            root = (low + high) / 2
        if not theta.requires_grad:
            return root
        # one Newton step from the root, of length zero, carries its derivative by θ
        found = self.traces(root)
        slope = found.left_slope * found.right + found.left * found.right_slope
        return root + (theta**-2 - theta.detach() ** -2) / slope

    def _outlier(self, theta: Tensor) -> _Outlier:
        """Location, overlaps and spread of spikes that separate."""
        z = self._locate(theta)
        found = self.traces(z)
        slope = -(theta**2) * (found.left_slope * found.right + found.left * found.right_slope)
        return _Outlier(
            location=z,
            left_overlap=2 * found.left / slope,
            right_overlap=2 * found.right / slope,
            sd=self._variance(z, theta, found).sqrt() / slope,
        )

    def _variance(self, z: Tensor, theta: Tensor, found: Traces) -> Tensor:
        """Variance of ``θ² (uᵀG_u u)(vᵀG_v v) − (1 − θ uᵀG_uv v)²`` for Haar vectors u and v."""
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
        return theta**4 * own + 4 * theta**2 * cross / (m * n)


class _Outlier(NamedTuple):
    """The tensors of a :class:`Spike` that separates."""

    location: Tensor
    left_overlap: Tensor
    right_overlap: Tensor
    sd: Tensor


class White(Bulk):
    """The bulk of an m×n matrix of independent entries with mean 0: the Marchenko–Pastur law.

    In closed form, with τ the standard deviation of an entry:

        edge       b = τ(√m + √n)
        threshold  θ_c = τ(mn)^¼
        location   ρ = √((θ² + τ²m)(θ² + τ²n)) / θ
        overlaps   (θ⁴ − τ⁴mn)/(θ²(θ² + τ²m)) on the left, (θ⁴ − τ⁴mn)/(θ²(θ² + τ²n)) on the right
        sd         τ √((left + right)/2)

    Args:
        shape: ``(m, n)``.
        sigma: Standard deviation τ of an entry.

    Raises:
        InputError: If a size or sigma is not positive.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221, section 3.1.

    Example:
        >>> White((400, 1600)).threshold, White((400, 1600)).edge
        (28.284271247461902, 60.0)
    """

    def __init__(self, shape: tuple[int, int], sigma: float = 1.0) -> None:
        self.shape = checked_shape(shape)
        if not 0 < sigma < float("inf"):
            raise InputError(f"expected a positive finite sigma, got {sigma}")
        self.sigma = float(sigma)

    @property
    def edge(self) -> float:
        """See :attr:`Bulk.edge`."""
        m, n = self.shape
        return self.sigma * (m**0.5 + n**0.5)

    @property
    def threshold(self) -> float:
        """See :attr:`Bulk.threshold`."""
        m, n = self.shape
        return self.sigma * (m * n) ** 0.25

    def traces(self, z: Tensor) -> Traces:
        """See :meth:`Bulk.traces`."""
        m, n = self.shape
        variance = self.sigma**2
        # both traces follow from D: zφ_u = 1 + τ²nD and zφ_v = 1 + τ²mD
        x = (z / self.sigma).square() - (m + n)
        root = (x.square() - 4 * m * n).clamp_min(0.0).sqrt()
        D = 2 / (variance * (x + root))
        slope = -2 * z * D / (variance * root)
        left, right = (1 + variance * n * D) / z, (1 + variance * m * D) / z
        return Traces(
            left, right, (variance * n * slope - left) / z, (variance * m * slope - right) / z
        )

    def _locate(self, theta: Tensor) -> Tensor:
        m, n = (self.sigma**2 * size for size in self.shape)
        return ((theta.square() + m) * (theta.square() + n)).sqrt() / theta

    def _outlier(self, theta: Tensor) -> _Outlier:
        m, n = (self.sigma**2 * size for size in self.shape)
        square = theta.square()
        beyond = (square - (m * n) ** 0.5) * (square + (m * n) ** 0.5) / square
        left, right = beyond / (square + m), beyond / (square + n)
        sd = self.sigma * ((left + right) / 2).sqrt()
        return _Outlier(self._locate(theta), left, right, sd)


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
