"""The bulk of a matrix that no law describes, from its own singular values.

Near a soft edge b any bulk looks like that of every other: its j-th value lies near
``b − κ a_j``, ``a_j = (3π(j − ¾)/2)^(2/3)``, and its largest fluctuates as ``b + κ·TW₁``, with one
scale κ (the −¾ is the mean shift of real matrices).  So a least-squares line through the first few
values gives edge and scale, and tells an outlier from them, without any model of the rest.

For the D-transform the same few values are replaced by the smooth density that they come from:
the plain sum over discrete values is infinite at the largest of them, which would make every
threshold zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._arrays import Array, enter
from .bulk import Bulk, Traces, checked_shape
from .tracy_widom import TracyWidom

# more values see the curvature of the bulk, fewer are noisier
TOP = 16
FEWEST = 12
"""Values of a bulk without which its edge cannot be told."""
CLEARLY_HARD = 4.5
"""How many times better a line must fit than the 2/3 power for the edge to be called hard."""
ROUNDING = 1e-14
"""A scale below this part of the values is that of equal ones."""
FAR = 30.0  # widths from the edge, beyond which a series of so many terms is exact to rounding
FAR_TERMS = 12


@dataclass(frozen=True)
class Edge:
    """The upper edge of a bulk, from its largest values.

    Attributes:
        position: b.
        scale: κ: the j-th value lies near ``b − κ(3π(j − ¾)/2)^(2/3)``; for a hard edge
            near ``b − κ(j − ½)``.
        count: How many values it was fitted to.
        hard: The density does not fall to zero at b but breaks off, as that of uniform values.
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
    found = _descending(values)
    count = _count(len(found))
    soft, soft_misfit = _line(found[:count], _soft_positions(1, count), count)
    hard, hard_misfit = _line(found[:count], np.arange(count) + 0.5, count, hard=True)
    return hard if hard_misfit * CLEARLY_HARD < soft_misfit else soft


