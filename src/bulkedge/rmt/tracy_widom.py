"""The Tracy–Widom laws, where the largest eigenvalue or singular value of noise fluctuates.

With A_s the operator of kernel ``Ai(x + y + s)`` on L²(0, ∞), everything follows from
``D_∓(s) = det(I ∓ A_s)``:  F1 = D₋,  F2 = D₋D₊,  F4 = (D₋ + D₊)/2.  Four pieces:

- s ≥ −2: the eigenvalues of A_s by Gauss–Legendre give 1 − F as a sum of elementary symmetric
  functions, without a cancellation.  log(1 − F) is interpolated in s, and beyond s = 4 in s^(−3/2)
  after e^(−2/3 s^(3/2)) is taken out, so the tail is right to any s.
- −12 ≤ s < −2, where the determinants lose their digits: (log D₋D₊)'' = −q² and
  (log D₋/D₊)' = q, with q the solution of q'' = sq + 2q³ between its values at the two ends.
- s < −12: the asymptotic series, good to rounding there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from bulkedge._fields import check_fields, one_of

from ._airy import operator, survival
from ._arc import gauss_legendre
from ._arrays import elementwise, plain
from ._law import Law, keep_nan

_LEFT, _JOIN, _RIGHT = -12.0, -2.0, 4.0
"""The ends of the pieces; torch's Ai is right to rounding above −2.09 only."""
_MAX_STEPS = 60
"""Newton steps for a quantile at most."""
_NODES = 56
"""The number of collocation points of q."""
_ZETA_PRIME = -0.16542114370045092
"""The derivative ζ'(−1) of Riemann's zeta function."""
_DECAY = {1: (1, 0.75), 2: (2, 1.5), 4: (2, 3.0)}
"""The c and d of ``1 − F ~ const · exp(−c·(2/3)s^(3/2)) s^(−d)`` by β."""


