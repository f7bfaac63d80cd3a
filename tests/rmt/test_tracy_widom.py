from __future__ import annotations

import functools
import math

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import integrate, linalg, special

from bulkedge._errors import InputError
from bulkedge.rmt import TracyWidom
from helpers import some

BETAS = [1, 2, 4]


@functools.cache
def painleve():
    """Hastings–McLeod from 7 down to −6: s, and log F1, F2, F4 there, by an adaptive solver."""

    def slope(s, y):
        q, dq, _, _, _ = y
        # q', q'', ∫q², ∫∫q², ∫q, from s to ∞
        return [dq, s * q + 2 * q**3, -(q**2), -y[2], -q]

    start = 7.0
    ai, dai, _, _ = special.airy(start)

    def integral_of(function):
        return integrate.quad(function, start, 30, epsabs=0, epsrel=1e-13)[0]

    # so far right q is the Airy function, up to q³
    tail = integral_of(lambda x: special.airy(x)[0])
    square = integral_of(lambda x: special.airy(x)[0] ** 2)
    twice = integral_of(lambda x: (x - start) * special.airy(x)[0] ** 2)
    s = np.linspace(start, -6, 53)
    options = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-22}
    y = integrate.solve_ivp(
        slope, (start, -6), [ai, dai, square, twice, tail], t_eval=s, **options
    ).y
    log2, integral = -y[3], y[4]
    log4 = log2 / 2 + np.log(np.cosh(integral / 2))
    return s, {1: (log2 - integral) / 2, 2: log2, 4: log4}


@functools.cache
def determinants(s, degree=5, digits=40):
    """``det(I ∓ A_s)`` by Gauss–Legendre at 3·2^(degree − 1) points in so many digits."""
    with mp.workdps(digits):
        length = (mp.mpf(max(s, 0)) ** 1.5 + 100) ** (mp.mpf(2) / 3) - s
        rule = mp.calculus.quadrature.GaussLegendre(mp.mp).calc_nodes(degree, mp.mp.prec)
        points = [(length * (1 + x) / 2, mp.sqrt(length * w / 2)) for x, w in rule]
        kernel = mp.matrix(len(points), len(points))
        for i, (x, p) in enumerate(points):
            for j, (y, q) in enumerate(points[: i + 1]):
                kernel[i, j] = kernel[j, i] = p * q * mp.airyai(s + x + y)
        unit = mp.eye(len(points))
        return mp.det(unit - kernel), mp.det(unit + kernel)


def reference(s, **precision):
    """Log F, 1 − F and its log, of every β, from the determinants."""
    minus, plus = determinants(s, **precision)
    with mp.workdps(precision.get("digits", 40)):
        values = {1: minus, 2: minus * plus, 4: (minus + plus) / 2}
        return {
            beta: (float(mp.log(F)), float(1 - F), float(mp.log(1 - F)))
            for beta, F in values.items()
        }


@pytest.mark.parametrize("beta", BETAS)
def test_agrees_with_painleve_between_minus_6_and_7(beta):
    s, logs = painleve()
    law = TracyWidom(beta)
    np.testing.assert_allclose(law.cdf(s), np.exp(logs[beta]), rtol=0, atol=1e-12)
    # the solver loses digits going left, where its solution is unstable
    np.testing.assert_allclose(law.logcdf(s), logs[beta], rtol=0, atol=1e-7)


@pytest.mark.parametrize("s", [-6.0, -1.0, 3.0])
def test_agrees_with_determinants_in_40_digits(s):
    for beta, (log, sf, logsf) in some(reference(s).items()):
        law = TracyWidom(beta)
        assert law.logcdf(s) == pytest.approx(log, rel=3e-13, abs=0)
        assert law.cdf(s) == pytest.approx(math.exp(log), rel=3e-13, abs=0)
        assert law.sf(s) == pytest.approx(sf, rel=3e-13, abs=0)
        assert law.logsf(s) == pytest.approx(logsf, rel=3e-13, abs=0)


@pytest.mark.slow
def test_right_tail_keeps_its_digits():
    rtol = {1: 1e-13, 2: 1e-13, 4: 1e-11}
    # 1 − F is e^−86 for β = 2 and 4: it takes 90 digits to see it by subtraction
    for beta, (_, sf, _) in some(reference(16.0, digits=90).items()):
        assert TracyWidom(beta).sf(16.0) == pytest.approx(sf, rel=rtol[beta], abs=0)
        assert sf < 1e-18


@pytest.mark.slow
@pytest.mark.parametrize("s", [-16.0, -12.0, -9.0])
def test_left_tail_keeps_its_digits(s):
    for beta, (log, _, _) in some(reference(s, degree=6).items()):
        assert TracyWidom(beta).logcdf(s) == pytest.approx(log, rel=1e-14, abs=0)