def separated(values: Array, *, level: float = 0.05, exact: int | None = None) -> tuple[int, float]:
    """How many leading values stand apart from any bulk that the rest could be.

    Each of the first p/20 values is compared with the edge that the 15 values after it make,
    in units of their own scale, by the Tracy–Widom law; the last that stands apart counts, and all
    before it.  Pure noise is taken for an outlier with probability ``level`` at most (Bonferroni
    over the tests), if there are 30 values or more: fewer alarm more often, a dozen more than
    twice as often.  Heavy-tailed entries make outliers of their own.

    Args:
        values: Singular values in descending order, shape ``(p,)``, p ≥ 12.
        level: Probability of a false alarm.
        exact: How many leading values are computed; only these are tested, where the others come
            from a quadrature.  All if None.

    Returns:
        Their number, and the p-value of the last of them; of the first value if there are none.

    Raises:
        InputError: If there are fewer values, or they all coincide.

    Example:
        >>> from bulkedge.rmt import SingularValueLaw
        >>> bulk = SingularValueLaw.of((300, 500)).isf((np.arange(300) + 0.5) / 300)
        >>> separated(np.concatenate([[70.0, 60.0], bulk]))[0]
        2
    """
    found = _descending(values)
    _count(len(found))
    tests = min(max(1, len(found) // 20), len(found) - FEWEST)
    looked_at = tests if exact is None else min(tests, exact)
    if looked_at == 0:  # no value can be spared
        return 0, 1.0
    scores = [_studentised(found[k:]) for k in range(looked_at)]
    p_values = np.minimum(TracyWidom().sf(np.array(scores)) * tests, 1.0)
    beyond = np.flatnonzero(p_values < level)
    count = int(beyond[-1]) + 1 if len(beyond) else 0
    return count, float(p_values[max(count - 1, 0)])


class Empirical(Bulk):
    """The bulk that given singular values are a sample of.

    The first few values stand for a density ∝ √(b − s) below the edge b (constant for a hard edge,
    whose threshold is 0), integrated in closed form; the others for themselves.

    Args:
        values: Singular values of the base in descending order, shape ``(p,)``, p = min(m, n).
        shape: ``(m, n)``.
        outliers: How many leading values are no part of the bulk; the others take over their
            weight.

    Raises:
        InputError: If the number of values does not fit the shape, or too few are left.

    Example:
        >>> from bulkedge.rmt import SingularValueLaw, White
        >>> values = SingularValueLaw.of((300, 500)).isf((np.arange(300) + 0.5) / 300)
        >>> round(Empirical(values, (300, 500)).threshold / White((300, 500)).threshold, 2)
        1.0
    """

    def __init__(self, values: Array, shape: tuple[int, int], *, outliers: int = 0) -> None:
        self.shape = checked_shape(shape)
        found = _descending(values)
        if len(found) != min(self.shape):
            raise InputError(
                f"expected all {min(self.shape)} singular values of a "
                f"{self.shape[0]}×{self.shape[1]} matrix, got {len(found)}"
            )
        bulk = found[outliers:]
        self.outliers = outliers
        self.fitted = fit_edge(bulk)
        # a fitted edge may lie a little below a value; the body must not
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
        m, n = self.shape
        p = min(m, n)
        square = self.body.to(z.device).square()
        inverse = 1 / (z[..., None].square() - square)
        top, top_slope = self._smooth(z)
        total = self.weight * (z * inverse.sum(-1) + top)
        slope = self.weight * (
            inverse.sum(-1) - 2 * z.square() * inverse.square().sum(-1) + top_slope
        )
        return Traces(
            (total + (m - p) / z) / m,
            (total + (n - p) / z) / n,
            (slope - (m - p) / z.square()) / m,
            (slope - (n - p) / z.square()) / n,
        )

    def _smooth(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``count·E[z/(z² − t²)]`` and its slope over the smooth density of the first values t."""
        # with t = b − w x the density is constant in x on (0, 1) for a hard edge, 3√x/2 for a soft
        # one; z/(z² − t²) = ½/(z − t) + ½/(z + t)
        edge = self.fitted
        below = (z - edge.position).clamp_min(0.0)
        average = _average_hard if edge.hard else _average_soft
        near, near_slope = average(below, edge.width)
        far, far_slope = average(z + edge.position, -edge.width)
        return edge.count * (near + far) / 2, edge.count * (near_slope + far_slope) / 2


def _average_hard(g: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """``∫₀¹ dx/(g + w x)`` and its derivative by g."""
    return (w / g).log1p() / w, -1 / (g * (g + w))


def _average_soft(g: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """``∫₀¹ 3√x/2 dx/(g + w x)`` and its derivative by g, for w > −g."""
    # with x = y² and q = g/|w| it is (3/w)(1 − T), T = √q·arctan(1/√q), or √q·artanh(1/√q) if w < 0
    near = g < FAR * abs(w)
    far, far_slope = _average_soft_far(torch.where(near, FAR * abs(w), g), w)
    q = torch.where(near, g, FAR * abs(w)) / abs(w)
    root = q.sqrt()
    if w > 0:
        angle = torch.atan2(torch.ones_like(root), root)
        T, slope = root * angle, angle / (2 * root) - 0.5 / (1 + q)
    else:
        angle = torch.atanh(1 / root)
        T, slope = root * angle, angle / (2 * root) - 0.5 / (q - 1)
    return (
        torch.where(near, (1 - T) * 3 / w, far),
        torch.where(near, -slope * 3 / (w * abs(w)), far_slope),
    )


def _average_soft_far(g: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """The same by its series in w/g, since 1 − T loses the digits of g/|w|."""
    total, slope = torch.zeros_like(g), torch.zeros_like(g)
    for k in reversed(range(FAR_TERMS)):
        total = 3 / (2 * k + 3) - w / g * total
        slope = 3 * (k + 1) / (2 * k + 3) - w / g * slope
    return total / g, -slope / g.square()


def _studentised(values: np.ndarray) -> float:
    """The first value in units of the edge that the ones after it make."""
    count = _count(len(values))
    edge, _ = _line(values[1:count], _soft_positions(2, count), count)
    return (values[0] - edge.position) / edge.scale


def _soft_positions(first: int, last: int) -> np.ndarray:
    """``a_j = (3π(j − ¾)/2)^(2/3)``, how far below a soft edge the j-th value lies."""
    return (1.5 * math.pi * (np.arange(first, last + 1) - 0.75)) ** (2 / 3)


def _line(
    values: np.ndarray, positions: np.ndarray, count: int, *, hard: bool = False
) -> tuple[Edge, float]:
    """Weighted least squares of ``values = b − κ·positions``, and its misfit in counts squared."""
    # the count below a point fluctuates by O(1), a value by the local spacing
    spacing = np.ones_like(positions) if hard else 1 / np.sqrt(positions)
    weight = spacing**-2 / np.sum(spacing**-2)
    centre, middle = weight @ positions, weight @ values
    scale = -(weight @ ((positions - centre) * (values - middle))) / (
        weight @ (positions - centre) ** 2
    )
    # of equal values rounding makes a scale of either sign
    if not scale > ROUNDING * abs(middle):
        raise InputError("expected singular values that differ, got equal ones; they have no edge")
    edge = Edge(float(middle + scale * centre), float(scale), count, hard)
    misfit = (values - edge.position + scale * positions) / (scale * spacing * _unit(hard))
    return edge, float(np.mean(misfit**2))


def _unit(hard: bool) -> float:
    """The spacing of neighbours in units of κ, at position 1."""
    return 1.0 if hard else math.pi


def _count(size: int) -> int:
    if size < FEWEST:
        raise InputError(f"expected at least {FEWEST} singular values in a bulk, got {size}")
    return min(TOP, size // 3)


def _descending(values: Array) -> np.ndarray:
    """Finite singular values in descending order, float64, on the CPU."""
    found = enter(values)[0].detach().cpu().numpy()
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any():
        raise InputError("expected one row of finite singular values ≥ 0; got something else")
    if (np.diff(found) > 0).any():
        raise InputError("expected singular values in descending order; sort them first")
    return found