@dataclass(frozen=True)
class TracyWidom(Law):
    """The law of the largest eigenvalue of noise at the edge: ``F1(s) = det(I − Ai(x + y + s))``.

    β = 1 is for real matrices (GOE, W Wᵀ), 2 for complex ones, 4 for quaternions.  For β = 4 the
    argument is scaled as ``F4(s) = ½(det(I − A_s) + det(I + A_s))``, with mean −3.2624: it is then
    also the law of the *second* largest value of real noise, in the scaling of β = 1.  Tracy and
    Widom write F4(s/√2) for the same; divide by √2 for theirs, of mean −2.3069.

    From −16 to 16, cdf, sf and their logarithms have relative errors of up to 3e-13 (1e-11 for the
    tail of β = 4); farther out, their logarithms 1e-14.  The first use of a β takes about 50 ms.

    Args:
        beta: 1, 2 or 4.

    Raises:
        InputError: If β is another.

    References:
        Tracy and Widom, arXiv:solv-int/9509007; Ferrari and Spohn, arXiv:math-ph/0505012 (the
        determinant); Bornemann, arXiv:0804.2543 (its quadrature); Baik, Buckingham and DiFranco,
        arXiv:0704.3636 (the constants of the left tail).

    Example:
        >>> TracyWidom().ppf([0.5, 0.95, 0.99]).round(4)
        array([-1.2686,  0.9793,  2.0234])
    """

    beta: int = 1

    def __post_init__(self) -> None:
        check_fields(self, beta=one_of(*_DECAY))

    def mean(self) -> float:
        """−1.2065, −1.7711 or −3.2624."""
        return _moments(self.beta)[0]

    def var(self) -> float:
        """1.6078, 0.8132 or 1.0354."""
        return _moments(self.beta)[1]

    def bulk_support(self) -> tuple[float, float]:
        """``(−∞, ∞)``."""
        return -math.inf, math.inf

    @elementwise
    def logcdf(self, x: Tensor) -> Tensor:
        """``log P(X ≤ x)``, also where the probability underflows.

        Args:
            x: Any shape; differentiable.

        Returns:
            The shape of x.
        """
        return keep_nan(x, self._logcdf(x))

    @elementwise
    def logsf(self, x: Tensor) -> Tensor:
        """``log P(X > x)``, also where the probability underflows.

        Args:
            x: Any shape; differentiable.

        Returns:
            The shape of x.
        """
        return keep_nan(x, self._logsf(x))

    def _pdf(self, x: Tensor) -> Tensor:
        left, right = self._sides(x)
        density = left.value.exp() * left.slope, -right.value.exp() * right.slope
        return torch.where(x < _JOIN, *density)

    def _logcdf(self, x: Tensor) -> Tensor:
        return self._log_below(x).value

    def _logsf(self, x: Tensor) -> Tensor:
        return self._log_above(x).value

    def _cdf(self, x: Tensor) -> Tensor:
        left, right = self._sides(x)
        return torch.where(x < _JOIN, left.value.exp(), -torch.expm1(right.value))

    def _sf(self, x: Tensor) -> Tensor:
        left, right = self._sides(x)
        return torch.where(x < _JOIN, -torch.expm1(left.value), right.value.exp())

    def _sides(self, x: Tensor) -> tuple[_Slope, _Slope]:
        """The log of the cdf up to the join, that of sf from there on."""
        return _left(self.beta, x.clamp(max=_JOIN)), _right(self.beta, x.clamp(min=_JOIN))

    def _ppf(self, q: Tensor) -> Tensor:
        return self._quantile(q, 1 - q)

    def _isf(self, q: Tensor) -> Tensor:
        return self._quantile(1 - q, q)

    @torch.no_grad()
    def _quantile(self, below: Tensor, above: Tensor) -> Tensor:
        """By Newton on the logarithm of the smaller mass."""
        # Both logarithms are concave, and each search starts where its own is below the target, so
        # that all Newton steps go in one direction.
        left, x = below <= above, torch.empty_like(below)
        low, high = below[left].log(), above[~left].log()
        x[left] = _newton(self._log_below, low, -((24 * (2 - low)) ** (1 / 3)))
        x[~left] = _newton(self._log_above, high, (1.5 * (2 - high)) ** (2 / 3))
        return x

    def _log_below(self, x: Tensor) -> _Slope:
        left, right = self._sides(x)
        return _pick(x < _JOIN, left, _complement(right))

    def _log_above(self, x: Tensor) -> _Slope:
        left, right = self._sides(x)
        return _pick(x < _JOIN, _complement(left), right)


class _Slope(NamedTuple):
    """A function and its derivative at the same points."""

    value: Tensor
    slope: Tensor


def _newton(function: Callable[[Tensor], _Slope], target: Tensor, start: Tensor) -> Tensor:
    """Where the function has this value; the start itself where it is infinite."""
    x = start
    for _ in range(_MAX_STEPS):
        value, slope = function(x)
        step = torch.where(start.isfinite(), (target - value) / slope, 0.0)
        x = x + step
        # The step after this one squares the error once more.
        if not bool((step.abs() > 1e-9 * (1 + x.abs())).any()):
            break
    return x


def _pick(condition: Tensor, yes: _Slope, no: _Slope) -> _Slope:
    return _Slope(*(torch.where(condition, *pair) for pair in zip(yes, no, strict=True)))


def _complement(log: _Slope) -> _Slope:
    """``log(1 − e^log)``."""
    mass, rest = log.value.exp(), -torch.expm1(log.value)
    return _Slope(torch.log1p(-mass), -log.slope * mass / rest)


class _Table(NamedTuple):
    """Chebyshev coefficients: log cdf on [−12, −2], log sf on [−2, 4], g on 0 ≤ s^(−3/2) ≤ 1/8."""

    left: np.ndarray
    middle: np.ndarray
    right: np.ndarray


def _left(beta: int, s: Tensor) -> _Slope:
    near = _interpolate(_table(beta).left, s.clamp(min=_LEFT), (_LEFT, _JOIN))
    return _pick(s < _LEFT, _series(beta, -s.clamp(-1e100, _LEFT)), near)


