"""Where the singular values of white noise lie, with spikes among them, and the fit of that.

In the angle ψ with ``s² = τ²(m + n + 2√(mn) cos ψ)``, ψ = 0 at the upper edge,
the number of singular values beyond ψ is, to relative order 1/p for p = min(m, n),

    N(ψ) = p·(mass of the Marchenko–Pastur law beyond ψ)
           + ¼ − ψ/2π                                   real entries
           + Σ_i arg(1 − t_i e^{−iψ})/π                 spikes, t_i = θ_i²/(τ²√(mn))

The last term follows from the determinant ``Π(1 − θ_i² D)`` whose zeros are the outliers: a spike
with t > 1 brings one value beyond the edge, and pushes all others up a little.  N gives each value
its expected place, the ratio of the lower 80 % of both is τ; what subcritical spikes there are
are left among the smaller values.  Outliers are found by the median first, and put into N until
nothing changes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ._arc import Arc
from .tracy_widom import TracyWidom

LOWER_SHARE = 0.8
"""Sigma is taken from this share of the values, the smaller ones."""
FIRST_SIGNIFICANCE = 1e-3
"""Significance of the first pass for outliers, before anything is fitted well."""
VALUES_PER_OUTLIER = 8
"""Of p values, at most p/8 can be outliers of a white bulk."""
GRID = np.linspace(0.0, math.pi, 1025)
"""The angles ψ at which N(ψ) is tabulated."""
SINE, COSINE = np.sin(GRID), np.cos(GRID)
MODES = 1024
"""Terms of the cosine series of a linear statistic."""
TERMS = 256
"""Terms of the series of a spike's phase; it has reached rounding by then if t > SERIES_FROM."""
SERIES_FROM = 1.15
"""The series is used for strengths t of at least this."""


@dataclass(frozen=True)
class WhiteFit:
    """The white model's fit: shape, τ, misfit."""

    shape: tuple[int, int]
    sigma: float
    misfit: float


