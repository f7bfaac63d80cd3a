"""The one measure behind every compact law here, ``(2/π) sin²φ dφ / |1 − r e^{iφ}|²`` on (0, π).

Pushed forward by ``−2 cos φ`` it is the semicircle (r = 0) and its spectral measure at a spike; by
``|1 − r e^{iφ}|²`` it is Marchenko–Pastur (r = √c), whose square root gives the singular values.

The closed form of its mass cancels in the tails, and near r = 0.  There a Gauss rule is used: the
integrand has no singularity but at ±i|ln r|, so 20 nodes reach rounding up to φ = 2|ln r|.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GAUSS_LIMIT = 2.0
"""Up to this angle from π a Gauss rule is exact to rounding, whatever r."""
_MAX_STEPS = 60
"""Newton steps for an angle at most."""
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Arc:
    """``(2/π) sin²φ dφ / (1 + r² − 2r cos φ)`` on (0, π), of mass min(1, 1/r²).

    It is kept with |r| ≤ 1, since the measure of 1/r is that of r times r², and with 1 − |r| by
    itself, which near r = 1 decides the lower tail.  A negative r is the mirror image.

    Attributes:
        radius: min(|r|, 1/|r|).
        gap: 1 − radius.
        mass: min(1, 1/r²).
        mirrored: Whether r < 0.
    """

    radius: float
    gap: float
    mass: float
    mirrored: bool = False

    @classmethod
    def of(cls, r: float, gap: float | None = None) -> Arc:
        """The measure of any real r; ``gap`` is |r| − 1 or 1 − |r|, if known better than from r."""
        size = abs(r)
        gap = abs(1 - size) if gap is None else abs(gap)
        if size <= 1:
            return cls(size, gap, 1.0, r < 0)
        return cls(1 / size, gap / size, 1 / size / size, r < 0)

    def below(self, angle: Tensor, rest: Tensor) -> Tensor:
        """The mass of (0, φ) for 0 < φ < π, relatively accurate; ``rest`` is π − φ."""
        side = self._far(angle, rest) if self.mirrored else self._near(angle)
        return self.mass * side

    def above(self, angle: Tensor, rest: Tensor) -> Tensor:
        """The mass of (φ, π) for 0 < φ < π, relatively accurate; ``rest`` is π − φ."""
        side = self._near(rest) if self.mirrored else self._far(rest, angle)
        return self.mass * side

    def angle_below(self, mass: Tensor) -> Tensor:
        """The φ with this mass below it, for masses in [0, 1/2] of the whole."""
        return self._far_angle(mass) if self.mirrored else self._near_angle(mass)

    def angle_above(self, mass: Tensor) -> Tensor:
        """The π − φ with this mass above φ, for masses in [0, 1/2] of the whole."""
        return self._near_angle(mass) if self.mirrored else self._far_angle(mass)

    def _near(self, angle: Tensor) -> Tensor:
        """The mass within an angle of 0, where the singularity is, of a measure of mass 1."""
        reach = -2 * math.log(self.radius) if self.radius else math.inf
        if reach >= math.pi:
            return _gauss(self._near_density, angle)
        tail = _gauss(self._near_density, angle.clamp(max=reach))
        return torch.where(angle <= reach, tail, self._closed(angle))

    def _far(self, angle: Tensor, rest: Tensor) -> Tensor:
        """The mass within an angle of π, of a measure of mass 1."""
        tail = _gauss(self._far_density, angle.clamp(max=_GAUSS_LIMIT))
        return torch.where(angle <= _GAUSS_LIMIT, tail, 1 - self._near(rest))

    def _closed(self, angle: Tensor) -> Tensor:
        """``(2/π)(φ/2 + sin φ/2r − (1−r²)/2r² · arg(1/(1 − r e^{iφ})))``."""
        r, gap = self.radius, self.gap
        argument = torch.atan2(r * angle.sin(), gap + 2 * r * (angle / 2).sin() ** 2)
        turn = gap * (1 + r) / (r * r) * argument
        return (angle + angle.sin() / r - turn) / math.pi

    def _near_density(self, angle: Tensor) -> Tensor:
        """sin² divided out of numerator and denominator: r = 1 has no 0/0, small φ no underflow."""
        half = angle / 2
        sine = half.sin().clamp(min=_TINY)
        return (8 / math.pi) * half.cos() ** 2 / (4 * self.radius + (self.gap / sine) ** 2)

    def _far_density(self, angle: Tensor) -> Tensor:
        denominator = self.gap**2 + 4 * self.radius * (angle / 2).cos() ** 2
        return (2 / math.pi) * angle.sin() ** 2 / denominator

    def _near_angle(self, mass: Tensor) -> Tensor:
        return _solve(self._near, self._near_density, mass / self.mass, self.gap)

    def _far_angle(self, mass: Tensor) -> Tensor:
        def far(angle: Tensor) -> Tensor:
            return self._far(angle, math.pi - angle)

        return _solve(far, self._far_density, mass / self.mass, 1 + self.radius)


@functools.lru_cache
def gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1), of rounding error."""
    x, _ = np.polynomial.legendre.leggauss(n)
    # NumPy's weights lose four digits near the ends; this sum of squares loses none
    basis = np.polynomial.legendre.legvander(x, n - 1)
    return (1 + x) / 2, 1 / ((2 * np.arange(n) + 1) * basis**2).sum(1)


def _gauss(density: Callable[[Tensor], Tensor], angle: Tensor) -> Tensor:
    """``∫_0^angle density`` by Gauss–Legendre."""
    x, w = (torch.from_numpy(array).to(angle.device) for array in gauss_legendre(20))
    return angle * (density(angle[..., None] * x) @ w)


@torch.no_grad()
def _solve(
    mass: Callable[[Tensor], Tensor],
    density: Callable[[Tensor], Tensor],
    target: Tensor,
    width: float,
) -> Tensor:
    """The angle with this mass, by Newton on log mass over log angle."""
    # The curve increases and is concave with a slope of at most 3, so Newton steps from the left
    # never overshoot.  The start is on the left, because the density is at most 2/π, and at most
    # (2/π)(φ/width)².
    some = target.clamp(min=_TINY)
    scaled = math.pi / 2 * some
    angle = torch.maximum(scaled, (3 * width**2 * scaled) ** (1 / 3))
    for _ in range(_MAX_STEPS):
        now = mass(angle)
        step = (some / now).log() * now / (angle * density(angle))
        angle = (angle * step.exp()).clamp(max=math.pi)
        # The step after this one squares the error once more.
        if not bool((step.abs() > 1e-9).any()):
            break
    return torch.where(target > 0, angle, 0.0)