def _right(beta: int, s: Tensor) -> _Slope:
    near = _interpolate(_table(beta).middle, s.clamp(max=_RIGHT), (_JOIN, _RIGHT))
    c, d = _DECAY[beta]
    s = s.clamp(max=1e100)
    up = s.clamp(min=_RIGHT)
    g, g_slope = _interpolate(_table(beta).right, up**-1.5, (0, _RIGHT**-1.5))
    far = _Slope(
        g - c * up**1.5 / 1.5 - d * up.log(),
        -1.5 * g_slope * up**-2.5 - c * up.sqrt() - d / up,
    )
    return _pick(s > _RIGHT, far, near)


def _interpolate(coefficients: np.ndarray, x: Tensor, interval: tuple[float, float]) -> _Slope:
    """A Chebyshev sum and its derivative, by Clenshaw's recurrence."""
    low, high = interval
    y = (2 * x - low - high) / (high - low)
    points = plain(y)
    value, slope = (
        _clenshaw(sum_, y)
        if points is None
        else torch.from_numpy(np.asarray(_clenshaw(sum_, points)))
        for sum_ in (coefficients, chebyshev.chebder(coefficients))
    )
    return _Slope(value, slope * (2 / (high - low)))


def _clenshaw(coefficients: np.ndarray, y: Any) -> Any:
    """The sum at points of NumPy or torch, of their kind."""
    one, two, twice = 0.0 * y, 0.0, 2 * y
    for c in coefficients[:0:-1].tolist():
        one, two = c + twice * one - two, one
    return float(coefficients[0]) + y * one - two


@functools.lru_cache
def _table(beta: int) -> _Table:
    middle, s = _fit(48, _JOIN, _RIGHT)
    right, t = _fit(40, 0.0, _RIGHT**-1.5)
    up = t ** (-2 / 3)
    return _Table(
        _fit(_NODES, _LEFT, _JOIN)[0] @ _combine(beta, *_painleve()).value.numpy(),
        middle @ np.log(survival(beta, s, scaled=False)),
        right @ (np.log(survival(beta, up, scaled=True)) + _DECAY[beta][1] * np.log(up)),
    )