def fit_white(values: np.ndarray, shape: tuple[int, int]) -> WhiteFit:
    """A first guess by the median, then the lower 80 % of the values, with the spikes in N."""
    sigma, count = _first_guess(values, shape)
    rank = np.arange(count, len(values))
    lower = slice(int((1 - LOWER_SHARE) * len(rank)), None)
    counts, squares = _expected(shape, np.empty(0))
    for _ in range(20 if count < len(values) // VALUES_PER_OUTLIER else 1):
        counts, squares = _expected(shape, _strengths(values[:count], shape, sigma))
        places = np.interp(rank + 0.5, counts, squares)
        before, sigma = sigma, math.sqrt((values[count:][lower] ** 2).sum() / places[lower].sum())
        if abs(sigma - before) < 1e-7 * sigma:
            break
    misfit = _misfit(values, count, sigma, counts, squares) / len(values)
    return WhiteFit(shape, sigma, misfit)


def count_misfit(values: np.ndarray, spikes: int, fit: WhiteFit) -> float:
    """The misfit of leading values below the spikes, for a τ that is known, over all p."""
    counts, squares = _expected(fit.shape, _strengths(values[:spikes], fit.shape, fit.sigma))
    return _misfit(values, spikes, fit.sigma, counts, squares) / min(fit.shape)


def _misfit(
    values: np.ndarray, spikes: int, sigma: float, counts: np.ndarray, squares: np.ndarray
) -> float:
    """The largest distance of a value below the spikes from its place, in counts."""
    expected = np.interp(-((values[spikes:] / sigma) ** 2), -squares, counts)
    return float(np.abs(expected - np.arange(spikes, len(values)) - 0.5).max())


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
        centre, scale = edge_scales(shape, count)
        beyond = int((values > sigma * math.sqrt(centre + scale * _first_quantile())).sum())
        if beyond == count or count == len(values) // VALUES_PER_OUTLIER:
            break
        count = min(beyond, len(values) // VALUES_PER_OUTLIER)
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
        counts = counts + spike_phases(np.maximum(spikes, 1 + 1e-9)) / math.pi
    return counts, m + n + 2 * math.sqrt(m * n) * COSINE


def spike_phases(t: np.ndarray) -> np.ndarray:
    """``Σ_i arg(1 − t_i e^{−iψ})`` on the grid."""
    near = t[t < SERIES_FROM, None]
    found = np.arctan2(near * SINE, 1 - near * COSINE).sum(axis=0)
    # Each phase is π − ψ − Σ_k sin(kψ)/(k tᵏ); the sums of sines are a Fourier transform.
    ratio = 1 / t[t >= SERIES_FROM]
    powers = np.cumprod(np.broadcast_to(ratio, (TERMS, len(ratio))), axis=0).sum(axis=1)
    series = np.concatenate([[0.0], powers / np.arange(1, TERMS + 1)])
    return found + len(ratio) * (math.pi - GRID) + np.fft.rfft(series, 2 * len(GRID) - 2).imag


@functools.lru_cache(maxsize=64)
def _noise_counts(shape: tuple[int, int]) -> np.ndarray:
    """N(ψ) without spikes."""
    m, n = shape
    p = min(m, n)
    angle = torch.from_numpy(GRID[1:-1])
    # ψ = 0 is the upper edge, φ = 0 the lower one.
    above = Arc.of(math.sqrt(p / max(m, n))).above(math.pi - angle, angle)
    counts = p * np.concatenate([[0.0], above.numpy(), [1.0]]) + 0.25 - GRID / (2 * math.pi)
    counts.flags.writeable = False
    return counts


def edge_scales(shape: tuple[int, int], spikes: Any = 0) -> tuple[Any, Any]:
    """μ and ς of the largest squared singular value of noise beside this many spikes."""
    a, b = (np.sqrt(size - spikes - 0.5) for size in shape)
    return (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)


@functools.lru_cache
def _first_quantile() -> float:
    return TracyWidom().isf(FIRST_SIGNIFICANCE)


@functools.lru_cache(maxsize=256)
def _statistic(shape: tuple[int, int]) -> tuple[float, float, float]:
    """Mean, variance, and covariance with the largest value, of the sum that gives τ²."""
    # A sum over the lower 80 % by rank is, to first order, the linear statistic of
    # f = min(s², its 80 % point).  With f = a_0/2 + Σ a_k cos kψ its variance is ½ Σ k a_k² for
    # real entries; the upper edge moves with it by Σ k a_k, in a proportion that f = s² fixes,
    # since the scale of a Gaussian matrix is independent of all ratios.
    m, n = shape
    counts, squares = _expected(shape, np.empty(0))
    p = min(m, n)
    cut = np.interp((1 - LOWER_SHARE) * p, counts, squares)
    psi = (np.arange(4 * MODES) + 0.5) * (math.pi / (4 * MODES))
    f = np.minimum(m + n + 2 * math.sqrt(m * n) * np.cos(psi), cut)
    k = np.arange(1, MODES)
    # The cosine transform, by the real FFT of the even continuation.
    modes = np.fft.rfft(np.concatenate([f, f[::-1]]))[1:MODES]
    a = (modes * np.exp(-0.5j * math.pi * k / (4 * MODES))).real / (4 * MODES)
    rank = np.arange(int((1 - LOWER_SHARE) * p), p)
    mean = float(np.interp(rank + 0.5, counts, squares).sum())
    centre, _ = edge_scales(shape)
    return mean, float((k * a * a).sum() / 2), float((k * a).sum() * centre / math.sqrt(m * n))


def relative_error(shape: tuple[int, int]) -> float:
    """Standard error of the fitted τ over τ, for noise."""
    mean, variance, _ = _statistic(shape)
    return math.sqrt(variance) / mean / 2


def excess_variance(shape: tuple[int, int]) -> float:
    """How much the variance of ``(s₁²/τ̂² − μ)/ς`` exceeds that with the true τ."""
    mean, variance, covariance = _statistic(shape)
    centre, scale = edge_scales(shape)
    return (centre / scale) ** 2 * variance / mean**2 - 2 * centre / scale**2 * covariance / mean


def misfit_limit(size: int) -> float:
    """The 99.9 % point of the misfit of noise, as benchmarks/rmt.py measures it."""
    # The count below a point has a variance of order log p.
    return (0.6 + 0.5 * math.log(size)) / size


def leading_misfit_limit(count: int, size: int) -> float:
    """The 99.9 % point of the misfit of the first so many values of noise, for a τ of all squares.

    Measured on 3,000 draws of 400 × 400; fewer values leave room for less.

    Args:
        count: How many values are compared with their places.
        size: The number of all values.

    Returns:
        The limit, in counts over all values.
    """
    return min((1.65 + 0.32 * math.log(count)) / size, misfit_limit(size))
