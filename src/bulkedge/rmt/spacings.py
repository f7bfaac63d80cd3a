"""Spacings of neighbouring eigenvalues: how strongly noise repels, and whether values do.

Whatever the density of noise, neighbours in it repel as those of a Gaussian ensemble of the same
β; independent values do not.  So what has the density of noise may still be
none.  The ratio of two neighbouring spacings needs no density, and is what is tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from bulkedge._errors import InputError
from bulkedge._fields import check_fields, one_of, whole
from bulkedge._fields import check_values as check_settings

from ._arrays import Array, enter_real
from ._gamma_law import GammaLaw
from ._law import Law

MEAN_RATIO = {0: 2 * math.log(2) - 1, 1: 0.5307, 2: 0.5996, 4: 0.6744}
"""The mean of the ratio statistic: of independent values (0), and of noise of each β."""
RATIO_VARIANCE = {0: 0.1019, 1: 0.0955, 2: 0.0819, 4: 0.0622}
"""The variance of a mean of k ratios, times k; neighbours share a spacing."""
MIN_RATIOS = 8
"""Fewer ratios have no mean that is normal."""


@dataclass(frozen=True)
class WignerSurmise(GammaLaw):
    """The law of a spacing between neighbours, in units of its mean: ``a s^β exp(−b s²)``.

    ``b = (Γ(β/2 + 1)/Γ((β + 1)/2))²`` makes the mean 1, ``a = 2b^((β+1)/2)/Γ((β + 1)/2)``: for
    β = 1 it is ``(π/2) s exp(−πs²/4)``.  Exact for two eigenvalues, within 2 % for many.

    Args:
        beta: 1, 2 or 4.

    Raises:
        InputError: If β is another.

    References:
        Wigner, Conference on Neutron Physics by Time-of-Flight (1956); Mehta, Random Matrices
        (2004), chapter 1.

    Example:
        >>> law = WignerSurmise()
        >>> round(law.cdf(1.0), 4), round(1 - math.exp(-math.pi / 4), 4)
        (0.5441, 0.5441)
    """

    beta: int = 1

    def __post_init__(self) -> None:
        check_fields(self, beta=one_of(1, 2, 4))

    @property
    def _parameters(self) -> tuple[float, float, float]:
        k = (self.beta + 1) / 2
        return k, (math.gamma(k + 0.5) / math.gamma(k)) ** 2, 2.0


@dataclass(frozen=True)
class SpacingTest:
    """Whether neighbours repel as in noise.

    Attributes:
        ratio: Mean over neighbouring spacings of the smaller over the larger one.
        expected: Its value in noise of that β.
        sd: Standard deviation of such a mean, in noise.
        count: The number of ratios.
        p_value: Chance that noise has a mean that is as far from the expected one, on either side.
    """

    ratio: float
    expected: float
    sd: float
    count: int
    p_value: float


def spacing_test(values: Array, *, beta: int = 1) -> SpacingTest:
    """Whether values repel as in noise, by the ratios of neighbouring spacings.

    ``r_i = min(d_i, d_{i+1})/max(d_i, d_{i+1})`` with the spacings d.  Its mean is 0.386 for
    independent values, 0.531, 0.600 and 0.674 for noise of β = 1, 2 and 4, and 1 for a grid,
    whatever the density, as long as that is smooth over three values: so nothing is unfolded.  It
    is the same at the edges of a spectrum as inside, within what can be measured.  A matrix of
    two independent blocks, each of them noise, has 0.42.

    Cost: a sort.

    Args:
        values: Eigenvalues or singular values, in any order, shape ``(p,)``, p ≥ 10; the values of
            a matrix with its outliers left out.
        beta: 1 for real matrices, 2 for complex ones, 4 for quaternions, 0 for independent values.

    Returns:
        The mean, and the p-value of a normal law.

    Raises:
        InputError: If there are fewer than 10 values, one is not finite, or β is another.

    References:
        Oganesyan and Huse, arXiv:cond-mat/0610854; Atas, Bogomolny, Giraud and Roux,
        arXiv:1212.5611, for the means.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = torch.linalg.svdvals(torch.randn(300, 400, generator=generator))
        >>> found = spacing_test(noise)
        >>> abs(found.ratio - 0.53) < 0.05, found.p_value > 0.01
        (True, True)
        >>> spacing_test(torch.rand(300, generator=generator)).p_value < 1e-6
        True
    """
    check_settings(spacing_test, beta=(beta, one_of(*MEAN_RATIO)))
    spacings = np.diff(_ascending(values, MIN_RATIOS + 2))
    smaller = np.minimum(spacings[1:], spacings[:-1])
    larger = np.maximum(spacings[1:], spacings[:-1])
    ratios = np.divide(smaller, larger, out=np.zeros_like(smaller), where=larger > 0)
    mean, expected = float(ratios.mean()), MEAN_RATIO[beta]
    sd = math.sqrt(RATIO_VARIANCE[beta] / len(ratios))
    p_value = math.erfc(abs(mean - expected) / sd / math.sqrt(2))
    return SpacingTest(mean, expected, sd, len(ratios), p_value)


def unfold(values: Array, law: Law | None = None, *, degree: int = 9) -> np.ndarray:
    """Values in units in which their mean spacing is 1 everywhere: ``p·F(value)``.

    F is the cdf of a law, or a polynomial through the staircase of the values themselves.  Compare
    the spacings of the result, ``np.diff``, with :class:`WignerSurmise`.

    Args:
        values: In any order, shape ``(p,)``.
        law: Of one value; None for a polynomial.
        degree: Of the polynomial.

    Returns:
        Ascending, shape ``(p,)``.  A polynomial may swing at the ends: leave out a few values.

    Raises:
        InputError: If there are no more values than the degree, or one is not finite.

    Example:
        >>> from bulkedge.rmt import Semicircle
        >>> x = np.linalg.eigvalsh(np.random.default_rng(0).standard_normal((300, 300)))
        >>> bool(abs(np.diff(unfold(x, Semicircle(300**0.5))).mean() - 1) < 0.02)
        True
    """
    check_settings(unfold, degree=(degree, whole(1)))
    ascending = _ascending(values, 2 if law is not None else degree + 2)
    if law is not None:
        return len(ascending) * law.cdf(ascending)
    ranks = np.arange(len(ascending)) + 0.5
    points = ascending / (np.abs(ascending).max() or 1.0)  # subnormal numbers have no inverse
    fit = np.polynomial.Chebyshev.fit(points, ranks, degree)
    return np.asarray(fit(points))


def _ascending(values: Array, least: int) -> np.ndarray:
    """Finite values in ascending order; InputError otherwise."""
    found = enter_real(values)[0].detach().cpu()
    if found.ndim != 1 or len(found) < least or not bool(torch.isfinite(found).all()):
        raise InputError(
            f"expected one row of at least {least} finite values, got shape {tuple(found.shape)}"
        )
    return found.sort().values.numpy()
