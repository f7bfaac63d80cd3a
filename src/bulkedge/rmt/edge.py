"""Where noise ends: fit a bulk to singular values with spikes present, and test what stands out.

White noise first.  In the angle ψ with ``s² = τ²(m + n + 2√(mn) cos ψ)``, ψ = 0 at the upper edge,
the number of singular values beyond ψ is, to relative order 1/p for p = min(m, n),

    N(ψ) = p·(mass of the Marchenko–Pastur law beyond ψ)
           + ¼ − ψ/2π                                   real entries
           + Σ_i arg(1 − t_i e^{−iψ})/π                 spikes, t_i = θ_i²/(τ²√(mn))

The last term follows from the determinant ``Π(1 − θ_i² D)`` whose zeros are the outliers: a spike
with t > 1 brings one value beyond the edge, and pushes all others up a little.  N gives each value
its expected place, the ratio of the lower 80 % of both is τ; what subcritical spikes there are
hide in the rest.  Outliers are found by the median first, and fed back until nothing changes.

Where that law does not describe the values, as in most trained weights, the edge is that of
:mod:`bulkedge.rmt.empirical`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import renamed

from ._arc import Arc
from ._arrays import Array, count, enter_real
from .bulk import Bulk, White, checked_shape, checked_sigma
from .empirical import FEWEST, Empirical, checked_significance, descending, separated
from .tracy_widom import TracyWidom

LOWER = 0.8
"""Share of the values, the smaller ones, that sigma is taken from."""
SURELY = 1e-3
"""Level of the first pass for outliers, before anything is fitted well."""
BLOCK = 16
"""How many values are tested at first."""
MOST = 8  # of p values, at most p/8 can be outliers of a white bulk
SMALLEST = 1e-60  # of a norm: fourth powers of its inverse must not overflow
GRID = np.linspace(0.0, math.pi, 1025)
SINE, COSINE = np.sin(GRID), np.cos(GRID)
MODES = 1024
TERMS = 256
"""Of the series of a spike's turn, which has reached rounding by then if t exceeds:"""
CONVERGED = 1.15
STEP = 0.02  # of a second difference of the Tracy–Widom law


