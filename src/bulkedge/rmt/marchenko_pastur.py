"""Marchenko–Pastur: the squared singular values of noise, and the singular values themselves."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import POSITIVE, check_fields

from ._arc import Arc
from ._law import AffineLaw, ArcLaw, require_positive


@dataclass(frozen=True)
class MarchenkoPastur(AffineLaw):
    """``√((λ₊ − x)(x − λ₋))/(2πσ²c x)`` on [λ₋, λ₊], λ_± = σ²(1 ± √c)²: eigenvalues of WWᵀ/n.

    W is m×n with independent entries of variance σ², and c = m/n.  If c > 1, a mass of 1 − 1/c
    lies at 0.  With u = σ²w, the inverse of ``stieltjes`` is ``σ²(1 + (1 − c)u)/(u(1 − cu))``.

    Args:
        ratio: c = m/n, rows over columns, positive.
        sigma: Standard deviation σ of the entries, positive.

    Raises:
        InputError: If a parameter is not positive and finite.

    References:
        Marchenko and Pastur, Math. USSR-Sb. 1 (1967) 457, doi:10.1070/SM1967v001n04ABEH001994.

    Example:
        >>> MarchenkoPastur(0.25).support()
        (0.25, 2.25)
        >>> MarchenkoPastur(4.0).atoms()
        ((0.0, 0.75),)
    """

    ratio: float
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, ratio=POSITIVE, sigma=POSITIVE)

    def mean(self) -> float:
        """``σ²``."""
        return self.sigma**2

    def var(self) -> float:
        """``cσ⁴``."""
        return self.ratio * self.sigma**4

    def bulk_support(self) -> tuple[float, float]:
        """``σ²(1 ∓ √c)²``."""
        low, high = _edges(self.ratio, self.sigma)
        return low**2, high**2

    def atoms(self) -> tuple[tuple[float, float], ...]:
        """``(0, 1 − 1/c)`` if c > 1."""
        return ((0.0, 1 - 1 / self.ratio),) if self.ratio > 1 else ()

    @property
    def _r(self) -> float:
        return math.sqrt(self.ratio)

    @functools.cached_property
    def _arc(self) -> Arc:
        return Arc.of(math.sqrt(self.ratio), _gap(self.ratio))

    def _density(self, x: Tensor) -> Tensor:
        a, b = self._gaps(x)
        # With λ₋ = 0, a = √x, and the density is infinite there.
        start = a / x if self.bulk_support()[0] else x**-0.5
        return start * b / (2 * math.pi * self.sigma**2 * self.ratio)


@dataclass(frozen=True)
class SingularValueLaw(ArcLaw):
    """``√((s² − s₋²)(s₊² − s²))/(πσ² min(c, 1) s)`` on [s₋, s₊] = σ|1 ∓ √c|.

    The law of the min(m, n) singular values of W/√n, where W is m×n with independent entries of
    variance σ², and c = m/n.  It has no atom, and its mass is 1.  A Stieltjes transform in closed
    form exists for the squares alone; use that of :class:`MarchenkoPastur`.

    Args:
        ratio: c = m/n, rows over columns, positive.
        sigma: Standard deviation σ of the entries of W, positive.

    Raises:
        InputError: If a parameter is not positive and finite.

    References:
        Marchenko and Pastur, Math. USSR-Sb. 1 (1967) 457, doi:10.1070/SM1967v001n04ABEH001994.

    Example:
        >>> SingularValueLaw(0.25).support()
        (0.5, 1.5)
        >>> SingularValueLaw.of((100, 400), sigma=0.05).support()
        (0.5, 1.5)
    """

    ratio: float
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, ratio=POSITIVE, sigma=POSITIVE)

    @classmethod
    def of(cls, shape: tuple[int, int], sigma: float = 1.0) -> SingularValueLaw:
        """The law of the singular values of W itself, entries of standard deviation σ.

        Args:
            shape: (m, n) of W; (n, m) gives the same law.
            sigma: Standard deviation of the entries, positive.

        Returns:
            The law with ratio m/n and σ√n.

        Raises:
            InputError: If the shape is not a pair of positive numbers, or σ is not positive.
        """
        if len(shape) != 2 or min(shape) < 1:
            raise InputError(f"expected a shape (m, n) of a matrix, got {tuple(shape)}")
        tau = require_positive("sigma", sigma)
        return SingularValueLaw(shape[0] / shape[1], tau * math.sqrt(shape[1]))

    def mean(self) -> float:
        """``τ·₂F₁(½, −½; 2; κ)`` with κ = min(c, 1/c) and τ = σ max(1, √c)."""
        return self._tau * (1 - _shortfall(min(self.ratio, 1 / self.ratio)))

    def var(self) -> float:
        """``σ² max(1, c) − mean²``."""
        short = _shortfall(min(self.ratio, 1 / self.ratio))
        return self._tau**2 * short * (2 - short)

    def bulk_support(self) -> tuple[float, float]:
        """``σ|1 ∓ √c|``."""
        return _edges(self.ratio, self.sigma)

    @property
    def _tau(self) -> float:
        """σ max(1, √c): the root of E s²."""
        return self.sigma * max(1.0, math.sqrt(self.ratio))

    @functools.cached_property
    def _arc(self) -> Arc:
        arc = Arc.of(math.sqrt(self.ratio), _gap(self.ratio))
        return Arc(arc.radius, arc.gap, 1.0)

    def _gaps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.bulk_support()
        return (x - low).sqrt() * (x + low).sqrt(), (high - x).sqrt() * (high + x).sqrt()

    def _place(self, sine: Tensor, cosine: Tensor) -> Tensor:
        low, high = self.bulk_support()
        width = math.sqrt((high - low) * (high + low))
        near = torch.hypot(width * sine, torch.full_like(sine, low))
        return torch.where(sine < cosine, near, (high**2 - (width * cosine) ** 2).sqrt())

    def _density(self, x: Tensor) -> Tensor:
        a, b = self._gaps(x)
        # With s₋ = 0, a = s, and the density is finite there.
        start = a / x if self.bulk_support()[0] else torch.ones_like(x)
        return start * b / (math.pi * self.sigma**2 * min(self.ratio, 1.0))


@dataclass(frozen=True)
class QuarterCircle(SingularValueLaw):
    """``√(4σ² − s²)/(πσ²)`` on [0, 2σ]: singular values of a square W/√n, mean 8σ/(3π).

    Args:
        sigma: Standard deviation σ of the entries of W, positive.

    Raises:
        InputError: If σ is not positive and finite.

    References:
        Marchenko and Pastur, Math. USSR-Sb. 1 (1967) 457, doi:10.1070/SM1967v001n04ABEH001994.

    Example:
        >>> round(QuarterCircle().mean(), 6)
        0.848826
    """

    ratio: float = field(default=1.0, init=False, repr=False)
    sigma: float = 1.0


def _gap(ratio: float) -> float:
    """``1 − √c``, accurate near c = 1."""
    return (1 - ratio) / (1 + math.sqrt(ratio))


def _edges(ratio: float, sigma: float) -> tuple[float, float]:
    return sigma * abs(_gap(ratio)), sigma * (1 + math.sqrt(ratio))


def _shortfall(c: float) -> float:
    """``1 − ₂F₁(½, −½; 2; c)`` for 0 ≤ c ≤ 1, from 0 up to 1 − 8/(3π)."""
    # The series, and where it converges slowly ₂F₁ = 4/(3πc) ((1 + c)E − (1 − c)K) of modulus √c
    if c < 0.25:
        term, total = 1.0, 0.0
        for k in range(40):
            term *= (k + 0.5) * (k - 0.5) / ((k + 1) * (k + 2)) * c
            total -= term
        return total
    if c == 1:
        return 1 - 8 / (3 * math.pi)
    first, second = _elliptic(c)
    return 1 - 4 / (3 * math.pi * c) * ((1 + c) * second - (1 - c) * first)


def _elliptic(c: float) -> tuple[float, float]:
    """Complete elliptic K and E of modulus √c < 1, by the arithmetic-geometric mean."""
    a, g, total, weight = 1.0, math.sqrt(1 - c), c / 2, 0.5
    for _ in range(10):
        a, g, difference = (a + g) / 2, math.sqrt(a * g), (a - g) / 2
        weight *= 2
        total += weight * difference**2
    first = math.pi / (2 * a)
    return first, first * (1 - total)