def _fit(n: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The map from values at n Chebyshev points to coefficients, and the points."""
    y = chebyshev.chebpts1(n)
    return np.linalg.inv(chebyshev.chebvander(y, n - 1)), (low + high) / 2 + (high - low) / 2 * y


def _combine(beta: int, log: _Slope, integral: _Slope) -> _Slope:
    """The log of F from ``log D₋D₊`` and ``log D₊/D₋ = ∫_s^∞ q``."""
    if beta == 2:
        return log
    if beta == 1:
        return _Slope((log.value - integral.value) / 2, (log.slope - integral.slope) / 2)
    value = (log.value + integral.value) / 2 + torch.log1p((-integral.value).exp()) - math.log(2)
    return _Slope(value, (log.slope + (integral.value / 2).tanh() * integral.slope) / 2)


@functools.lru_cache
def _painleve() -> tuple[_Slope, _Slope]:
    """``log D₋D₊`` and ``∫_s^∞ q`` at the Chebyshev points of [−12, −2]."""
    # Collocation for v = q'', whose integrals give q, is well conditioned.
    fit, s = _fit(_NODES, _LEFT, _JOIN)
    half = (_JOIN - _LEFT) / 2
    once, once_end = _integral(fit, 1, half)
    twice, twice_end = _integral(fit, 2, half)
    start, (end, log_end, integral_end) = _series_q(-_LEFT), _at_join()
    share = (s - _LEFT) / (2 * half)
    line, P = start + (end - start) * share, twice - np.outer(share, twice_end)
    q = np.sqrt(-s / 2)
    v = np.linalg.solve(P, q - line)
    for _ in range(12):
        q = line + P @ v
        v = v - np.linalg.solve(np.eye(_NODES) - (s + 6 * q**2)[:, None] * P, v - s * q - 2 * q**3)
    q = line + P @ v
    slope = (end - start - twice_end @ v) / (2 * half) + once @ v
    rise = slope**2 - s * q**2 - q**4
    log = log_end - (once_end - once) @ rise
    integral = integral_end + (once_end - once) @ q
    log, rise, integral, q = (torch.from_numpy(array) for array in (log, rise, integral, q))
    return _Slope(log, rise), _Slope(integral, -q)


def _integral(fit: np.ndarray, times: int, half: float) -> tuple[np.ndarray, np.ndarray]:
    """The maps from values at the points to integrals from the left, at the points and the end."""
    degree = _NODES - 1 + times
    coefficients = chebyshev.chebint(fit, m=times, lbnd=-1) * half**times
    points, end = chebyshev.chebpts1(_NODES), np.ones(1)
    inside = chebyshev.chebvander(points, degree) @ coefficients
    return inside, (chebyshev.chebvander(end, degree) @ coefficients)[0]


def _at_join() -> tuple[float, float, float]:
    """q, ``log D₋D₊`` and ``log D₊/D₋`` at s = −2: ``q = Ai(s) + ⟨A a, (1 − A²)⁻¹ a⟩``."""
    s = torch.from_numpy(np.array([_JOIN]))
    kernel, column = (array[0] for array in operator(s, scaled=False))
    values, vectors = torch.linalg.eigh(kernel)
    square = (vectors.T @ column) ** 2
    q = torch.special.airy_ai(s)[0] + (values / (1 - values**2)) @ square
    minus, plus = torch.log1p(-values).sum(), torch.log1p(values).sum()
    return float(q), float(minus + plus), float(plus - minus)


@functools.lru_cache
def _coefficients() -> tuple[np.ndarray, np.ndarray]:
    """The c, d of ``q = √(x/2) Σ c_k x^(−3k)`` and ``q² = (x/2) Σ d_k x^(−3k)``, x = −s → ∞."""
    c = np.array([1.0])
    for k in range(16):
        power = 0.5 - 3 * k
        padded = np.append(c, 0.0)
        cube = np.convolve(np.convolve(padded, padded), padded)[k + 1]
        c = np.append(c, (power * (power - 1) * c[k] - cube) / 2)
    return c, np.convolve(c, c)[: len(c)]


def _series_q(x: float) -> float:
    c, _ = _coefficients()
    return math.sqrt(x / 2) * float(c @ x ** (-3.0 * np.arange(len(c))))


def _series(beta: int, x: Tensor) -> _Slope:
    """The log of F at s = −x ≤ −12."""
    c, d = _coefficients()
    k = np.arange(len(c))
    # (log D₋D₊)'' = −q² and (log D₊/D₋)' = −q, term by term; the term x^(−1) of the first is a log
    first = np.where(k == 1, 0.0, -d / 2 / np.where(k == 1, 1, (2 - 3 * k) * (3 - 3 * k)))
    value, slope = _powers(x, first, 3.0 - 3 * k)
    constant = math.log(2) / 24 + _ZETA_PRIME
    log = _Slope(constant + value - x.log() / 8, 1 / (8 * x) - slope)
    value, slope = _powers(x, c / math.sqrt(2) / (1.5 - 3 * k), 1.5 - 3 * k)
    return _combine(beta, log, _Slope(value + math.log(2) / 2, -slope))


def _powers(x: Tensor, coefficients: np.ndarray, exponents: np.ndarray) -> _Slope:
    """``Σ a_k x^(p_k)`` and its derivative."""
    a, p = (torch.from_numpy(array).to(x.device) for array in (coefficients, exponents))
    x = x[..., None]
    return _Slope(x**p @ a, x ** (p - 1) @ (a * p))


@functools.lru_cache
def _moments(beta: int) -> tuple[float, float]:
    x, w = gauss_legendre(80)
    ends = np.array([_LEFT, _JOIN, _RIGHT, 30.0])
    width = np.diff(ends)[:, None]
    s = (ends[:-1, None] + width * x).ravel()
    mass = (width * w).ravel() * TracyWidom(beta).pdf(s)
    mean = float(mass @ s)
    return mean, float(mass @ (s - mean) ** 2)
