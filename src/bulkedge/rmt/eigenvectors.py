"""Eigenvectors and singular vectors of noise: no direction is preferred.

Such a vector is uniform on the sphere.  Its components are as good as independent normal ones, and
about a third of them take part in it; a vector that has learned something leans on fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import check_fields, check_values, one_of

from ._arrays import Array, enter
from ._gamma_law import GammaLaw

MIN_SIZE = 20
"""Vectors with fewer components are too few for the approximation of the test."""


@dataclass(frozen=True)
class PorterThomas(GammaLaw):
    """The law of ``N|u_i|²``, a squared component of a vector of noise, N → ∞.

    ``y^(β/2−1) e^(−βy/2) (β/2)^(β/2)/Γ(β/2)``: χ² with β degrees of freedom over β.  Mean 1,
    variance 2/β.

    Args:
        beta: 1 for real vectors, 2 for complex ones, 4 for quaternions.

    Raises:
        InputError: If β is another.

    References:
        Porter and Thomas, Phys. Rev. 104 (1956) 483, doi:10.1103/PhysRev.104.483.

    Example:
        >>> round(PorterThomas().sf(3.841), 3), round(PorterThomas(2).sf(1.0), 4)
        (0.05, 0.3679)
    """

    beta: int = 1

    def __post_init__(self) -> None:
        check_fields(self, beta=one_of(1, 2, 4))

    @property
    def _parameters(self) -> tuple[float, float, float]:
        return self.beta / 2, self.beta / 2, 1.0


@dataclass(frozen=True)
class VectorTest:
    """Whether vectors spread over their components as in noise.

    Attributes:
        participation: ``(Σ|u_i|²)²/Σ|u_i|⁴``, the number of components that take part, from 1 to N;
            a number for one vector, otherwise one per column.
        expected: Its value for noise: ``(N + 2)/3`` for real vectors, ``(N + 1)/2`` for complex.
        p_value: Chance that noise is as far from that, on either side.
    """

    participation: Any
    expected: float
    p_value: Any


def vector_test(vectors: Array, *, beta: int | None = None) -> VectorTest:
    """Whether vectors look like noise, by the number of components that take part.

    The inverse participation ``S = Σ|u_i|⁴/(Σ|u_i|²)²`` has known moments for a uniform vector;
    with the first three, the transformation of Anscombe and Glynn makes it normal.  Vectors of one
    matrix are orthogonal, so p-values of many of them are nearly, not quite, independent.

    Args:
        vectors: Shape ``(N,)`` or, as columns, ``(N, k)``, N ≥ 20, real or complex, of any norm.
        beta: 1, 2 or 4; None for 1 of real and 2 of complex vectors.

    Returns:
        Participation and p-values.

    Raises:
        InputError: If there are fewer components, one is not finite, or a vector is zero.

    References:
        Anscombe and Glynn, Biometrika 70 (1983) 227; Porter and Thomas, Phys. Rev. 104 (1956) 483.

    Example:
        >>> u = torch.randn(400, generator=torch.Generator().manual_seed(1)).numpy()
        >>> bool(vector_test(u).p_value > 0.01), round(vector_test(u).expected)
        (True, 134)
        >>> u[:4] = 10.0
        >>> bool(vector_test(u).p_value < 1e-6)
        True
    """
    x, leave = enter(vectors)
    beta = (2 if x.is_complex() else 1) if beta is None else beta
    check_values(vector_test, beta=(beta, one_of(1, 2, 4)))
    if x.ndim not in (1, 2) or len(x) < MIN_SIZE:
        raise InputError(
            f"expected vectors of at least {MIN_SIZE} components as columns, got shape "
            f"{tuple(x.shape)}"
        )
    square = x.abs().square()
    total = square.sum(0)
    if not bool((total.isfinite() & (total > 0)).all()):
        raise InputError("expected finite vectors that are not zero; got another")
    inverse = square.square().sum(0) / total.square()
    first, variance, third = _moments(len(x), beta)
    z = _normal((inverse - first) / math.sqrt(variance), third / variance**1.5)
    p_value = torch.special.erfc(z.abs() / math.sqrt(2))
    return VectorTest(leave(1 / inverse), 1 / first, leave(p_value))


def _moments(size: int, beta: int) -> tuple[float, float, float]:
    """Mean, variance and third central moment of S for a uniform vector."""
    # |u_i|² are gamma variables of shape h over their sum, which is independent of the ratios
    h, n = beta / 2, size
    g2, g4, g6 = (_rising(h, k) for k in (2, 4, 6))
    sums = (
        n * g2,
        n * g4 + n * (n - 1) * g2**2,
        n * g6 + 3 * n * (n - 1) * g4 * g2 + n * (n - 1) * (n - 2) * g2**3,
    )
    raw = [total / _rising(n * h, 2 * k) for k, total in enumerate(sums, 1)]
    mean = raw[0]
    return mean, raw[1] - mean**2, raw[2] - 3 * mean * raw[1] + 2 * mean**3


def _rising(x: float, k: int) -> float:
    """``x(x + 1)…(x + k − 1)``."""
    return math.prod(x + i for i in range(k))


def _normal(x: Tensor, skewness: float) -> Tensor:
    """A variable of mean 0, variance 1 and this skewness, made normal (Anscombe and Glynn)."""
    freedom = 6 + 8 / skewness * (2 / skewness + math.sqrt(1 + 4 / skewness**2))
    share = 2 / (9 * freedom)
    base = (1 - 2 / freedom) / (1 + x * math.sqrt(2 / (freedom - 4)))
    # below its least value, which noise does not reach, the cube root has no meaning
    root = base.abs().pow(1 / 3).where(base > 0, math.inf)
    return ((1 - share) - root) / math.sqrt(share)
