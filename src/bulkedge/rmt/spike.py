"""The front door of the Baik–Ben Arous–Péché transition: ``spike`` and ``strength``."""

from __future__ import annotations

import math

import torch

from bulkedge._errors import InputError

from ._arrays import Array, enter_finite, enter_real, slack
from .bulk import Bulk, Spike, checked_shape, checked_sigma
from .white_bulk import WhiteBulk


class Wigner:
    """The bulk of a symmetric N×N matrix of independent entries: the semicircle.

    With τ the standard deviation of an off-diagonal entry, edge 2τ√N, and for a spike θ of either
    sign added along a unit vector, ``W + θ e eᵀ``:

        threshold  |θ| > τ√N
        location   θ + τ²N/θ
        overlap    1 − τ²N/θ²
        sd         τ √(2(1 − τ²N/θ²))    for entries of the orthogonal ensemble

    Args:
        size: N.
        sigma: Standard deviation τ of an off-diagonal entry.

    Raises:
        InputError: If the size or sigma is not positive.

    References:
        Benaych-Georges and Nadakuditi, arXiv:0910.2120.

    Example:
        >>> Wigner(100).spike(-20.0).location
        -25.0
    """

    def __init__(self, size: int, sigma: float = 1.0) -> None:
        self.shape = checked_shape((size, size))
        self.sigma = checked_sigma(sigma)

    @property
    def edge(self) -> float:
        """2τ√N; the spectrum ends at this and at its negative."""
        return 2 * self.threshold

    @property
    def threshold(self) -> float:
        """τ√N, for the absolute value of θ."""
        return self.sigma * math.sqrt(self.shape[0])

    def spike(self, theta: Array) -> Spike:
        """The effect of a spike of strength ``theta``, of either sign.

        Args:
            theta: Strengths: number, array or tensor.

        Returns:
            The spike; left and right overlap are the same.

        Raises:
            InputError: If a strength is not finite.

        Example:
            >>> round(Wigner(100).spike(12.5).left_overlap, 12)
            0.36
        """
        strengths, leave = enter_real(theta)
        if not bool(strengths.isfinite().all()):
            raise InputError("expected finite strengths, got NaN or infinity")
        critical = self.threshold
        supercritical = strengths.abs() > critical
        above = torch.where(supercritical, strengths, 2 * critical)
        size = above.abs()
        overlap = (size - critical) / size * (1 + critical / size)
        sd = self.sigma * (2 * overlap).sqrt()
        found = torch.where(supercritical, overlap, 0.0)
        edge = torch.full_like(strengths, self.edge)
        edge = torch.where(strengths < 0, -edge, edge)
        return Spike(
            theta=theta,
            threshold=critical,
            location=leave(torch.where(supercritical, above + critical / above * critical, edge)),
            left_overlap=leave(found),
            right_overlap=leave(found),
            sd=leave(torch.where(supercritical, sd, math.nan)),
            supercritical=leave(supercritical),
        )

    def strength(self, location: Array) -> Array:
        """The θ whose outlier lies at ``location``: the inverse of :meth:`spike`.

        Args:
            location: Eigenvalues beyond either edge: number, array or tensor.  What rounding to its
                precision may have put inside counts as the edge.

        Returns:
            θ, shaped and typed like the location.

        Raises:
            InputError: If a location lies inside the bulk.

        Example:
            >>> Wigner(100).strength(-25.0)
            -20.0
        """
        points, leave = enter_finite(location)
        size = points.abs()
        if bool((size < self.edge * (1 - slack(location))).any()):
            raise InputError(
                f"expected eigenvalues beyond ±{self.edge:.6g}, got {float(size.min()):.6g}"
            )
        size = size.clamp_min(self.edge)
        root = (size - self.edge).sqrt() * (size + self.edge).sqrt()
        return leave(torch.sign(points) * (size + root) / 2)


def spike(
    theta: Array,
    *,
    shape: tuple[int, int] | None = None,
    sigma: float = 1.0,
    symmetric: bool = False,
    bulk: Bulk | None = None,
) -> Spike:
    """The effect of a spike θ u vᵀ added to a bulk: threshold, outlier, overlaps.

    For an update of rank r give its r singular values: to leading order each acts independently.

    Args:
        theta: Strengths: number, array or tensor.
        shape: ``(m, n)`` of a white bulk.
        sigma: Standard deviation of an entry of a white bulk.
        symmetric: The bulk is a symmetric matrix, ``theta`` is added along one vector, and
            eigenvalues are meant.
        bulk: Another bulk instead of a white one, for example from :func:`~bulkedge.rmt.fit_bulk`.

    Returns:
        The spike, its fields shaped and typed like ``theta``.

    Raises:
        InputError: If neither or both of shape and bulk are given, or a value is bad.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221; arXiv:0910.2120 for symmetric matrices.

    Example:
        >>> found = spike(2.0, shape=(400, 1600), sigma=0.025)
        >>> round(found.threshold, 4), round(found.location, 4), round(found.left_overlap, 4)
        (0.7071, 2.3049, 0.9265)
        >>> spike([0.5, 2.0], shape=(400, 1600), sigma=0.025).supercritical.tolist()
        [False, True]
    """
    return _chosen(shape, sigma, symmetric, bulk).spike(theta)


def strength(
    location: Array,
    *,
    shape: tuple[int, int] | None = None,
    sigma: float = 1.0,
    symmetric: bool = False,
    bulk: Bulk | None = None,
) -> Array:
    """The strength of the spike whose outlier lies at ``location``: the inverse of :func:`spike`.

    For a white bulk ``θ² = ½[x + √(x² − 4τ⁴mn)]``, ``x = s² − τ²(m + n)``.

    Args:
        location: Singular values (eigenvalues) beyond the bulk edge: number, array or tensor.
        shape: See :func:`spike`.
        sigma: See :func:`spike`.
        symmetric: See :func:`spike`.
        bulk: See :func:`spike`.

    Returns:
        θ, shaped and typed like the location.

    Raises:
        InputError: As :func:`spike`, and if a location lies inside the bulk.

    Example:
        >>> round(strength(2.30489, shape=(400, 1600), sigma=0.025), 4)
        2.0
    """
    return _chosen(shape, sigma, symmetric, bulk).strength(location)


def _chosen(
    shape: tuple[int, int] | None, sigma: float, symmetric: bool, bulk: Bulk | None
) -> Bulk | Wigner:
    """The bulk that the caller means."""
    if (shape is None) == (bulk is None):
        raise InputError("expected either shape or bulk; give shape=(m, n) for white noise")
    if bulk is not None:
        if symmetric:
            raise InputError("symmetric=True is for a white bulk; give shape=(n, n)")
        return bulk
    if shape is None or not symmetric:
        return WhiteBulk(shape or (0, 0), sigma)
    m, n = checked_shape(shape)
    if m != n:
        raise InputError(f"expected a square shape for symmetric=True, got {m}×{n}")
    return Wigner(m, sigma)
