"""The bulk of a matrix that no law describes, from its own singular values.

Near a soft edge b any bulk looks like that of every other: its j-th value lies near
``b − κ a_j``, ``a_j = (3π(j − ¾)/2)^(2/3)``, and its largest fluctuates as ``b + κ·TW₁``, with one
scale κ (the −¾ is the mean shift of real matrices).  So a least-squares line through the first few
values gives edge and scale, and shows which values are outliers, without any model of the rest.

For the D-transform the same few values are replaced by the smooth density that they come from:
the plain sum over discrete values is infinite at the largest of them, which would make every
threshold zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import renamed

from ._arrays import Array, count, enter_real, plain, real
from .bulk import Bulk, Traces, checked_shape
from .tracy_widom import TracyWidom

FITTED_VALUES = 16
"""An edge is fitted to this many values: with more the bulk's curvature counts, fewer are noisy."""
MIN_VALUES = 12
"""A bulk with fewer values has no edge that can be fitted."""
HARD_EDGE_RATIO = 4.5
"""An edge is called hard where a line fits this many times better than the 2/3 power."""
GAP = 3.0
"""Leading values end where a gap follows that is so many times as wide as all of them spread; in
noise hardly ever, since the values of a soft edge lie closer with each."""
LEAST_GROUP = 4
"""So many values before a gap make an edge of their own."""
EQUAL = 1e-6
"""Values that spread less, in units of the largest, are equal in float32: they make no edge."""
ROUNDING = 1e-14
"""Values whose scale is below this part of them are equal to rounding."""
SERIES_FROM = 30.0
"""At this many widths from the edge a series is used instead of the closed form."""
SERIES_TERMS = 12
"""With this many terms the series is exact to rounding there."""


@dataclass(frozen=True)
class Edge:
    """The upper edge of a bulk, from its largest values.

    Attributes:
        position: b.
        scale: κ: the j-th value lies near ``b − κ(3π(j − ¾)/2)^(2/3)``; for a hard edge
            near ``b − κ(j − ½)``.
        count: How many values it was fitted to.
        hard: The density does not fall to zero at b but breaks off, as that of uniform values;
            see :func:`fit_edge` for which of these are recognised.
    """

    position: float
    scale: float
    count: int
    hard: bool

    @property
    def width(self) -> float:
        """How far below b the first ``count`` values reach."""
        return self.scale * (self.count if self.hard else (1.5 * math.pi * self.count) ** (2 / 3))


def fit_edge(values: Array) -> Edge:
    """The edge of a bulk without outliers, from its 16 largest values.

    It is called hard where a line through the 16 values fits 4.5 times better than the 2/3 power:
    always for evenly spaced values, almost never for independent ones, because their gaps are
    uneven.  Of fewer values at the top, with a gap below that is three times as wide as they
    spread, the edge is fitted to these alone: a line across the gap would end far above them.

    Args:
        values: Singular values of the bulk in descending order, shape ``(p,)``, p ≥ 12.

    Returns:
        The edge.

    Raises:
        InputError: If there are fewer values, or they all coincide.

    Example:
        >>> from bulkedge.rmt import SingularValueLaw
        >>> values = SingularValueLaw.of((300, 500)).isf((np.arange(300) + 0.5) / 300)
        >>> abs(fit_edge(values).position / (300**0.5 + 500**0.5) - 1) < 0.01
        True
    """
    found = descending(values)
    window = _window(len(found))
    size = _before_gap(found[: window + 1])
    soft = _line(found[:size], _soft_positions(1, size))
    hard = _line(found[:size], np.arange(size) + 0.5, hard=True)
    # fewer values do not tell the two apart
    is_hard = size == window and bool(hard.misfit * HARD_EDGE_RATIO < soft.misfit)
    line = hard if is_hard else soft
    return Edge(float(line.position), float(line.scale), size, is_hard)


