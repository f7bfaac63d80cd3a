"""The semicircle law, and the spectral measure of noise at a symmetric spike."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import FINITE, POSITIVE, check_fields

from ._arc import Arc
from ._law import AffineLaw


@dataclass(frozen=True)
class Semicircle(AffineLaw):
    """``√(4σ² − x²)/(2πσ²)`` on [−2σ, 2σ]: eigenvalues of a symmetric matrix of noise.

    Off the diagonal, the entries of the n×n matrix have variance σ²/n (Wigner's theorem).
    ``stieltjes`` is ``(z − √(z² − 4σ²))/(2σ²)``, its inverse ``1/w + σ²w``.

    Args:
        sigma: Standard deviation σ of the law, positive.

    Raises:
        InputError: If σ is not positive and finite.

    References:
        Wigner, Ann. Math. 67 (1958) 325, doi:10.2307/1970008.

    Example:
        >>> law = Semicircle()
        >>> law.support(), law.cdf([-2.0, 0.0, 2.0])
        ((-2.0, 2.0), array([0. , 0.5, 1. ]))
        >>> law.stieltjes(2.5)
        0.5
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, sigma=POSITIVE)

    def mean(self) -> float:
        """``0``."""
        return 0.0

    def var(self) -> float:
        """``σ²``."""
        return self.sigma**2

    def bulk_support(self) -> tuple[float, float]:
        """``(−2σ, 2σ)``."""
        return -2.0 * self.sigma, 2.0 * self.sigma

    @property
    def _r(self) -> float:
        return 0.0

    @functools.cached_property
    def _arc(self) -> Arc:
        return Arc.of(0.0)

    def _density(self, x: Tensor) -> Tensor:
        a, b = self._gaps(x)
        return a * b / (2 * math.pi * self.sigma**2)


@dataclass(frozen=True)
class SpikedSemicircle(AffineLaw):
    """The measure ``⟨e, f(W + θeeᵀ) e⟩ = ∫ f dμ`` of a noise W at a fixed unit vector e.

    Its density is ``√(4σ² − x²)/(2π(σ² + θ² − θx))``; if |θ| > σ, the outlier θ + σ²/θ holds a mass
    of 1 − σ²/θ², which is the overlap of its eigenvector with e.  The histogram of all eigenvalues
    differs from it: it stays the semicircle.

    Args:
        theta: Strength θ of the spike, of either sign.
        sigma: σ of the noise, positive.

    Raises:
        InputError: If θ is not finite, or σ not positive and finite.

    References:
        Benaych-Georges and Nadakuditi, arXiv:0910.2120.

    Example:
        >>> SpikedSemicircle(2.0).atoms()
        ((2.5, 0.75),)
        >>> SpikedSemicircle(1.0).atoms()
        ()
    """

    theta: float
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, theta=FINITE, sigma=POSITIVE)

    def mean(self) -> float:
        """``θ``."""
        return self.theta

    def var(self) -> float:
        """``σ²``."""
        return self.sigma**2

    def bulk_support(self) -> tuple[float, float]:
        """``(−2σ, 2σ)``."""
        return -2.0 * self.sigma, 2.0 * self.sigma

    def atoms(self) -> tuple[tuple[float, float], ...]:
        """``(θ + σ²/θ, 1 − σ²/θ²)`` if |θ| > σ."""
        theta, sigma = self.theta, self.sigma
        if abs(theta) <= sigma:
            return ()
        mass = (1 - sigma / abs(theta)) * (1 + sigma / abs(theta))
        return ((theta + sigma / theta * sigma, mass),)

    @property
    def _r(self) -> float:
        return -self.theta / self.sigma

    @functools.cached_property
    def _arc(self) -> Arc:
        return Arc.of(self._r, (abs(self.theta) - self.sigma) / self.sigma)

    def _density(self, x: Tensor) -> Tensor:
        a, b = self._gaps(x)
        theta, sigma = abs(self.theta), self.sigma
        square = (sigma - theta) ** 2 + theta * (b if self.theta > 0 else a) ** 2
        density = a * b / (2 * math.pi * square)
        return torch.where(square == 0, math.inf, density)