@dataclass(frozen=True)
class BulkFit:
    """What is bulk and what is not in the singular values of a matrix.

    Attributes:
        shape: ``(m, n)`` of the matrix.
        sigma: Standard deviation τ of an entry of the noise, by the white model.
        sigma_error: Its standard error, if the model holds.
        misfit: Largest distance between the counts of values and of the white model, over p
            (Kolmogorov–Smirnov).
        misfit_limit: What noise of this size reaches once in a thousand times.
        edge: The upper edge of the bulk: τ(√m + √n) if white, else the empirical one.
        spikes: How many values stand beyond it.
        p_value: Chance that noise alone makes the last of them as large; of the largest value if
            there are none.
        bulk: What a further spike meets: :class:`White` or :class:`Empirical`.
    """

    shape: tuple[int, int]
    sigma: float
    sigma_error: float
    misfit: float
    misfit_limit: float
    edge: float
    spikes: int
    p_value: float
    bulk: Bulk = field(repr=False)

    @property
    def white(self) -> bool:
        """Whether the Marchenko–Pastur law describes the values."""
        return self.misfit <= self.misfit_limit

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
        if isinstance(self.bulk, White):
            return edge_test(value, self.shape, sigma=self.sigma, fitted=True)
        points, leave = _enter_values(value)
        edge = self.bulk.fitted if isinstance(self.bulk, Empirical) else None
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
        significance: Probability that noise alone is said to have a spike, if its entries have the
            tails of a Gaussian and one variance.  Of heavier tails the largest values stray farther
            (Student's t with 5 degrees of freedom alarms several times as often); then ask
            :func:`~bulkedge.rmt.separated`, which knows no variance.
        exact: How many leading values are computed, where the others come from a quadrature; only
            these can be spikes.  All if None.

    Returns:
        The fit.  ``white`` tells whether the Marchenko–Pastur law describes the values; where it
        does not, edge, spikes and bulk are empirical.  At most p/8 values can be spikes of a white
        bulk, p/20 of an empirical one; more are taken for bulk.

    Raises:
        InputError: If the number of values does not fit the shape or is below 12, if values are
            not finite, descending and different, the significance is not in (0, 1) or ``exact`` is
            no count.

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
    if p < FEWEST:
        raise InputError(f"expected at least {FEWEST} singular values, got {p}")
    if not SMALLEST < found[0] < 1 / SMALLEST:
        raise InputError(
            f"expected a norm between {SMALLEST:g} and {1 / SMALLEST:g}, got {found[0]:g}; "
            "rescale the matrix"
        )
    if not found[p // 2] > 0:
        raise InputError("expected a matrix with a bulk, got one whose median singular value is 0")
    noise = _fit_white(found, (m, n))
    if noise.misfit <= _misfit_limit(p):
        spikes, p_value = _count_white(found, noise, significance, exact)
        bulk: Bulk = White((m, n), noise.sigma)
    else:
        spikes, p_value = separated(found, significance=significance, exact=exact)
        bulk = Empirical(found, (m, n), outliers=spikes)
    return BulkFit(
        shape=(m, n),
        sigma=noise.sigma,
        sigma_error=noise.sigma * _relative_error((m, n)),
        misfit=noise.misfit,
        misfit_limit=_misfit_limit(p),
        edge=bulk.edge,
        spikes=spikes,
        p_value=p_value,
        bulk=bulk,
    )


def edge_test(
    value: Array, shape: tuple[int, int], *, sigma: float, k: int = 1, fitted: bool = False
) -> Any:
    """Chance that the k-th singular value of noise is at least ``value``.

    ``(s²/τ² − μ)/ς`` follows the Tracy–Widom law, ``μ = (a + b)²``, ``ς = (a + b)(1/a + 1/b)^⅓``,
    ``a = √(m − ½)``, ``b = √(n − ½)``.  For the k-th value, after k − 1 spikes, m and n lose k − 1.

    Args:
        value: Singular values: number, array or tensor.
        shape: ``(m, n)`` of the matrix.
        sigma: Standard deviation of an entry.
        k: Rank of the value, 1 for the largest; one for all of ``value``.
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
    centre, scale = (torch.as_tensor(x, device=values.device) for x in _edge_scales(shape, spikes))
    x = ((values / sigma) ** 2 - centre) / scale
    if not fitted:
        return TracyWidom().sf(x)
    # the error of τ smooths the law: its excess variance times half the second derivative
    steps = x.new_tensor([-STEP, 0.0, STEP])
    before, here, after = TracyWidom().sf(x[..., None] + steps).unbind(-1)
    curvature = (after - 2 * here + before) / STEP**2
    return (here + curvature * _excess_variance(shape) / 2).clamp(0.0, 1.0)


@dataclass(frozen=True)
class _White:
    """The white model's fit: shape, τ, misfit."""

    shape: tuple[int, int]
    sigma: float
    misfit: float


def _fit_white(values: np.ndarray, shape: tuple[int, int]) -> _White:
    """Median and surely outlying values first, then the lower 80 %, with the spikes in place."""
    sigma, count = _first_guess(values, shape)
    rank = np.arange(count, len(values))
    lower = slice(int((1 - LOWER) * len(rank)), None)
    counts, squares = _expected(shape, np.empty(0))
    for _ in range(20 if count < len(values) // MOST else 1):
        counts, squares = _expected(shape, _strengths(values[:count], shape, sigma))
        places = np.interp(rank + 0.5, counts, squares)
        before, sigma = sigma, math.sqrt((values[count:][lower] ** 2).sum() / places[lower].sum())
        if abs(sigma - before) < 1e-7 * sigma:
            break
    expected = np.interp(-((values[count:] / sigma) ** 2), -squares, counts)
    misfit = np.abs(expected - rank - 0.5).max() / len(values)
    return _White(shape, sigma, float(misfit))


def _first_guess(values: np.ndarray, shape: tuple[int, int]) -> tuple[float, int]:
    """τ from the median of what is no outlier, until their number stays."""
    m, n = shape
    count, sigma = 0, 0.0
    for _ in range(50):
        rest = (m - count, n - count)
        counts, squares = _expected(rest, np.empty(0))
        half = (len(values) - count) / 2
        median = float(np.median(values[count:]))
        sigma = median / math.sqrt(np.interp(half, counts, squares))
        centre, scale = _edge_scales(shape, count)
        beyond = int((values > sigma * math.sqrt(centre + scale * _surely())).sum())
        if beyond == count or count == len(values) // MOST:
            break
        count = min(beyond, len(values) // MOST)
    return sigma, count


def _strengths(outliers: np.ndarray, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """``t = θ²/(τ²√(mn))`` of the spikes behind outliers, 1 at least."""
    m, n = shape
    x = ((outliers / sigma) ** 2 - (m + n)) / (2 * math.sqrt(m * n))
    return x + np.sqrt(np.maximum(x * x - 1, 0)) if len(x) else x


def _expected(shape: tuple[int, int], spikes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """N(ψ) and s²/τ² on the grid of angles, with spikes of strength t > 1."""
    m, n = shape
    counts = _noise_counts(shape)
    if len(spikes):
        counts = counts + _turns(np.maximum(spikes, 1 + 1e-9)) / math.pi
    return counts, m + n + 2 * math.sqrt(m * n) * COSINE


def _turns(t: np.ndarray) -> np.ndarray:
    """``Σ_i arg(1 − t_i e^{−iψ})`` on the grid."""
    near = t[t < CONVERGED, None]
    turns = np.arctan2(near * SINE, 1 - near * COSINE).sum(axis=0)
    # each is π − ψ − Σ_k sin(kψ)/(k tᵏ); the sums of sines are a Fourier transform
    ratio = 1 / t[t >= CONVERGED]
    powers = np.cumprod(np.broadcast_to(ratio, (TERMS, len(ratio))), axis=0).sum(axis=1)
    series = np.concatenate([[0.0], powers / np.arange(1, TERMS + 1)])
    return turns + len(ratio) * (math.pi - GRID) + np.fft.rfft(series, 2 * len(GRID) - 2).imag


@functools.lru_cache(maxsize=64)
def _noise_counts(shape: tuple[int, int]) -> np.ndarray:
    """The first two lines of N(ψ)."""
    m, n = shape
    p = min(m, n)
    angle = torch.from_numpy(GRID[1:-1])
    # ψ = 0 is the upper edge, φ = 0 the lower
    above = Arc.of(math.sqrt(p / max(m, n))).above(math.pi - angle, angle)
    counts = p * np.concatenate([[0.0], above.numpy(), [1.0]]) + 0.25 - GRID / (2 * math.pi)
    counts.flags.writeable = False
    return counts


def _count_white(
    values: np.ndarray, noise: _White, significance: float, exact: int
) -> tuple[int, float]:
    """Test one value after the other, until one is not significant."""
    most = min(len(values) // MOST, exact)
    spikes, p_values = 0, np.empty(0)
    # mostly the first few decide, and the law costs more than all the rest of a fit
    for tested in (min(BLOCK, most), most):
        rank = np.arange(max(tested, 1))
        leading = torch.from_numpy(values[rank])
        p_values = _p_values(leading, noise.shape, noise.sigma, rank, fitted=True).numpy()
        accepted = p_values[:tested] < significance
        spikes = tested if accepted.all() else int(accepted.argmin())
        if spikes < tested:
            break
    return spikes, float(p_values[max(spikes - 1, 0)])


def _edge_scales(shape: tuple[int, int], spikes: Any = 0) -> tuple[Any, Any]:
    """μ and ς of the largest squared singular value of the noise that spikes leave."""
    a, b = (np.sqrt(size - spikes - 0.5) for size in shape)
    return (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)


@functools.lru_cache
def _surely() -> float:
    return TracyWidom().isf(SURELY)


@functools.lru_cache(maxsize=256)
def _statistic(shape: tuple[int, int]) -> tuple[float, float, float]:
    """Mean, variance, and covariance with the largest value, of the sum that τ² is taken from."""
    # A sum over the lower 80 % by rank is, to first order, the linear statistic of
    # f = min(s², its 80 % point).  With f = a_0/2 + Σ a_k cos kψ its variance is ½ Σ k a_k² for
    # real entries; the upper edge moves with it by Σ k a_k, in a proportion that f = s² fixes,
    # since the scale of a Gaussian matrix is independent of all ratios.
    m, n = shape
    counts, squares = _expected(shape, np.empty(0))
    p = min(m, n)
    cut = np.interp((1 - LOWER) * p, counts, squares)
    psi = (np.arange(4 * MODES) + 0.5) * (math.pi / (4 * MODES))
    f = np.minimum(m + n + 2 * math.sqrt(m * n) * np.cos(psi), cut)
    k = np.arange(1, MODES)
    # the cosine transform, by the real FFT of the even continuation
    modes = np.fft.rfft(np.concatenate([f, f[::-1]]))[1:MODES]
    a = (modes * np.exp(-0.5j * math.pi * k / (4 * MODES))).real / (4 * MODES)
    rank = np.arange(int((1 - LOWER) * p), p)
    mean = float(np.interp(rank + 0.5, counts, squares).sum())
    centre, _ = _edge_scales(shape)
    return mean, float((k * a * a).sum() / 2), float((k * a).sum() * centre / math.sqrt(m * n))


def _relative_error(shape: tuple[int, int]) -> float:
    """Standard error of the fitted τ over τ, for noise."""
    mean, variance, _ = _statistic(shape)
    return math.sqrt(variance) / mean / 2


def _excess_variance(shape: tuple[int, int]) -> float:
    """How much the variance of ``(s₁²/τ̂² − μ)/ς`` exceeds that with the true τ."""
    mean, variance, covariance = _statistic(shape)
    centre, scale = _edge_scales(shape)
    return (centre / scale) ** 2 * variance / mean**2 - 2 * centre / scale**2 * covariance / mean


def _misfit_limit(size: int) -> float:
    """The 99.9 % point of the misfit of noise, as benchmarks/rmt.py measures it."""
    # the count below a point has a variance of order log p
    return (0.6 + 0.5 * math.log(size)) / size