@renamed(level="significance")
def count_outliers(
    values: Array, *, significance: float = 0.05, exact: int | None = None
) -> tuple[int, float]:
    """How many leading values are outliers of the bulk that the rest forms.

    Each of the first p/20 values is compared with the edge that the 15 values after it make,
    in units of their own scale, by the Tracy–Widom law; the last significant one counts, and all
    before it.  Pure noise gives an outlier with probability at most ``significance``
    (Bonferroni over the tests), if there are 30 values or more.  Fewer alarm more often, since
    fewer values make the edge: at a significance of 5 %, 20 values in 8 % of draws and 13 in 12 %;
    of 12 values none is tested, since all are needed for the edge.  Heavy-tailed entries make
    outliers of their own.

    Args:
        values: Singular values in descending order, shape ``(p,)``, p ≥ 12.
        significance: Probability of a false alarm.
        exact: How many leading values are computed; only these are tested if the others come from a
            quadrature.  All if None.

    Returns:
        Their number, and the p-value of the last of them; of the first value if there are none.

    Raises:
        InputError: If there are fewer values, or they all coincide, the significance is not in
            (0, 1) or ``exact`` is no count.

    Example:
        >>> from bulkedge.rmt import SingularValueLaw
        >>> bulk = SingularValueLaw.of((300, 500)).isf((np.arange(300) + 0.5) / 300)
        >>> count_outliers(np.concatenate([[70.0, 60.0], bulk]))[0]
        2
    """
    found, significance = descending(values), checked_significance(significance)
    _window(len(found))
    tests = min(max(1, len(found) // 20), len(found) - MIN_VALUES)
    tested = tests if exact is None else min(tests, count("exact", exact, 0))
    if tests == 0:  # all values are needed for the edge
        return 0, 1.0
    p_values = np.minimum(TracyWidom().sf(_studentised(found, max(tested, 1))) * tests, 1.0)
    beyond = np.flatnonzero(p_values[:tested] < significance)
    spikes = int(beyond[-1]) + 1 if len(beyond) else 0
    return spikes, float(p_values[max(spikes - 1, 0)])


class EmpiricalBulk(Bulk):
    """The bulk estimated from given singular values.

    The first few values stand for a density ∝ √(b − s) below the edge b (constant for a hard edge,
    whose threshold is 0), integrated in closed form; the others count as single values.

    Args:
        values: Singular values of the base in descending order, shape ``(p,)``, p = min(m, n).
        shape: ``(m, n)``.
        outliers: How many leading values are not part of the bulk; the others take over their
            weight.

    Raises:
        InputError: If the number of values does not fit the shape, ``outliers`` is no count, or too
            few values are left.

    Example:
        >>> from bulkedge.rmt import SingularValueLaw, WhiteBulk
        >>> values = SingularValueLaw.of((300, 500)).isf((np.arange(300) + 0.5) / 300)
        >>> round(EmpiricalBulk(values, (300, 500)).threshold / WhiteBulk((300, 500)).threshold, 2)
        1.0
    """

    def __init__(self, values: Array, shape: tuple[int, int], *, outliers: int = 0) -> None:
        self.shape = checked_shape(shape)
        found = descending(values)
        if len(found) != min(self.shape):
            raise InputError(
                f"expected all {min(self.shape)} singular values of a "
                f"{self.shape[0]}×{self.shape[1]} matrix, got {len(found)}"
            )
        self.outliers = count("outliers", outliers, 0)
        bulk = found[self.outliers :]
        self.fitted = fit_edge(bulk)
        # A fitted edge may lie a little below a value, so the fitted values are not in the body.
        self.body = torch.from_numpy(bulk[self.fitted.count :].copy())
        self.weight = len(found) / len(bulk)

    @property
    def edge(self) -> float:
        """See :attr:`Bulk.edge`."""
        return self.fitted.position

    @property
    def threshold(self) -> float:
        """See :attr:`Bulk.threshold`; 0 for a hard edge, where D is infinite."""
        return 0.0 if self.fitted.hard else super().threshold

    def traces(self, z: Tensor) -> Traces:
        """See :meth:`Bulk.traces`."""
        points = plain(z)
        if points is None:
            return self._traces(z, self.body.to(z.device), torch)
        with np.errstate(all="ignore"):
            found = self._traces(points, self.body.numpy(), np)
        return Traces(*(torch.from_numpy(np.asarray(x)) for x in found))

    def _traces(self, z: Any, body: Any, lib: Any) -> Traces:
        """The same, of torch or of NumPy: ``lib`` is the one of the two that z and body are of."""
        m, n = self.shape
        p = min(m, n)
        inverse = 1 / ((z[..., None] - body) * (z[..., None] + body))
        top, top_slope = self._smooth(z, lib)
        total = self.weight * (z * inverse.sum(-1) + top)
        slope = self.weight * (
            inverse.sum(-1) - 2 * lib.square(z[..., None] * inverse).sum(-1) + top_slope
        )
        return Traces(
            (total + (m - p) / z) / m,
            (total + (n - p) / z) / n,
            (slope - (m - p) / lib.square(z)) / m,
            (slope - (n - p) / lib.square(z)) / n,
        )

    def _smooth(self, z: Any, lib: Any) -> tuple[Any, Any]:
        """``count·E[z/(z² − t²)]`` and its slope over the smooth density of the first values t."""
        # With t = b − w x the density is constant in x on (0, 1) for a hard edge, 3√x/2 for a soft
        # one; and z/(z² − t²) = ½/(z − t) + ½/(z + t).
        edge = self.fitted
        below = lib.clip(z - edge.position, 0.0, None)
        average = _average_hard if edge.hard else _average_soft
        near, near_slope = average(below, edge.width, lib)
        far, far_slope = average(z + edge.position, -edge.width, lib)
        return edge.count * (near + far) / 2, edge.count * (near_slope + far_slope) / 2


def _average_hard(g: Any, w: float, lib: Any) -> tuple[Any, Any]:
    """``∫₀¹ dx/(g + w x)`` and its derivative by g, of NumPy or torch."""
    return lib.log1p(w / g) / w, -1 / (g * (g + w))


def _average_soft(g: Any, w: float, lib: Any) -> tuple[Any, Any]:
    """``∫₀¹ 3√x/2 dx/(g + w x)`` and its derivative by g, for w > −g."""
    # With x = y² and q = g/|w| it is (3/w)(1 − T), T = √q·arctan(1/√q), or √q·artanh(1/√q) if w < 0
    near = g < SERIES_FROM * abs(w)
    far, far_slope = _average_soft_far(lib.where(near, SERIES_FROM * abs(w), g), w)
    q = lib.where(near, g, SERIES_FROM * abs(w)) / abs(w)
    root = lib.sqrt(q)
    if w > 0:
        angle = lib.arctan2(lib.ones_like(root), root)
        T, slope = root * angle, angle / (2 * root) - 0.5 / (1 + q)
    else:
        angle = lib.arctanh(1 / root)
        T, slope = root * angle, angle / (2 * root) - 0.5 / (q - 1)
    return (
        lib.where(near, (1 - T) * 3 / w, far),
        lib.where(near, -slope * 3 / (w * abs(w)), far_slope),
    )


def _average_soft_far(g: Any, w: float) -> tuple[Any, Any]:
    """The same by its series in w/g, since 1 − T loses the digits of g/|w|."""
    ratio = w / g
    total = slope = 0.0 * g
    for k in reversed(range(SERIES_TERMS)):
        total = 3 / (2 * k + 3) - ratio * total
        slope = 3 * (k + 1) / (2 * k + 3) - ratio * slope
    return total / g, -slope / (g * g)


def _studentised(values: np.ndarray, tests: int) -> np.ndarray:
    """Each of the first values in units of the edge that the ones after it make."""
    scores = np.empty(tests)
    sizes = np.array([_window(len(values) - k) for k in range(tests)])
    for size in np.unique(sizes):
        (first,) = np.nonzero(sizes == size)
        windows = sliding_window_view(values, size)[first]
        line = _line(windows[:, 1:], _soft_positions(2, size))
        scores[first] = (windows[:, 0] - line.position) / line.scale
    return scores


def _soft_positions(first: int, last: int) -> np.ndarray:
    """``a_j = (3π(j − ¾)/2)^(2/3)``, how far below a soft edge the j-th value lies."""
    return (1.5 * math.pi * (np.arange(first, last + 1) - 0.75)) ** (2 / 3)


class _Line(NamedTuple):
    """``b − κ·positions`` through rows of values: b, κ and the misfit in counts squared of each."""

    position: np.ndarray
    scale: np.ndarray
    misfit: np.ndarray


def _line(values: np.ndarray, positions: np.ndarray, *, hard: bool = False) -> _Line:
    """Weighted least squares along the last axis."""
    # The count below a point fluctuates by O(1), a value by the local spacing.
    spacing = np.ones_like(positions) if hard else 1 / np.sqrt(positions)
    weight = spacing**-2 / np.sum(spacing**-2)
    centred, middle = positions - weight @ positions, values @ weight
    scale = -((values - middle[..., None]) @ (weight * centred)) / (weight @ centred**2)
    # Rounding gives equal values a scale of either sign.
    if not (scale > ROUNDING * np.abs(middle)).all():
        raise InputError("expected singular values that differ, got equal ones; they have no edge")
    offset = (values - middle[..., None]) / scale[..., None] + centred
    misfit = np.mean((offset / (spacing * _unit(hard))) ** 2, axis=-1)
    return _Line(middle + scale * (weight @ positions), scale, misfit)


def _unit(hard: bool) -> float:
    """The spacing of neighbours in units of κ, at position 1."""
    return 1.0 if hard else math.pi


def _before_gap(values: np.ndarray) -> int:
    """How many of all values but the last stand before a gap; all of these without one."""
    spread, gaps = values[0] - values[:-1], values[:-1] - values[1:]
    wide = np.flatnonzero((gaps > GAP * spread) & (spread > EQUAL * values[0]))
    groups = wide[wide >= LEAST_GROUP - 1]
    return int(groups[0]) + 1 if len(groups) else len(values) - 1


def _window(size: int) -> int:
    """How many of so many values make an edge."""
    if size < MIN_VALUES:
        raise InputError(f"expected at least {MIN_VALUES} singular values in a bulk, got {size}")
    return min(FITTED_VALUES, size // 3)


def checked_significance(significance: Any) -> float:
    """The probability of a false alarm; InputError unless it is in (0, 1)."""
    number = real(significance)
    if not 0 < number < 1:
        raise InputError(f"expected a significance between 0 and 1, got {significance}")
    return number


def descending(values: Array) -> np.ndarray:
    """Finite singular values in descending order, float64, on the CPU; InputError otherwise."""
    found = enter_real(values)[0].detach().cpu().numpy()
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any():
        raise InputError("expected one row of finite singular values ≥ 0; got something else")
    if (np.diff(found) > 0).any():
        raise InputError("expected singular values in descending order; sort them first")
    return found
