"""The joint laws of all eigenvalues of noise: the Gaussian and the Laguerre (Wishart) ensemble.

For every β > 0 they are the laws of the eigenvalues of a tridiagonal matrix of independent entries,
and of the squared singular values of a bidiagonal one, which is how they are drawn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import POSITIVE, check_fields, whole

from ._arrays import Array, enter_real
from .bulk import checked_shape


class Ensemble(ABC):
    """A joint law of eigenvalues, ``∏_{i<j} |λ_i − λ_j|^β ∏_i w(λ_i)``."""

    beta: float

    @property
    @abstractmethod
    def count(self) -> int:
        """How many eigenvalues there are."""

    def logpdf(self, values: Array) -> Any:
        """The log of the joint density of the eigenvalues in descending order.

        That is log p! above the density of p eigenvalues in no order.  Cost: O(p²).

        Args:
            values: Eigenvalues, in any order, shape ``(..., p)``; differentiable where they differ.

        Returns:
            Shape ``(...)``: −∞ where two are equal, or one lies outside the support.

        Raises:
            InputError: If the last dimension is not p, or values are not real.
        """
        x, leave = enter_real(values)
        if x.ndim == 0 or x.shape[-1] != self.count:
            raise InputError(
                f"expected {self.count} eigenvalues in the last dimension, got shape "
                f"{tuple(x.shape)}"
            )
        first, second = torch.triu_indices(self.count, self.count, 1, device=x.device)
        repulsion = (x[..., first] - x[..., second]).abs().log().sum(-1)
        order = math.lgamma(self.count + 1)
        return leave(self.beta * repulsion + self._log_weight(x) + order - self._log_norm())

    def rvs(
        self, size: int | tuple[int, ...] = (), *, generator: np.random.Generator | None = None
    ) -> np.ndarray:
        """Independent draws of all eigenvalues, by a banded matrix.

        Cost: O(p³) each.

        Args:
            size: How many, or a shape.
            generator: Of NumPy; a fresh one if None.

        Returns:
            Eigenvalues in descending order, shape ``(*size, p)``.

        Raises:
            InputError: If the generator is not one of NumPy.
        """
        generator = np.random.default_rng() if generator is None else generator
        if not isinstance(generator, np.random.Generator):
            raise InputError(
                f"expected a generator of NumPy, got {type(generator).__name__}; "
                "pass np.random.default_rng(seed)"
            )
        shape = size if isinstance(size, tuple) else (size,) if size != () else ()
        return self._draw(shape, generator)[..., ::-1]

    @abstractmethod
    def _log_weight(self, x: Tensor) -> Tensor:
        """``Σ log w``, −∞ outside the support."""

    @abstractmethod
    def _log_norm(self) -> float:
        """The log of the integral over all of space."""

    @abstractmethod
    def _draw(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """Draws in ascending order."""


@dataclass(frozen=True)
class GaussianEnsemble(Ensemble):
    """The eigenvalues of a symmetric matrix of noise: ``w(λ) = exp(−βλ²/(4σ²))``.

    β = 1 for real symmetric matrices (GOE), 2 for complex Hermitian ones (GUE), 4 for quaternions
    (GSE); other β > 0 have no such matrix.  The integral is Mehta's, ``x = λ√(β/2)/σ``:

        ∫ ∏|x_i − x_j|^β e^{−Σx²/2} dx = (2π)^{N/2} ∏_{j=1}^N Γ(1 + jβ/2)/Γ(1 + β/2)

    Args:
        size: N.
        beta: β.
        sigma: σ, the root of the mean square of an entry off the diagonal; the spectrum fills
            ``(−2σ√N, 2σ√N)`` whatever β is.

    Raises:
        InputError: If the size is no count, or β or σ is not positive.

    References:
        Mehta, Random Matrices (2004); Dumitriu and Edelman, arXiv:math-ph/0206043, for the draws.

    Example:
        >>> pair = GaussianEnsemble(2)  # (a − b) exp(−(a² + b²)/4)/(4√(2π)), a > b
        >>> round(pair.logpdf([1.0, -1.0]), 4), math.log(2 * math.exp(-0.5) / 4 / 6.2832**0.5)
        (-2.1121, -2.112...)
        >>> GaussianEnsemble(3, beta=2.0).rvs(5, generator=np.random.default_rng(0)).shape
        (5, 3)
    """

    size: int
    beta: float = 1.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, size=whole(1), beta=POSITIVE, sigma=POSITIVE)

    @property
    def count(self) -> int:
        """See :attr:`Ensemble.count`: N."""
        return self.size

    def _log_weight(self, x: Tensor) -> Tensor:
        return -self.beta / (4 * self.sigma**2) * x.square().sum(-1)

    def _log_norm(self) -> float:
        n, half = self.size, self.beta / 2
        unit = n / 2 * math.log(2 * math.pi) + sum(
            math.lgamma(1 + j * half) - math.lgamma(1 + half) for j in range(1, n + 1)
        )
        return unit + (n + half * n * (n - 1)) * math.log(self.sigma / math.sqrt(half))

    def _draw(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        n = self.size
        matrix = np.zeros((*shape, n, n))
        place = np.arange(n)
        matrix[..., place, place] = generator.standard_normal((*shape, n))
        beside = np.sqrt(generator.chisquare(self.beta * place[:0:-1], (*shape, n - 1)) / 2)
        matrix[..., place[1:], place[:-1]] = beside  # the lower half is read
        return np.linalg.eigvalsh(matrix) * (self.sigma * math.sqrt(2 / self.beta))


@dataclass(frozen=True)
class LaguerreEnsemble(Ensemble):
    """The squared singular values of a matrix of noise: ``w(λ) = λ^a exp(−βλ/(2σ²))``, λ > 0.

    With p = min(m, n) and q = max(m, n), ``a = β(q − p + 1)/2 − 1``; β as in
    :class:`GaussianEnsemble`.  For β = 1 it is the law of Wishart, of the eigenvalues of WWᵀ other
    than zeros.  The integral is Selberg's, ``x = βλ/σ²``:

        ∫ ∏|x_i − x_j|^β ∏x^a e^{−x/2} dx
            = 2^{pqβ/2} ∏_{j=1}^p Γ(1 + jβ/2) Γ((q − p + j)β/2)/Γ(1 + β/2)

    Args:
        shape: ``(m, n)``.
        beta: β.
        sigma: σ, the root of the mean square of an entry.

    Raises:
        InputError: If the shape is invalid, or β or σ is not positive.

    References:
        Wishart, Biometrika 20A (1928); Dumitriu and Edelman, arXiv:math-ph/0206043, for the
        integral and the draws.

    Example:
        >>> one = LaguerreEnsemble((1, 3))  # chi-square with three degrees of freedom
        >>> round(one.logpdf([2.0]), 4), math.log(2**0.5 * math.exp(-1) / (2 * 3.141593) ** 0.5)
        (-1.5724, -1.572...)
    """

    shape: tuple[int, int]
    beta: float = 1.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        check_fields(self, beta=POSITIVE, sigma=POSITIVE)

    @property
    def count(self) -> int:
        """See :attr:`Ensemble.count`: min(m, n)."""
        return min(self.shape)

    def _log_weight(self, x: Tensor) -> Tensor:
        a = self.beta * (max(self.shape) - self.count + 1) / 2 - 1
        inside = (x > 0).all(-1)
        x = x.where(x > 0, 1.0)
        weight = a * x.log().sum(-1) - self.beta / (2 * self.sigma**2) * x.sum(-1)
        return weight.where(inside, -math.inf)

    def _log_norm(self) -> float:
        p, q, half = self.count, max(self.shape), self.beta / 2
        unit = p * q * half * math.log(2) + sum(
            math.lgamma(1 + j * half) + math.lgamma((q - p + j) * half) - math.lgamma(1 + half)
            for j in range(1, p + 1)
        )
        return unit + p * q * half * math.log(self.sigma**2 / self.beta)

    def _draw(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        p, q = self.count, max(self.shape)
        matrix = np.zeros((*shape, p, p))
        place = np.arange(p)
        matrix[..., place, place] = np.sqrt(
            generator.chisquare(self.beta * (q - place), (*shape, p))
        )
        beside = generator.chisquare(self.beta * place[:0:-1], (*shape, p - 1))
        matrix[..., place[1:], place[:-1]] = np.sqrt(beside)
        values = np.linalg.svd(matrix, compute_uv=False)[..., ::-1]
        return values**2 * (self.sigma**2 / self.beta)
