"""Joint laws, spacings, vectors: against quadrature, exact small cases, and matrices themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from bulkedge._errors import InputError
from bulkedge.rmt import (
    GaussianEnsemble,
    LaguerreEnsemble,
    PorterThomas,
    Semicircle,
    SingularValueLaw,
    WignerSurmise,
    spacing_test,
    unfold,
    vector_test,
)
from bulkedge.rmt.spacings import MEAN_RATIO, RATIO_VARIANCE
from helpers import some
from noise import noise_values

BETAS = [1.0, 2.0, 4.0]


def mass(density, low, high):
    """Of a density of two values, the first the larger, by quadrature."""
    return integrate.dblquad(
        lambda y, x: density(x, y), low, high, low, lambda x: x, epsabs=1e-6, epsrel=1e-6
    )[0]


# ---- joint laws


@pytest.mark.parametrize("beta", [*BETAS, 3.0])
def test_the_density_of_two_eigenvalues_has_mass_one(beta):
    law = GaussianEnsemble(2, beta, sigma=0.7)
    assert mass(lambda x, y: math.exp(law.logpdf([x, y])), -7, 7) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_the_density_of_two_squared_singular_values_has_mass_one(beta, shape):
    law = LaguerreEnsemble(shape, beta, sigma=0.8)

    def density(x, y):  # of the singular values, which have no pole at zero
        if not x > y > 0:
            return 0.0
        return math.exp(law.logpdf([x * x, y * y])) * 4 * x * y

    assert mass(density, 0, 7) == pytest.approx(1, abs=1e-5)


def test_three_eigenvalues_have_mass_one():
    law = GaussianEnsemble(3, 2.0, 0.5)
    nodes, weights = np.polynomial.hermite.hermgauss(12)  # exact for polynomials times a Gaussian
    x = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), -1).reshape(-1, 3)
    w = np.prod(np.stack(np.meshgrid(weights, weights, weights, indexing="ij"), -1), -1).ravel()
    scale = math.sqrt(2 * 0.5**2)  # exp(−λ²/(2σ²)) = exp(−x²)
    with np.errstate(divide="ignore"):
        density = np.exp(law.logpdf(scale * x) + (x**2).sum(-1)) * scale**3
    assert (w @ density) / 6 == pytest.approx(1, rel=1e-10)  # 3! orders of each


def test_one_value_is_normal_or_chi_square():
    x = np.array([-1.0, 0.3, 2.0])[:, None]
    expected = stats.norm(scale=0.6 * math.sqrt(2)).logpdf(x[:, 0])
    np.testing.assert_allclose(GaussianEnsemble(1, sigma=0.6).logpdf(x), expected, rtol=1e-12)
    law = LaguerreEnsemble((1, 5), sigma=0.5)
    expected = stats.chi2(5, scale=0.25).logpdf(np.array([0.3, 2.0]))
    np.testing.assert_allclose(law.logpdf([[0.3], [2.0]]), expected, rtol=1e-12)
    assert law.logpdf([-1.0]) == -math.inf


def direct(beta, shape, rng, draws):
    """Matrices of noise of real, complex entries, with E|w|² = 1."""
    if beta == 1:
        return rng.standard_normal((draws, *shape))
    parts = rng.standard_normal((2, draws, *shape)) / math.sqrt(2)
    return parts[0] + 1j * parts[1]


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_draws_have_the_law_of_the_matrices_that_the_ensembles_are_of(beta):
    rng = np.random.default_rng(0)
    W = direct(beta, (6, 6), rng, 3000)
    symmetric = (W + W.conj().swapaxes(-1, -2)) / math.sqrt(2)
    found = GaussianEnsemble(6, beta).rvs(3000, generator=rng)
    expected = np.linalg.eigvalsh(symmetric)[:, ::-1]
    for i in (0, 2, 5):
        assert stats.ks_2samp(found[:, i], expected[:, i]).pvalue > 1e-3
    found = LaguerreEnsemble((9, 4), beta).rvs(3000, generator=rng)
    expected = np.linalg.svd(direct(beta, (4, 9), rng, 3000), compute_uv=False) ** 2
    for i in (0, 3):
        assert stats.ks_2samp(found[:, i], expected[:, i]).pvalue > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_draws_follow_the_density(beta):
    """E f(λ) = 1 for f = q/p, q the density of another ensemble: with a wrong norm it is not."""
    for law, other in (
        (GaussianEnsemble(5, beta), GaussianEnsemble(5, beta, 0.93)),
        (LaguerreEnsemble((4, 7), beta, 1.3), LaguerreEnsemble((4, 7), beta, 1.25)),
    ):
        values = law.rvs(20_000, generator=np.random.default_rng(1))
        weights = np.exp(other.logpdf(values) - law.logpdf(values))
        assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(weights))
        # and the score: the mean of ∂ log p/∂λ, times λ, is −p
        x = torch.from_numpy(values[:2000].copy()).requires_grad_()
        law.logpdf(x).sum().backward()
        virial = (x.grad * x).sum(-1).detach().numpy()
        assert abs(virial.mean() + x.shape[-1]) < 4 * virial.std() / math.sqrt(len(virial))


def test_what_is_no_ensemble_is_refused():
    with pytest.raises(InputError, match="expected 3 eigenvalues in the last dimension"):
        GaussianEnsemble(3).logpdf([1.0, 2.0])
    with pytest.raises(InputError, match="expected a generator of NumPy, got Generator"):
        GaussianEnsemble(3).rvs(2, generator=torch.Generator())
    with pytest.raises(InputError, match="expected beta to be positive and finite"):
        LaguerreEnsemble((3, 4), beta=0.0)
    assert GaussianEnsemble(2).logpdf([1.0, 1.0]) == -math.inf
    assert LaguerreEnsemble((3, 4)).rvs((2, 5)).shape == (2, 5, 3)


# ---- spacings


@pytest.mark.parametrize("law", [*map(WignerSurmise, (1, 2, 4)), *map(PorterThomas, (1, 2, 4))],
                         ids=repr)  # fmt: skip
def test_the_laws_of_spacings_and_components_are_laws(law):
    for order, expected in ((0, 1.0), (1, law.mean()), (2, law.var() + law.mean() ** 2)):
        found = integrate.quad(lambda y, k=order: 2 * y * y ** (2 * k) * law.pdf(y * y), 0, 9)[0]
        assert found == pytest.approx(expected, rel=1e-7)
    assert law.mean() == pytest.approx(1, rel=1e-12)
    q = np.array([1e-12, 0.03, 0.5, 0.97])
    np.testing.assert_allclose(law.cdf(law.ppf(q)), q, rtol=1e-9)
    np.testing.assert_allclose(law.sf(law.isf(q)), q, rtol=1e-9)
    assert (law.ppf(0.0), law.isf(0.0), law.pdf(-1.0), law.cdf(-1.0)) == (0.0, math.inf, 0.0, 0.0)


def test_the_laws_are_those_of_textbooks():
    s = np.linspace(0.1, 3, 7)
    printed = {
        1: math.pi / 2 * s * np.exp(-math.pi * s**2 / 4),
        2: 32 / math.pi**2 * s**2 * np.exp(-4 * s**2 / math.pi),
        4: 2**18 / (3**6 * math.pi**3) * s**4 * np.exp(-64 * s**2 / (9 * math.pi)),
    }
    for beta, expected in printed.items():
        np.testing.assert_allclose(WignerSurmise(beta).pdf(s), expected, rtol=1e-12)
        expected = stats.chi2(beta).pdf(beta * s) * beta
        np.testing.assert_allclose(PorterThomas(beta).pdf(s), expected, rtol=1e-12)


def test_the_surmise_is_exact_for_two_values():
    for beta in (1, 2, 4):
        values = GaussianEnsemble(2, beta).rvs(4000, generator=np.random.default_rng(0))
        gaps = values[:, 0] - values[:, 1]
        law = WignerSurmise(beta)
        mean = 2 * special.gamma(beta / 2 + 1) / special.gamma((beta + 1) / 2) * math.sqrt(2 / beta)
        assert stats.kstest(gaps / mean, law.cdf).pvalue > 1e-3


def ratios(values):
    gaps = np.abs(np.diff(values))
    return (np.minimum(gaps[1:], gaps[:-1]) / np.maximum(gaps[1:], gaps[:-1])).mean()


@pytest.mark.parametrize("beta", [0, 1, 2, 4])
def test_the_mean_ratio_and_its_spread_are_those_of_draws(beta):
    rng, size, draws = np.random.default_rng(beta), 60, 700
    if beta:
        found = GaussianEnsemble(size, beta).rvs(draws, generator=rng)
    else:
        found = np.sort(rng.random((draws, size)))
    means = np.array([ratios(values) for values in found])
    assert abs(means.mean() - MEAN_RATIO[beta]) < 4 * means.std() / math.sqrt(draws)
    # the relative error of a variance is √(2/draws)
    spread = (size - 2) * means.var() / RATIO_VARIANCE[beta]
    assert abs(spread - 1) < 4 * math.sqrt(2 / draws) + 0.05


def three_sd(level, draws):
    return 3 * math.sqrt(level * (1 - level) / draws)


@pytest.mark.parametrize("shape", [(14, 14), (60, 200)], ids=str)
def test_noise_repels_as_often_as_it_should(shape):
    rng, draws = np.random.default_rng(3), 800
    found = np.array([spacing_test(noise_values(shape, rng)).p_value for _ in range(draws)])
    for level in (0.01, 0.05, 0.5):
        assert abs((found < level).mean() - level) < three_sd(level, draws)


def test_independent_values_blocks_and_grids_do_not_repel_as_noise():
    rng = np.random.default_rng(0)
    law = SingularValueLaw.of((300, 500))
    cases = {
        "independent": (np.asarray(law.rvs(300, generator=rng)), 0.386),
        "grid": (law.isf((np.arange(300) + 0.5) / 300), 1.0),
        "two blocks": (np.concatenate([noise_values((150, 250), rng) for _ in range(2)]), 0.42),
    }
    for values, ratio in some(cases.values()):
        found = spacing_test(values)
        assert found.p_value < 1e-6
        assert abs(found.ratio - ratio) < 0.06
        assert (found.count, found.expected) == (298, 0.5307)
    assert spacing_test(cases["independent"][0], beta=0).p_value > 0.01
    assert spacing_test(np.ones(20)).p_value < 1e-6  # equal ones have no spacing at all


def test_unfolded_spacings_follow_the_surmise():
    rng = np.random.default_rng(0)
    values = GaussianEnsemble(400).rvs(generator=rng)
    for unfolded in (unfold(values, Semicircle(20.0)), unfold(values)):
        gaps = np.diff(unfolded[20:-20])
        assert gaps.mean() == pytest.approx(1, abs=0.01)
        # neighbours are dependent, which makes the distance smaller than that of independent ones
        assert stats.kstest(gaps, WignerSurmise().cdf).pvalue > 0.01
        assert stats.kstest(gaps, "expon").pvalue < 1e-6
    with pytest.raises(InputError, match="at least 11 finite values"):
        unfold(values[:5])
    with pytest.raises(InputError, match="at least 10 finite values"):
        spacing_test([math.nan] * 12)


# ---- vectors


@pytest.mark.parametrize(("size", "beta"), [(20, 1), (300, 1), (300, 2), (50, 4)])
def test_vectors_of_noise_are_called_noise_as_often_as_they_should(size, beta):
    rng, draws = np.random.default_rng(0), 4000
    x = np.sqrt((rng.standard_normal((beta, size, draws)) ** 2).sum(0))
    found = vector_test(x, beta=beta)
    for level in (0.01, 0.05, 0.5):
        assert abs((found.p_value < level).mean() - level) < three_sd(level, draws)
    assert (1 / found.participation).mean() == pytest.approx(1 / found.expected, rel=0.02)
    assert found.expected == pytest.approx((beta * size + 2) / (beta + 2), rel=1e-12)


def test_vectors_that_lean_on_few_components_or_spread_too_evenly_are_not():
    few, even = np.zeros(200), np.ones(200)
    few[:3] = 1.0
    assert vector_test(few).participation == pytest.approx(3)
    assert vector_test(few).p_value < 1e-9
    assert vector_test(even).p_value < 1e-6
    found = vector_test(torch.eye(200, 2) + 0j)
    assert found.participation.tolist() == [1.0, 1.0]
    assert found.expected == pytest.approx(100.5)
    for vectors, words in (
        (np.ones(19), "at least 20 components"),
        (np.zeros(30), "finite vectors that are not zero"),
    ):
        with pytest.raises(InputError, match=words):
            vector_test(vectors)


def test_components_of_singular_vectors_follow_porter_and_thomas():
    W = np.random.default_rng(0).standard_normal((150, 250))
    U = np.linalg.svd(W)[0]
    assert stats.kstest(150 * U[:, 70] ** 2, PorterThomas().cdf).pvalue > 0.01
