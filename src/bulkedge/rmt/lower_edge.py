"""The lower end of a bulk: where the small singular values of noise stop, and what lies below.

The squared singular values of an m×n matrix of noise end at ``τ²(√m − √n)²``.  If the matrix is
square, or nearly so, the wall at zero holds them (a hard edge, the law of Laguerre ensembles), else
nothing does (a soft one, the Tracy–Widom law reflected).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._arrays import Array, enter_real
from ._bessel import hard_edge_survival
from .bulk import checked_shape, checked_sigma
from .empirical_bulk import (
    FITTED_VALUES,
    MIN_VALUES,
    checked_significance,
    count_outliers,
    descending,
)
from .tracy_widom import TracyWidom

HARD_UP_TO = 64
"""The law of the hard edge is used up to this difference of the sides; beyond, Tracy–Widom."""
CENTRED_FROM = 12
"""From this difference of the sides on the hard edge has the centring of a soft one."""
SOFT_FROM = 1 / 8
"""Of a bulk without a law the lower edge is soft where the sides differ by this part of p."""


@dataclass(frozen=True)
class LowerEdge:
    """The lower end of a bulk.

    Attributes:
        position: Where it ends; 0 for a hard edge.
        hard: Whether the wall at zero holds the values.
        outliers: How many values are below it.
        p_value: Chance that noise alone makes the last of them, counted from below, as small; of
            the smallest value if there are none.
    """

    position: float
    hard: bool
    outliers: int
    p_value: float


def lower_edge_test(value: Array, shape: tuple[int, int], *, sigma: float) -> Any:
    """Chance that the smallest singular value of noise is at most ``value``.

    With ``a = |m − n|``, ``μ = (√(m − ½) − √(n − ½))²`` and ``ς`` as for the upper edge with minus
    signs, the square λ of the smallest value over τ² follows

    - a ≤ 64: ``P(λ > x) = det(1 − T)`` at ``s = 2(m + n)x``, T of kernel ``½√s J_a(√(s x y))`` on
      (0, 1). For square matrices it is ``exp(−s/8 − √s/2)``. From a = 12 on s is moved a little, so
      that place and scale are those of the next law.
    - else: ``(ν − log λ)/t`` by the Tracy–Widom law, ``t = ς/μ``, ``ν = log μ + t²/8``.

    Both are limits for large matrices: from some ten rows and columns on they are good to 0.02.
    The error of a sigma that was fitted to the same values is not accounted for: it is a small part
    of the spread of the smallest one.

    Args:
        value: Singular values: number, array or tensor.
        shape: ``(m, n)`` of the matrix.
        sigma: Standard deviation τ of an entry.

    Returns:
        The p-values, shaped and typed like ``value``.

    Raises:
        InputError: If a value is negative or not a number, or sigma is not positive.

    References:
        Edelman, SIAM J. Matrix Anal. Appl. 9 (1988); Forrester, arXiv:math-ph/0605022, for the
        determinant; Ma, Bernoulli 18 (2012), for the logarithm.

    Example:
        >>> round(lower_edge_test(0.05 / 100, (100, 100), sigma=0.1), 4)  # 1 − exp(−t²/2 − t)
        0.05
        >>> lower_edge_test([1.0, 9.0, 10.0], (100, 400), sigma=1.0).round(3)
        array([0.   , 0.   , 0.155])
    """
    m, n = checked_shape(shape)
    sigma = checked_sigma(sigma)
    points, leave = enter_real(value)
    if not bool((points >= 0).all()):
        raise InputError("expected singular values ≥ 0, got a negative one or NaN")
    squares = (points / sigma).square().flatten().cpu()
    found = _p_values(squares, (m, n)).reshape(points.shape).to(points.device)
    return leave(found)


def white_lower_edge(
    values: np.ndarray, shape: tuple[int, int], sigma: float, significance: float
) -> LowerEdge:
    """The lower end of noise with a known τ: one value after the other, from below.

    Args:
        values: All singular values but those beyond the upper edge, descending.
        shape: Of a matrix of noise that has as many.
        sigma: τ.
        significance: Probability of a false alarm.

    Returns:
        The edge, ``τ|√m − √n|`` unless it is hard.
    """
    outliers, p_value = 0, 1.0
    for tested in range(max(1, len(values) // 20)):
        rest = (shape[0] - tested, shape[1] - tested)
        p = lower_edge_test(float(values[-1 - tested]), rest, sigma=sigma)
        if tested and p >= significance:
            break
        p_value = p
        if p >= significance:
            break
        outliers = tested + 1
    position = sigma * abs(math.sqrt(shape[0]) - math.sqrt(shape[1]))
    return LowerEdge(position, abs(shape[0] - shape[1]) <= HARD_UP_TO, outliers, p_value)


def fit_lower_edge(
    values: Array, shape: tuple[int, int], *, significance: float = 0.05
) -> LowerEdge:
    """The lower end of a bulk that no law describes, from its own smallest values.

    Where the sides differ by more than an eighth of the shorter one the edge is soft, and is found
    as the upper one is (:func:`~bulkedge.rmt.count_outliers`), upside down; its p-value is an upper
    bound (Bonferroni).  Else the smallest value is held against the hard edge of noise, in the unit
    in which the 15 values after it lie where they should.

    Args:
        values: All singular values in descending order, shape ``(min(m, n),)``, at least 13.
        shape: ``(m, n)`` of the matrix.
        significance: Probability that noise alone is reported to have a small outlier.

    Returns:
        The edge.

    Raises:
        InputError: If values are too few, do not fit the shape, or the smallest coincide.

    Example:
        >>> W = torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
        >>> fit_lower_edge(torch.linalg.svdvals(W), W.shape).outliers
        0
        >>> W[0] = W[1] + 1e-6
        >>> fit_lower_edge(torch.linalg.svdvals(W), W.shape).outliers
        1
    """
    m, n = checked_shape(shape)
    found, significance = descending(values), checked_significance(significance)
    p = min(m, n)
    if len(found) != p or p <= MIN_VALUES:
        raise InputError(
            f"expected the {p} singular values of a {m}×{n} matrix, more than {MIN_VALUES}, got "
            f"{len(found)}"
        )
    if abs(m - n) > SOFT_FROM * p:
        return _soft(found, significance)
    return _hard(found, abs(m - n), significance)


def _soft(values: np.ndarray, significance: float) -> LowerEdge:
    """As at the upper edge, with the values upside down."""
    mirrored = (values[0] - values)[::-1]
    outliers, p_value = count_outliers(mirrored, significance=significance)
    return LowerEdge(float(values[-1 - outliers]), False, outliers, p_value)


def _hard(values: np.ndarray, gap: int, significance: float) -> LowerEdge:
    """The smallest values against the density of those after them."""
    outliers, p_value = 0, 1.0
    ascending = values[::-1]
    for tested in range(max(1, len(values) // 20)):
        size = min(FITTED_VALUES, (len(values) - tested) // 3)
        after = ascending[tested + 1 : tested + size]
        unit = float(np.polyfit(_bessel_places(gap, len(after)), after, 1)[0])
        if not unit > 0:
            raise InputError("expected singular values that differ, got equal ones; no edge")
        s = torch.tensor([(float(ascending[tested]) / unit) ** 2], dtype=torch.float64)
        p = float(1 - hard_edge_survival(gap, s)[0])
        if tested == 0 or p < significance:
            p_value = p
        if p >= significance:
            break
        outliers = tested + 1
    return LowerEdge(0.0, True, outliers, p_value)


def _bessel_places(gap: int, count: int) -> np.ndarray:
    """Where in ``√s`` the second and later values of a hard edge lie, but for a common shift."""
    # J_a counts (√(x² − a²) − a·arccos(a/x))/π zeros up to x
    x = np.linspace(gap, gap + 4 * (count + 2) + 3 * gap ** (1 / 3), 4096)
    turned = np.arccos(np.minimum(gap / np.maximum(x, 1e-300), 1.0))
    counts = (np.sqrt(x**2 - gap**2) - gap * turned) / math.pi
    return np.interp(np.arange(count) + 1.25, counts, x)


def _p_values(squares: Tensor, shape: tuple[int, int]) -> Tensor:
    """Chances that the smallest squared value over τ² is at most these."""
    m, n = shape
    gap = abs(m - n)
    if gap > HARD_UP_TO:
        return _soft_p_values(squares, shape)
    s = 2 * (m + n) * squares
    if gap >= CENTRED_FROM:
        a, b = math.sqrt(m - 0.5), math.sqrt(n - 0.5)
        power = (4 * a * b / (a + b) ** 2) ** (1 / 3)
        s = gap**2 * ((a + b) ** 2 * squares / gap**2) ** power
    return (1 - hard_edge_survival(gap, s)).clamp(0.0, 1.0)


def _soft_p_values(squares: Tensor, shape: tuple[int, int]) -> Tensor:
    a, b = (math.sqrt(size - 0.5) for size in sorted(shape, reverse=True))
    centre = (a - b) ** 2
    width = (a - b) * (1 / b - 1 / a) ** (1 / 3) / centre
    return TracyWidom().sf((math.log(centre) + width**2 / 8 - squares.log()) / width)
