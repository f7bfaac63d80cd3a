"""The bulk of white noise, where everything that follows from the D-transform has a closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from .bulk import Bulk, Outlier, Traces, checked_shape, checked_sigma


class WhiteBulk(Bulk):
    """The bulk of an m×n matrix of independent entries with mean 0: the Marchenko–Pastur law.

    In closed form, with τ the standard deviation of an entry:

        edge       b = τ(√m + √n)
        threshold  θ_c = τ(mn)^¼
        location   ρ = √((θ² + τ²m)(θ² + τ²n)) / θ
        overlaps   (θ⁴ − τ⁴mn)/(θ²(θ² + τ²m)) on the left, (θ⁴ − τ⁴mn)/(θ²(θ² + τ²n)) on the right
        sd         τ √((left + right)/2)

    Args:
        shape: ``(m, n)``.
        sigma: Standard deviation τ of an entry.

    Raises:
        InputError: If a size or sigma is not positive.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221, section 3.1.

    Example:
        >>> WhiteBulk((400, 1600)).threshold, WhiteBulk((400, 1600)).edge
        (28.284271247461902, 60.0)
    """

    def __init__(self, shape: tuple[int, int], sigma: float = 1.0) -> None:
        self.shape = checked_shape(shape)
        self.sigma = checked_sigma(sigma)

    @property
    def edge(self) -> float:
        """See :attr:`Bulk.edge`."""
        m, n = self.shape
        return self.sigma * (m**0.5 + n**0.5)

    @property
    def threshold(self) -> float:
        """See :attr:`Bulk.threshold`."""
        m, n = self.shape
        return self.sigma * (m * n) ** 0.25

    def traces(self, z: Tensor) -> Traces:
        """See :meth:`Bulk.traces`."""
        m, n = self.shape
        z = z / self.sigma
        low, high = self._roots(z)
        # Both traces follow from D, here times τ²: zφ_u = 1 + nD and zφ_v = 1 + mD.
        D = (2 / (low + high)).square()
        slope = -2 * z / low * D / high
        left, right = (1 + n * D) / z, (1 + m * D) / z
        slopes = (n * slope - left) / z, (m * slope - right) / z
        return Traces(
            *(x / self.sigma for x in (left, right)),
            *(x / self.sigma / self.sigma for x in slopes),
        )

    def _roots(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``√(z² − (√m − √n)²)`` and ``√(z² − (√m + √n)²)``, with z over τ."""
        m, n = (size**0.5 for size in self.shape)
        low, high = ((z - c).clamp_min(0.0).sqrt() * (z + c).sqrt() for c in (abs(m - n), m + n))
        return low, high

    def _strength(self, z: Tensor) -> Tensor:
        low, high = self._roots(z / self.sigma)
        return self.sigma * (low + high) / 2

    def _locate(self, theta: Tensor) -> Tensor:
        # ρ² − b² = (θ − θ_c²/θ)²
        beyond = (theta - self.threshold) * (1 + self.threshold / theta)
        return torch.hypot(torch.full_like(theta, self.edge), beyond)

    def _outlier(self, theta: Tensor) -> Outlier:
        m, n = self.shape
        square = (self.threshold / theta).square()
        beyond = (theta - self.threshold) / theta * (1 + self.threshold / theta) * (1 + square)
        left, right = (beyond / (1 + square * c) for c in ((m / n) ** 0.5, (n / m) ** 0.5))
        sd = self.sigma * ((left + right) / 2).sqrt()
        return Outlier(self._locate(theta), left, right, sd)
