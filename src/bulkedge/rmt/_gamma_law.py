"""Laws of powers of a gamma variable."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ._law import Law

_LOWEST, _HIGHEST = -1500.0, 8.0
"""The logarithms between which a gamma variable is looked for."""
_HALVINGS = 64
"""After so many steps an interval of logarithms is down to rounding."""


class GammaLaw(Law):
    """``X = (Y/b)^(1/c)`` with Y of the density ``y^(k−1) e^(−y)/Γ(k)``."""

    @property
    @abstractmethod
    def _parameters(self) -> tuple[float, float, float]:
        """k, b and c."""

    def mean(self) -> float:
        """``Γ(k + 1/c)/(Γ(k) b^(1/c))``."""
        return self._moment(1)

    def var(self) -> float:
        """``E X² − (E X)²``."""
        return self._moment(2) - self._moment(1) ** 2

    def bulk_support(self) -> tuple[float, float]:
        """``(0, ∞)``."""
        return 0.0, math.inf

    def _moment(self, order: int) -> float:
        k, b, c = self._parameters
        return math.exp(math.lgamma(k + order / c) - math.lgamma(k)) * b ** (-order / c)

    def _pdf(self, x: Tensor) -> Tensor:
        k, b, c = self._parameters
        inside = x.where(x > 0, 1.0)
        log = math.log(c) + k * math.log(b) - math.lgamma(k) + (c * k - 1) * inside.log()
        density = (log - b * inside**c).exp()
        at_zero = math.inf if c * k < 1 else 0.0 if c * k > 1 else c * b**k / math.gamma(k)
        return torch.where(x > 0, density, torch.where(x == 0, at_zero, 0.0))

    def _cdf(self, x: Tensor) -> Tensor:
        k, y = self._variable(x)
        return torch.special.gammainc(k, y)

    def _sf(self, x: Tensor) -> Tensor:
        k, y = self._variable(x)
        return torch.special.gammaincc(k, y)

    def _variable(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, b, c = self._parameters
        return torch.full_like(x, k), b * x.clamp_min(0.0) ** c

    def _ppf(self, q: Tensor) -> Tensor:
        return self._quantile(q, 1 - q)

    def _isf(self, q: Tensor) -> Tensor:
        return self._quantile(1 - q, q)

    @torch.no_grad()
    def _quantile(self, below: Tensor, above: Tensor) -> Tensor:
        """By bisection on log y, with the smaller of both masses."""
        k, b, c = self._parameters
        shape = torch.full_like(below, k)
        low, high = torch.full_like(below, _LOWEST), torch.full_like(below, _HIGHEST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            y = middle.exp()
            less = torch.where(
                below <= above,
                torch.special.gammainc(shape, y) < below,
                torch.special.gammaincc(shape, y) > above,
            )
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        x = (((low + high) / 2 - math.log(b)) / c).exp()
        return torch.where(below <= 0, 0.0, torch.where(above <= 0, math.inf, x))
