"""Where noise ends: fit a bulk to singular values with spikes present, and test what stands out.

White noise is tried first (``_noise.py``: its fit, and the expected places of its values).  Where
the Marchenko–Pastur law does not describe the values, as in most trained weights, the edge is that
of :mod:`bulkedge.rmt.empirical_bulk`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import renamed

from ._arrays import Array, count, enter_real
from ._noise import (
    VALUES_PER_OUTLIER,
    WhiteFit,
    count_misfit,
    edge_scales,
    excess_variance,
    fit_white,
    leading_misfit_limit,
    misfit_limit,
    relative_error,
)
from .bulk import Bulk, checked_shape, checked_sigma
from .empirical_bulk import (
    FITTED_VALUES,
    MIN_VALUES,
    EmpiricalBulk,
    checked_significance,
    count_outliers,
    descending,
)
from .lower_edge import LowerEdge, fit_lower_edge, white_lower_edge
from .spacings import MIN_RATIOS, SpacingTest, spacing_test
from .tracy_widom import TracyWidom
from .white_bulk import WhiteBulk

REPULSION_LIMIT = 1e-3
"""Noise repels so unusually as to be called none once in a thousand times."""
BELOW_LIMIT = 1e-3
"""The largest value of noise is called too small for it once in a thousand times."""
FIRST_TESTS = 16
"""How many values are tested before all others are."""
MIN_NORM = 1e-60
"""The least norm that is accepted: fourth powers of its inverse must not overflow."""
STEP = 0.02
"""The step of second differences of the Tracy–Widom law."""


@dataclass(frozen=True)
class BulkFit:
    """The bulk and the spikes in the singular values of a matrix.

    Attributes:
        shape: ``(m, n)`` of the matrix.
        sigma: Standard deviation τ of an entry of the noise, by the white model.
        sigma_error: Its standard error; meaningless where the values are not ``white``.
        misfit: Largest distance between the counts of values and of the white model, over p
            (Kolmogorov–Smirnov).
        misfit_limit: The misfit that noise of this size reaches once in a thousand times.
        edge: The upper edge of the bulk: τ(√m + √n) if white, else the empirical one.
        spikes: How many values are beyond it.
        p_value: Chance that noise alone makes the last of them as large; of the largest value if
            there are none.
        bulk: The bulk for further spikes: :class:`WhiteBulk` or :class:`EmpiricalBulk`.
        repulsion: Whether the values below the edge repel as those of noise; None where not all of
            them are computed, or they are too few.
        lower: The lower end of the bulk, and what lies below it; None as above, and where the
            smallest values coincide.
    """

    shape: tuple[int, int]
    sigma: float
    sigma_error: float
    misfit: float
    misfit_limit: float
    edge: float
    spikes: int
    p_value: float
    bulk: Bulk
    repulsion: SpacingTest | None = None
    lower: LowerEdge | None = None

    def __repr__(self) -> str:
        """The edge and what stands beyond it; σ only where the values are those of noise."""
        noise = f"sigma={self.sigma:.4g} ± {self.sigma_error:.1g}, " if self.white else ""
        return (
            f"BulkFit(shape={self.shape}, white={self.white}, {noise}edge={self.edge:.6g}, "
            f"spikes={self.spikes} (p_value={self.p_value:.2g}))"
        )

    @property
    def white(self) -> bool:
        """Whether the values look like noise.

        That is: the Marchenko–Pastur law describes them, and they repel as noise does.
        """
        return self.misfit <= self.misfit_limit and _repels(self.repulsion)

    @property
    def threshold(self) -> float:
        """θ_c: the strength beyond which a further spike makes an outlier."""
        return self.bulk.threshold

    def chance_of(self, value: Array) -> Any:
        """Chance that the largest value of such a bulk, without its spikes, is at least ``value``.

        Args:
            value: Singular values: number, array or tensor.

        Returns:
            The p-values, shaped and typed like ``value``: by the Tracy–Widom law at a soft edge, 0
            or 1 at a hard one.

        Raises:
            InputError: If a value is negative or not a number.
        """
        if isinstance(self.bulk, WhiteBulk):
            return edge_test(value, self.shape, sigma=self.sigma, fitted=True)
        points, leave = _enter_values(value)
        edge = self.bulk.fitted if isinstance(self.bulk, EmpiricalBulk) else None
        if edge is None or edge.hard:
            return leave((points <= self.edge).double())
        return leave(TracyWidom().sf((points - edge.position) / edge.scale))


@renamed(level="significance")
def fit_bulk(
    values: Array, shape: tuple[int, int], *, significance: float = 0.05, exact: int | None = None
) -> BulkFit:
    """Fit bulk, edge and spikes to the singular values of a matrix.

    Cost: milliseconds for thousands of values.

    Args:
        values: All singular values in descending order, shape ``(min(m, n),)``, at least 12.
        shape: ``(m, n)`` of the matrix.
        significance: Probability that noise alone is reported to have a spike, if its entries have
            Gaussian tails and one variance.  With heavier tails the largest values lie farther out
            (Student's t with 5 degrees of freedom alarms several times as often); then use
            :func:`~bulkedge.rmt.count_outliers`, which assumes no variance.
        exact: How many leading values are computed, if the others come from a quadrature; only
            these can be spikes.  All if None.

    Returns:
        The fit.  ``white`` says whether the Marchenko–Pastur law describes the values, and they
        repel as noise does.  The density alone is not enough: a matrix of two blocks of noise, with
        zeros elsewhere, also has it.  For noise each test fails once in a thousand times.  If one
        fails, edge, spikes and bulk are empirical.  At most p/8 values can be spikes of a white
        bulk, p/20 of an empirical one; more are counted as bulk.

    Raises:
        InputError: If the number of values does not fit the shape or is below 12, if values are
            not finite, descending and different, all are 0, the significance is not in (0, 1) or
            ``exact`` is not a count.

    References:
        Kritchman and Nadler, IEEE Trans. Signal Process. 57 (2009), for the sequential test;
        Nadler, J. Multivariate Anal. 102 (2011), for a test with an estimated sigma.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> W = torch.randn(200, 300, generator=generator)
        >>> W[:, 0] += 3.0
        >>> fit = fit_bulk(torch.linalg.svdvals(W), W.shape)
        >>> fit.white, fit.spikes, round(fit.sigma, 2)
        (True, 1, 1.0)
    """
    m, n = checked_shape(shape)
    found = descending(values)
    p = min(m, n)
    if len(found) != p:
        raise InputError(f"expected the {p} singular values of a {m}×{n} matrix, got {len(found)}")
    significance = checked_significance(significance)
    exact = p if exact is None else count("exact", exact, 0)
    if p < MIN_VALUES:
        raise InputError(f"expected at least {MIN_VALUES} singular values, got {p}")
    if not found[0] > 0:
        raise InputError(
            "expected a matrix other than zero, got singular values that are all 0: it has neither "
            "bulk nor edge; leave the matrix out"
        )
    if not MIN_NORM < found[0] < 1 / MIN_NORM:
        raise InputError(
            f"expected a norm between {MIN_NORM:g} and {1 / MIN_NORM:g}, got {found[0]:g}; "
            "rescale the matrix"
        )
    if not found[p // 2] > 0:
        raise InputError("expected a matrix with a bulk, got one whose median singular value is 0")
    noise = fit_white(found, (m, n))
    white = noise.misfit <= misfit_limit(p)
    spikes, p_value = (
        _count_white(found, noise, significance, exact)
        if white
        else count_outliers(found, significance=significance, exact=exact)
    )
    repulsion = _repulsion(found[spikes:], exact >= p)
    if white and not _repels(repulsion):
        white = False
        spikes, p_value = count_outliers(found, significance=significance, exact=exact)
        repulsion = _repulsion(found[spikes:], exact >= p)
    bulk: Bulk = WhiteBulk((m, n), noise.sigma)
    if not white:
        bulk = EmpiricalBulk(found, (m, n), outliers=spikes)
    return BulkFit(
        shape=(m, n),
        sigma=noise.sigma,
        sigma_error=noise.sigma * relative_error((m, n)),
        misfit=noise.misfit,
        misfit_limit=misfit_limit(p),
        edge=bulk.edge,
        spikes=spikes,
        p_value=p_value,
        bulk=bulk,
        repulsion=repulsion,
        lower=_lower(found, noise, spikes if white else None, significance, exact >= p),
    )


def fit_leading_noise(
    values: Array, shape: tuple[int, int], *, exact: int, significance: float = 0.05
) -> BulkFit | None:
    """Noise with spikes, where only the leading values are computed; None where these are not so.

    τ comes from the sum of all squares, ``Σ s² = τ²(m − r)(n − r)`` below r spikes; and ``misfit``
    from the places of the first 16 computed values below the spikes.

    Cost: a millisecond.

    Args:
        values: All singular values in descending order, with a true sum of squares.
        shape: ``(m, n)`` of the matrix.
        exact: How many leading values are computed.
        significance: See :func:`fit_bulk`.

    Returns:
        The fit; None if the computed values below the spikes are none, are farther from their
        places than those of noise are once in a thousand times, or if the largest of them is
        likewise too small.
    """
    m, n = checked_shape(shape)
    found = descending(values)
    spikes, noise, p_value = -1, WhiteFit((m, n), 0.0, 0.0), 1.0
    counted = 0
    while counted > spikes:  # the spikes that are found lower τ, so that there may be more
        spikes = counted
        rest = (m - spikes, n - spikes)
        sigma = float(np.linalg.norm(found[spikes:])) / math.sqrt(rest[0] * rest[1])
        noise = WhiteFit((m, n), sigma, 0.0)
        counted, p_value = _count_white(found, noise, significance, exact)
    largest = torch.from_numpy(found[spikes : spikes + 1])
    if exact <= spikes:
        return None
    compared = min(exact, spikes + FITTED_VALUES)  # the last to converge are the least exact
    limit = leading_misfit_limit(compared - spikes, min(m, n))
    above = _p_values(largest, (m, n), noise.sigma, spikes, fitted=True)
    misfit = count_misfit(found[:compared], spikes, noise)
    if float(above) > 1 - BELOW_LIMIT or misfit > limit:
        return None
    bulk = WhiteBulk((m, n), noise.sigma)
    return BulkFit(
        shape=(m, n),
        sigma=noise.sigma,
        sigma_error=noise.sigma / math.sqrt(2 * m * n),
        misfit=misfit,
        misfit_limit=limit,
        edge=bulk.edge,
        spikes=spikes,
        p_value=p_value,
        bulk=bulk,
    )


def edge_test(
    value: Array, shape: tuple[int, int], *, sigma: float, k: int = 1, fitted: bool = False
) -> Any:
    """Chance that the largest singular value of noise, below k − 1 spikes, is at least ``value``.

    ``(s²/τ² − μ)/ς`` follows the Tracy–Widom law, ``μ = (a + b)²``, ``ς = (a + b)(1/a + 1/b)^⅓``,
    ``a = √(m − ½)``, ``b = √(n − ½)``.  After k − 1 spikes, m and n lose k − 1.  If the values
    above the k-th are noise, too, the p-value is too large: the test errs towards noise.

    Args:
        value: Singular values: number, array or tensor.
        shape: ``(m, n)`` of the matrix.
        sigma: Standard deviation of an entry.
        k: Rank of the value, 1 for the largest; those above it are spikes.  One for all of
            ``value``.
        fitted: Whether sigma comes from :func:`fit_bulk` on the same values, whose error is then
            accounted for.

    Returns:
        The p-values, shaped and typed like ``value``.

    Raises:
        InputError: If a value is negative or not a number, sigma is not positive, or k is not a
            whole number in 1 … min(m, n).

    References:
        Johnstone, Ann. Statist. 29 (2001); Ma, Bernoulli 18 (2012), for the centring.

    Example:
        >>> p = edge_test(2 * 400**0.5, (400, 400), sigma=1.0)
        >>> round(p, 2)  # the asymptotic edge is no test at 5 %
        0.15
        >>> edge_test([39.0, 40.0, 41.0], (400, 400), sigma=1.0).round(3)
        array([0.995, 0.149, 0.   ])
    """
    shape, sigma = checked_shape(shape), checked_sigma(sigma)
    spikes = count("k", k, 1, min(shape)) - 1
    points, leave = _enter_values(value)
    return leave(_p_values(points, shape, sigma, spikes, fitted=fitted))


def _repels(found: SpacingTest | None) -> bool:
    """Whether values repel as those of noise, as far as that is known."""
    return found is None or found.p_value >= REPULSION_LIMIT


def _repulsion(values: np.ndarray, known: bool) -> SpacingTest | None:
    """How the values of a bulk repel, where all are known and there are enough."""
    if not known or len(values) < MIN_RATIOS + 2:
        return None
    return spacing_test(values)


def _lower(
    values: np.ndarray, noise: WhiteFit, spikes: int | None, significance: float, known: bool
) -> LowerEdge | None:
    """The lower end, of noise with so many spikes, or of what no law describes."""
    m, n = noise.shape
    if not known or len(values) <= MIN_VALUES:
        return None
    if spikes is not None:
        rest = (m - spikes, n - spikes)
        return white_lower_edge(values[spikes:], rest, noise.sigma, significance)
    try:
        return fit_lower_edge(values, (m, n), significance=significance)
    except InputError:  # a matrix that lacks rank has no lower edge
        return None


def _enter_values(value: Array) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Singular values, and the way back to their kind."""
    points, leave = enter_real(value)
    if not bool((points >= 0).all()):
        raise InputError("expected singular values ≥ 0, got a negative one or NaN")
    return points, leave


def _p_values(
    values: Tensor, shape: tuple[int, int], sigma: float, spikes: Any, *, fitted: bool
) -> Tensor:
    """Chances of the largest values of noise after so many spikes, one number or one a value."""
    centre, scale = (torch.as_tensor(x, device=values.device) for x in edge_scales(shape, spikes))
    x = ((values / sigma) ** 2 - centre) / scale
    if not fitted:
        return TracyWidom().sf(x)
    # The error of τ smooths the law, by its excess variance times half the second derivative.
    steps = x.new_tensor([-STEP, 0.0, STEP])
    before, here, after = TracyWidom().sf(x[..., None] + steps).unbind(-1)
    curvature = (after - 2 * here + before) / STEP**2
    return (here + curvature * excess_variance(shape) / 2).clamp(0.0, 1.0)


def _count_white(
    values: np.ndarray, noise: WhiteFit, significance: float, exact: int
) -> tuple[int, float]:
    """Test one value after the other, until one is not significant."""
    allowed = min(len(values) // VALUES_PER_OUTLIER, exact)
    spikes, p_values = 0, np.empty(0)
    # Mostly the first few values decide, and the law costs more than the rest of the fit.
    for tested in (min(FIRST_TESTS, allowed), allowed):
        rank = np.arange(max(tested, 1))
        leading = torch.from_numpy(values[rank])
        p_values = _p_values(leading, noise.shape, noise.sigma, rank, fitted=True).numpy()
        accepted = p_values[:tested] < significance
        spikes = tested if accepted.all() else int(accepted.argmin())
        if spikes < tested:
            break
    return spikes, float(p_values[max(spikes - 1, 0)])