@pytest.mark.parametrize("s", [30.0, 60.0, 250.0, 1e4])
def test_far_right_the_leading_terms_remain(s):
    # tr A, tr A² and (tr A² − tr² A)/2; what they leave out is below rounding
    with mp.workdps(40):
        length, base = 80 / mp.sqrt(s), mp.airyai(s)
        rule = mp.calculus.quadrature.GaussLegendre(mp.mp).calc_nodes(5, mp.mp.prec)
        rule = [(length * (1 + x) / 2, length * w / 2) for x, w in rule]
        trace = sum(w * mp.airyai(s + 2 * x) / base for x, w in rule)
        square = sum(
            (1 + (j < i)) * p * q * (mp.airyai(s + x + y) / base) ** 2
            for i, (x, p) in enumerate(rule)
            for j, (y, q) in enumerate(rule[: i + 1])
        )
        one, two = mp.log(trace) + mp.log(base), mp.log(square) + 2 * mp.log(base)
        four = mp.log((square - trace**2) / 2) + 2 * mp.log(base)
    for beta, expected in ((1, one), (2, two), (4, four)):
        assert TracyWidom(beta).logsf(s) == pytest.approx(float(expected), rel=1e-14, abs=0)


@pytest.mark.parametrize("beta", BETAS)
def test_integration_from_the_right_meets_the_constants_of_the_left_tail(beta):
    law = TracyWidom(beta)
    before, after = law.logcdf([np.nextafter(-12.0, -13), -12.0])
    assert before == pytest.approx(after, rel=3e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_left_tail_is_the_printed_one(beta):
    x = 400.0
    zeta = float(mp.zeta(-1, derivative=1))
    log2 = -(x**3) / 12 - math.log(x) / 8 + math.log(2) / 24 + zeta
    log1 = -(x**3) / 24 - x**1.5 / (3 * math.sqrt(2)) - math.log(x) / 16
    log1 += -11 / 48 * math.log(2) + zeta / 2
    # F4 = (F1 + F2/F1)/2, and F1 vanishes beside the other
    expected = {1: log1, 2: log2, 4: log2 - log1 - math.log(2)}[beta]
    assert TracyWidom(beta).logcdf(-x) == pytest.approx(expected, abs=1e-3)


MOMENTS = {
    # Bornemann, arXiv:0909.1581, table 1; β = 4 by √2 and 2
    1: (-1.2065335745820, 1.607781034581),
    2: (-1.77108680741, 0.81319479283),
    4: (-2.306884893 * math.sqrt(2), 0.5177237207 * 2),
}


@pytest.mark.parametrize("beta", BETAS)
def test_moments(beta):
    law = TracyWidom(beta)
    assert law.mean() == pytest.approx(MOMENTS[beta][0], rel=1e-9)
    assert law.var() == pytest.approx(MOMENTS[beta][1], rel=1e-9)
    assert law.std() == pytest.approx(MOMENTS[beta][1] ** 0.5)
    # the trapezoidal rule of a smooth function that vanishes at both ends
    x = np.arange(-30, 25, 0.05)
    mass = law.pdf(x) * 0.05
    assert mass.sum() == pytest.approx(1, abs=1e-12)
    assert mass @ x == pytest.approx(law.mean(), abs=1e-11)
    assert mass @ (x - law.mean()) ** 2 == pytest.approx(law.var(), abs=1e-11)


def test_quantiles_of_the_tables():
    q = [0.5, 0.9, 0.95, 0.99, 0.999, 0.9999]
    expected = [-1.2686, 0.4501, 0.9793, 2.0234, 3.2722, 4.3594]
    np.testing.assert_allclose(TracyWidom(1).ppf(q), expected, atol=6e-5)
    assert TracyWidom(1).cdf(0.0) == pytest.approx(0.83190806620, abs=1e-11)
    assert TracyWidom(2).cdf(0.0) == pytest.approx(0.96937282835, abs=1e-11)
    assert TracyWidom(1).median() == pytest.approx(-1.26857, abs=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_joins_are_smooth_and_cdf_is_monotone(beta):
    law = TracyWidom(beta)
    for join in (-12.0, -2.0, 4.0):
        x = np.array([np.nextafter(join, -20), join, np.nextafter(join, 20)])
        for function in (law.pdf, law.cdf, law.sf, law.logcdf, law.logsf):
            values = function(x)
            assert np.ptp(values) <= 1e-10 * abs(values[1])
    x = np.linspace(-30, 20, 20001)
    assert np.all(np.diff(law.cdf(x)) >= -3e-16)
    assert np.all(np.diff(law.sf(x)) <= 3e-16)
    assert np.all(law.pdf(x) >= 0)
    # strictly where the numbers can tell
    assert np.all(np.diff(law.logcdf(x[x < 4])) > 0)
    assert np.all(np.diff(law.logsf(x[x > -6])) < 0)
    np.testing.assert_allclose(law.cdf(x) + law.sf(x), 1, atol=3e-16)


@pytest.mark.parametrize("beta", BETAS)
def test_values_are_the_same_with_a_gradient_and_without(beta):
    x = torch.linspace(-20, 20, 101, dtype=torch.float64)
    law = TracyWidom(beta)
    for function in (law.cdf, law.sf, law.pdf, law.logcdf, law.logsf):
        with_gradient = function(x.clone().requires_grad_())
        assert with_gradient.requires_grad
        torch.testing.assert_close(function(x), with_gradient.detach(), rtol=1e-13, atol=0)
        assert torch.equal(torch.func.vmap(function)(x), with_gradient.detach())


@pytest.mark.parametrize("beta", BETAS)
def test_density_is_the_derivative(beta):
    law = TracyWidom(beta)
    x = np.linspace(-11, 7, 61)
    h = 1e-3
    # five points: the error is h⁴/30 of the fifth derivative
    numeric = law.cdf(x - 2 * h) - 8 * law.cdf(x - h) + 8 * law.cdf(x + h) - law.cdf(x + 2 * h)
    np.testing.assert_allclose(law.pdf(x), numeric / (12 * h), atol=1e-11)


@pytest.mark.parametrize("beta", BETAS)
def test_quantiles_invert_far_into_both_tails(beta):
    law = TracyWidom(beta)
    q = np.concatenate([np.logspace(-300, -1, 60), np.linspace(0.1, 0.5, 9)])
    # the rounding of x leaves x·(slope of the log)·eps, up to 1e-12 at 1e-300
    np.testing.assert_allclose(law.cdf(law.ppf(q)), q, rtol=2e-12)
    np.testing.assert_allclose(law.sf(law.isf(q)), q, rtol=2e-12)
    x = np.linspace(-8, 1, 46)
    np.testing.assert_allclose(law.ppf(law.cdf(x)), x, atol=1e-12)
    x = np.linspace(-5, 6, 46)
    np.testing.assert_allclose(law.isf(law.sf(x)), x, atol=2e-12)
    assert law.ppf([0, 1]).tolist() == [-math.inf, math.inf]
    assert law.isf([0, 1]).tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("beta", BETAS)
def test_infinities_and_kinds(beta):
    law = TracyWidom(beta)
    assert law.cdf([-math.inf, math.inf]).tolist() == [0, 1]
    assert law.sf([-math.inf, math.inf]).tolist() == [1, 0]
    assert law.pdf([-math.inf, math.inf]).tolist() == [0, 0]
    assert math.isnan(law.cdf(math.nan))
    assert law.support() == (-math.inf, math.inf)
    assert law.atoms() == ()
    assert isinstance(law.logcdf(0.0), float)
    assert law.logsf(torch.zeros(2)).dtype == torch.float32
    with pytest.raises(InputError, match=r"expected probabilities in \[0, 1\]"):
        law.ppf(1.5)


def test_beta_is_checked():
    with pytest.raises(InputError, match=r"expected beta to be 1, 2 or 4, got 3"):
        TracyWidom(3)


def largest(beta, count, seed):
    """The two largest eigenvalues of β-Hermite matrices of order n = 10⁵, from their corner.

    Dumitriu and Edelman, arXiv:math-ph/0206043: tridiagonal, N(0, 2) and χ; beyond 10 n^(1/3) rows
    the top vectors vanish.
    """
    n, corner = 10**5, 400
    generator = np.random.default_rng(seed)
    degrees = beta * (n - np.arange(1, corner))
    tops = np.empty((count, 2))
    for i in range(count):
        diagonal = generator.standard_normal(corner) * math.sqrt(2 / beta)
        side = np.sqrt(generator.chisquare(degrees) / beta)
        top = linalg.eigh_tridiagonal(
            diagonal, side, eigvals_only=True, select="i", select_range=(corner - 2, corner - 1)
        )
        tops[i] = n ** (1 / 6) * (top - 2 * math.sqrt(n))
    return tops


def distance(law, draws):
    draws = np.sort(draws)
    return np.abs(law.cdf(draws) - (np.arange(len(draws)) + 0.5) / len(draws)).max()


@pytest.mark.parametrize("beta", BETAS)
def test_largest_eigenvalue_of_random_matrices(beta):
    tops = largest(beta, 1200, seed=beta)
    # P(KS > 1.95/√n) = 0.001
    limit = 1.95 / len(tops) ** 0.5
    law = TracyWidom(beta)
    # this ensemble at β = 4 is scaled by 2^(2/3) against the formula of F4
    assert distance(law, tops[:, 1] * (2 ** (2 / 3) if beta == 4 else 1)) < limit
    if beta == 1:
        assert distance(TracyWidom(4), tops[:, 0]) < limit
        assert distance(TracyWidom(2), tops[:, 1]) > limit
