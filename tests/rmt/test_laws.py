from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from bulkedge._errors import InputError
from bulkedge.rmt import (
    MarchenkoPastur,
    QuarterCircle,
    Semicircle,
    SingularValueLaw,
    SpikedSemicircle,
    TracyWidom,
)
from bulkedge.rmt._arc import Arc

LAWS = [
    Semicircle(),
    Semicircle(0.7),
    SpikedSemicircle(0.0),
    SpikedSemicircle(0.5),
    SpikedSemicircle(1.0),
    SpikedSemicircle(2.0, 1.3),
    SpikedSemicircle(-2.0, 0.5),
    MarchenkoPastur(0.25),
    MarchenkoPastur(0.6, 1.7),
    MarchenkoPastur(1.0),
    MarchenkoPastur(4.0, 2.0),
    SingularValueLaw(0.25),
    SingularValueLaw(0.999),
    SingularValueLaw(3.0, 0.5),
    QuarterCircle(2.0),
]
AFFINE = [law for law in LAWS if not isinstance(law, SingularValueLaw)]


def textbook(law, x):
    """The density as papers print it, at the precision of x."""
    two = type(x)(2)
    root, pi = (mp.sqrt, mp.pi) if isinstance(x, mp.mpf) else (math.sqrt, math.pi)
    s = law.sigma
    if isinstance(law, Semicircle):
        return root(4 * s**2 - x**2) / (2 * pi * s**2)
    if isinstance(law, SpikedSemicircle):
        return root(4 * s**2 - x**2) / (2 * pi * (s**2 + law.theta**2 - law.theta * x))
    c = type(x)(law.ratio)
    low, high = s * abs(1 - root(c)), s * (1 + root(c))
    if isinstance(law, MarchenkoPastur):
        return root((high**two - x) * (x - low**two)) / (2 * pi * s**2 * c * x)
    return root((x**2 - low**2) * (high**2 - x**2)) / (pi * s**2 * min(c, 1) * x)


def expectation(law, function):
    """Of a function under the law, by quadrature in an angle that smooths the edges; and atoms."""
    low, high = law.bulk_support()
    mid, half = (high + low) / 2, (high - low) / 2

    def integrand(t):
        # x − low as half·2 sin²(t/2) would be the same but for rounding
        x = mid - half * math.cos(t)
        return function(x) * law.pdf(x) * half * math.sin(t)

    bulk = integrate.quad(integrand, 1e-300, math.pi, epsabs=1e-13, epsrel=1e-12, limit=400)[0]
    return bulk + sum(mass * function(place) for place, mass in law.atoms())


def name(law):
    return repr(law)


# ---- the arc measure


def arc_integral(r, start, stop):
    """``∫ (2/π) sin²φ/(1 + r² − 2r cos φ)`` with more digits than its smallness costs."""
    r, gap = mp.mpf(r), abs(1 - mp.mpf(r))
    scale = stop - start

    def integrand(t):
        sine = mp.sin(start + scale * t)
        return 2 / mp.pi * sine**2 / (gap**2 + 4 * r * mp.sin((start + scale * t) / 2) ** 2)

    cuts = [8**k * gap / scale for k in range(-1, 10)] if start == 0 else []
    points = [0, *(c for c in cuts if 0 < c < 1), 1]
    return scale * mp.quad(integrand, points, method="gauss-legendre")


RADII = [0.0, 1e-8, 1e-3, 0.2, 0.21, 0.5, 0.9, 0.999, 1 - 1e-9, 1.0, 1 + 1e-9, 1.5, 30.0]


@pytest.mark.parametrize("r", RADII)
def test_mass_of_an_arc_is_relatively_accurate_in_both_tails(r):
    arc = Arc.of(r)
    with mp.workdps(40):
        for angle in (1e-12, 1e-9, 3e-9, 1e-6, 1e-3, 0.1, 0.5, 1.0, 1.5, 1.99):
            small, rest = (torch.tensor(a, dtype=torch.float64) for a in (angle, math.pi - angle))
            below = arc_integral(r, mp.mpf(0), mp.mpf(angle))
            assert float(arc.below(small, rest)) == pytest.approx(float(below), rel=1e-13, abs=0)
            above = arc_integral(r, mp.pi - mp.mpf(angle), mp.pi)
            assert float(arc.above(rest, small)) == pytest.approx(float(above), rel=1e-13, abs=0)


@pytest.mark.parametrize("r", [0.0, 0.5, 1 - 1e-9, 1.0, 2.5])
def test_arc_of_negative_r_is_the_mirror_image(r):
    angle = torch.linspace(0.01, 3.1, 50, dtype=torch.float64)
    plus, minus = Arc.of(r), Arc.of(-r)
    mirrored = minus.above(math.pi - angle, angle)
    torch.testing.assert_close(plus.below(angle, math.pi - angle), mirrored, rtol=1e-14, atol=0)
    total = plus.below(angle, math.pi - angle) + plus.above(angle, math.pi - angle)
    torch.testing.assert_close(total, torch.full_like(angle, min(1, 1 / r**2 if r else 1)))
    assert minus.mass == plus.mass


@pytest.mark.parametrize("r", [*RADII, -0.3, -1.0, -4.0])
def test_angles_of_masses_down_to_1e_300(r):
    arc = Arc.of(r)
    mass = torch.logspace(-300, math.log10(0.5), 150, dtype=torch.float64) * arc.mass
    below, above = arc.angle_below(mass), arc.angle_above(mass)
    torch.testing.assert_close(arc.below(below, math.pi - below), mass, rtol=1e-13, atol=0)
    torch.testing.assert_close(arc.above(math.pi - above, above), mass, rtol=1e-13, atol=0)


# ---- every law


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_density_is_the_printed_one(law):
    low, high = law.bulk_support()
    x = np.linspace(low, high, 42)[1:-1]
    np.testing.assert_allclose(law.pdf(x), [textbook(law, float(v)) for v in x], rtol=1e-12)
    assert np.all(law.pdf([low - 0.1, high + 0.1, -math.inf, math.inf]) == 0)


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_mass_mean_and_variance_by_quadrature(law):
    assert expectation(law, lambda x: 1.0) == pytest.approx(1, abs=1e-12)
    mean = law.mean()
    assert expectation(law, lambda x: x) == pytest.approx(mean, abs=1e-12)
    assert expectation(law, lambda x: (x - mean) ** 2) == pytest.approx(law.var(), abs=1e-12)
    assert law.std() == pytest.approx(law.var() ** 0.5)


@pytest.mark.parametrize("ratio", [1e-12, 1e-3, 0.2499999, 0.2500001, 0.9, 1 - 1e-9, 1.0, 7.0])
def test_moments_of_singular_values_by_30_digits(ratio):
    with mp.workdps(30):
        c = min(mp.mpf(ratio), 1 / mp.mpf(ratio))
        square = max(1, mp.mpf(ratio))
        mean = mp.hyp2f1(0.5, -0.5, 2, c) * mp.sqrt(square)
        var = square - mean**2
    assert SingularValueLaw(ratio).mean() == pytest.approx(float(mean), rel=1e-14)
    assert SingularValueLaw(ratio).var() == pytest.approx(float(var), rel=1e-13, abs=0)


@pytest.mark.parametrize(
    "law",
    [
        Semicircle(),
        SpikedSemicircle(0.5),
        SpikedSemicircle(-4.0),
        MarchenkoPastur(0.25),
        MarchenkoPastur(4.0),
        MarchenkoPastur(1.0),
        SingularValueLaw(0.25),
        SingularValueLaw(4.0),
        QuarterCircle(),
    ],
    ids=name,
)
@pytest.mark.parametrize("share", [1e-9, 1e-4, 0.2, 0.5])
def test_tails_against_30_digits(law, share):
    low, high = law.bulk_support()
    below = sum(mass for place, mass in law.atoms() if place <= low)
    above = sum(mass for place, mass in law.atoms() if place >= high)
    with mp.workdps(30):
        left, right = low + share * (high - low), high - share * (high - low)
        # x = end ± (distance) t²: smooth at the edge, and at 0 for a hard one
        near, far = mp.mpf(left) - mp.mpf(low), mp.mpf(high) - mp.mpf(right)
        lower = mp.quad(lambda t: textbook(law, low + near * t * t) * 2 * near * t, [0, 1])
        upper = mp.quad(lambda t: textbook(law, high - far * t * t) * 2 * far * t, [0, 1])
    assert law.cdf(left) == pytest.approx(float(lower) + below, rel=1e-12, abs=0)
    assert law.sf(right) == pytest.approx(float(upper) + above, rel=1e-12, abs=0)


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_cdf_and_sf_complement_and_jump_at_atoms(law):
    low, high = law.support()
    x = np.linspace(low - 0.5, high + 0.5, 201)
    np.testing.assert_allclose(law.cdf(x) + law.sf(x), 1, atol=4e-15)
    assert np.all(np.diff(law.cdf(x)) >= 0)
    assert law.cdf(-math.inf) == law.sf(math.inf) == 0
    assert law.cdf(math.inf) == pytest.approx(1, abs=1e-15)
    for place, mass in law.atoms():
        before = law.cdf(np.nextafter(place, -math.inf))
        assert law.cdf(place) - before == pytest.approx(mass, abs=1e-7)


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_quantiles_invert(law):
    q = np.linspace(0, 1, 101)[1:-1]
    under = sum(mass for place, mass in law.atoms() if place <= law.bulk_support()[0])
    inside = (q > under) & (q < under + 1 - sum(mass for _, mass in law.atoms()))
    for quantile, probability in ((law.ppf, law.cdf), (law.isf, law.sf)):
        p = q if quantile == law.ppf else 1 - q
        x = quantile(p)[inside]
        # no more can be asked than the rounding of x leaves
        slack = 3e-13 * p[inside] + law.pdf(x) * np.abs(x) * 2.3e-16
        assert np.all(np.abs(probability(x) - p[inside]) <= slack)
        places = [place for place, _ in law.atoms()]
        assert np.isin(quantile(p)[~inside], places).all()
    np.testing.assert_allclose(law.isf(1 - q)[inside], law.ppf(q)[inside], rtol=1e-12, atol=1e-13)
    assert law.ppf([0, 1]).tolist() == law.isf([1, 0]).tolist() == list(law.support())
    assert law.median() == law.ppf(0.5)


def test_quantiles_far_in_a_tail_keep_their_digits():
    law = QuarterCircle()
    # the density at 0 is 2/π
    assert law.ppf(1e-200) == pytest.approx(math.pi / 2 * 1e-200, rel=1e-14, abs=0)
    assert law.cdf(math.pi / 2 * 1e-200) == pytest.approx(1e-200, rel=1e-14, abs=0)
    # near an edge, sf ≈ (2/3π) (2 − x)^(3/2)
    assert 2 - Semicircle().isf(1e-12) == pytest.approx((1.5e-12 * math.pi) ** (2 / 3), rel=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=name)
def test_edges_give_no_nan(law):
    low, high = law.bulk_support()
    at = np.array([low, np.nextafter(low, high), np.nextafter(high, low), high])
    for function in (law.pdf, law.cdf, law.sf):
        assert not np.isnan(function(at)).any()
        assert math.isnan(function(math.nan))


def test_densities_at_hard_edges():
    assert MarchenkoPastur(1.0).pdf(0.0) == math.inf
    assert SpikedSemicircle(1.0).pdf(2.0) == math.inf
    assert QuarterCircle(2.0).pdf(0.0) == pytest.approx(1 / math.pi)
    assert SingularValueLaw(1.0).pdf(0.0) == pytest.approx(2 / math.pi)
    assert MarchenkoPastur(4.0).pdf([0.0, 1.0, 9.0]).tolist() == [0, 0, 0]


def test_special_cases_coincide():
    x = np.linspace(-2, 2, 33)
    np.testing.assert_allclose(SpikedSemicircle(0.0).cdf(x), Semicircle().cdf(x), rtol=1e-14)
    assert SpikedSemicircle(0.0).atoms() == SpikedSemicircle(1.0).atoms() == ()
    s = np.linspace(0.01, 2.9, 33)
    np.testing.assert_allclose(
        SingularValueLaw(0.6, 1.7).cdf(s), MarchenkoPastur(0.6, 1.7).cdf(s**2), atol=1e-14
    )
    assert QuarterCircle(3.0).mean() == pytest.approx(8 / math.pi)
    assert isinstance(QuarterCircle.of((3, 2)), SingularValueLaw)
    assert repr(QuarterCircle(2.0)) == "QuarterCircle(sigma=2.0)"


@pytest.mark.parametrize("shape", [(300, 600), (17, 17), (1, 1000), (999, 1000)])
def test_the_law_of_a_shape_is_that_of_its_transpose(shape):
    law, other = SingularValueLaw.of(shape, 0.3), SingularValueLaw.of(shape[::-1], 0.3)
    np.testing.assert_allclose(law.support(), other.support(), rtol=1e-13)
    np.testing.assert_allclose(law.ppf([0.1, 0.5, 0.9]), other.ppf([0.1, 0.5, 0.9]), rtol=1e-13)
    assert law.mean() == pytest.approx(other.mean(), rel=1e-14)
    m, n = shape
    expected = 0.3 * abs(math.sqrt(m) - math.sqrt(n)), 0.3 * (math.sqrt(m) + math.sqrt(n))
    np.testing.assert_allclose(law.support(), expected, rtol=1e-12)


# ---- the Stieltjes transform


@pytest.mark.parametrize("law", AFFINE, ids=name)
def test_stieltjes_is_the_integral_and_inverts(law):
    low, high = law.support()
    for z in (high + 0.3, low - 0.2, 1e8, -1e8, 40.0):
        exact = expectation(law, lambda x, z=z: 1 / (z - x))
        assert law.stieltjes(z) == pytest.approx(exact, rel=1e-11)
        assert law.inverse_stieltjes(law.stieltjes(z)) == pytest.approx(z, rel=1e-12)
    for z in (1 + 0.3j, -0.5 - 0.2j, 1e5j):
        real = expectation(law, lambda x, z=z: (1 / (z - x)).real)
        imaginary = expectation(law, lambda x, z=z: (1 / (z - x)).imag)
        assert law.stieltjes(z) == pytest.approx(complex(real, imaginary), rel=1e-10, abs=1e-12)
        assert law.inverse_stieltjes(law.stieltjes(z)) == pytest.approx(z, rel=1e-11)


@pytest.mark.parametrize("law", AFFINE, ids=name)
def test_stieltjes_just_above_the_axis_holds_the_density(law):
    low, high = law.bulk_support()
    x = np.linspace(low, high, 20)[1:-1]
    np.testing.assert_allclose(-law.stieltjes(x + 1e-12j).imag / math.pi, law.pdf(x), rtol=1e-9)


def test_stieltjes_between_a_bulk_and_its_atom():
    law = SpikedSemicircle(2.0)
    assert law.stieltjes([2.2, 2.8]).tolist()[0] < 0 < law.stieltjes(2.8)
    np.testing.assert_allclose(law.inverse_stieltjes(law.stieltjes([2.2, 2.8])), [2.2, 2.8])
    law = MarchenkoPastur(4.0)
    np.testing.assert_allclose(law.inverse_stieltjes(law.stieltjes([0.5, 0.01])), [0.5, 0.01])


def test_printed_transforms():
    z, c, s = 5.0, 0.3, 1.4
    semicircle = (z - math.sqrt(z * z - 4 * s**2)) / (2 * s**2)
    assert Semicircle(s).stieltjes(z) == pytest.approx(semicircle, rel=1e-13)
    assert Semicircle(s).inverse_stieltjes(0.4) == pytest.approx(1 / 0.4 + s**2 * 0.4)
    m = (z + c - 1 - math.sqrt((z - 1 - c) ** 2 - 4 * c)) / (2 * c * z)
    assert MarchenkoPastur(c).stieltjes(z) == pytest.approx(m, rel=1e-13)
    z = (1 + (1 - c) * m) / (m * (1 - c * m))
    assert MarchenkoPastur(c).inverse_stieltjes(m) == pytest.approx(z, rel=1e-13)
    # the edge itself is taken
    assert Semicircle().stieltjes([-2.0, 2.0]).tolist() == [-1, 1]
    assert Semicircle().inverse_stieltjes([-1.0, 1.0]).tolist() == [-2, 2]


# ---- what goes in and out


@pytest.mark.parametrize("law", [*LAWS, TracyWidom()], ids=name)
def test_numpy_and_torch_agree_in_numbers_and_kinds(law):
    x = np.linspace(-1, 2.5, 12).reshape(3, 4)
    for function in (law.pdf, law.cdf, law.sf):
        array, tensor = function(x), function(torch.from_numpy(x))
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float64
        assert tensor.dtype == torch.float64
        assert np.array_equal(array, tensor.numpy())
        assert isinstance(function(0.5), float)
        assert isinstance(function(np.float32(0.5)), float)
        assert function([0.5, 1]) == pytest.approx([function(0.5), function(1.0)], rel=1e-14)
        assert function(torch.tensor(1)).dtype == torch.float64
        single = function(torch.from_numpy(x).float())
        assert single.dtype == torch.float32
        assert np.array_equal(single.numpy(), function(x.astype(np.float32)).astype(np.float32))
        assert np.array_equal(array, function(x.tolist()))
    q = torch.tensor([0.2, 0.7])
    assert law.ppf(q).dtype == law.isf(q).dtype == torch.float32
    assert law.cdf(torch.zeros(0)).shape == law.ppf(torch.zeros(0)).shape == (0,)


def test_complex_goes_in_and_out():
    law = MarchenkoPastur(0.5)
    z = np.array([1 + 1j, 5.0])
    assert law.stieltjes(z).dtype == np.complex128
    assert isinstance(law.stieltjes(1j), complex)
    assert isinstance(law.stieltjes(5), float)
    assert law.stieltjes(torch.tensor(z, dtype=torch.complex64)).dtype == torch.complex64
    assert law.stieltjes(torch.tensor(5.0)).dtype == torch.float32
    assert law.inverse_stieltjes(law.stieltjes(z)).dtype == np.complex128


@pytest.mark.parametrize("law", [*LAWS, TracyWidom(), TracyWidom(4)], ids=name)
def test_gradients_of_cdf_and_sf_are_the_density(law):
    low, high = law.bulk_support() if math.isfinite(law.bulk_support()[0]) else (-20.0, 8.0)
    x = torch.linspace(low - 0.51, high + 0.52, 301, dtype=torch.float64, requires_grad=True)
    density = law.pdf(x)
    for function, sign in ((law.cdf, 1), (law.sf, -1)):
        (slope,) = torch.autograd.grad(function(x).sum(), x)
        torch.testing.assert_close(sign * slope, density.detach(), rtol=1e-9, atol=1e-13)
    (slope,) = torch.autograd.grad(density.sum(), x)
    assert slope.isfinite().all()
    inside = torch.linspace(low + 0.3, low + 0.6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(law.pdf, inside)


def test_functional_transforms():
    x = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    law = SingularValueLaw(0.5)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(law.cdf))(x), law.pdf(x))


@pytest.mark.parametrize("law", [*LAWS, TracyWidom(2)], ids=name)
def test_draws_follow_the_law(law):
    draws = law.rvs(4000, generator=np.random.default_rng(0))
    places = np.array([place for place, _ in law.atoms()])
    bulk = np.sort(draws[~np.isin(draws, places)])
    under = sum(mass for place, mass in law.atoms() if place < bulk[0])
    share = len(bulk) / len(draws)
    expected = (law.cdf(bulk) - under) / (1 - sum(mass for _, mass in law.atoms()))
    # P(KS > 1.95/√n) = 0.001
    assert (
        np.abs(expected - (np.arange(len(bulk)) + 0.5) / len(bulk)).max() < 1.95 / len(bulk) ** 0.5
    )
    assert share == pytest.approx(1 - sum(mass for _, mass in law.atoms()), abs=0.03)


def test_draws_are_of_the_kind_of_their_generator():
    law = MarchenkoPastur(0.5)
    first = law.rvs((2, 3), generator=torch.Generator().manual_seed(1))
    assert first.dtype == torch.float64
    assert first.shape == (2, 3)
    assert torch.equal(first, law.rvs((2, 3), generator=torch.Generator().manual_seed(1)))
    assert isinstance(law.rvs(3), np.ndarray)
    assert isinstance(law.rvs(), float)
    assert not np.array_equal(law.rvs(3), law.rvs(3))


# ---- noise


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(400, 400), (300, 600), (600, 300)])
def test_singular_values_of_noise(shape, seed):
    W = np.random.default_rng(seed).standard_normal(shape) * 0.7
    m, n = shape
    values = np.sort(np.linalg.svd(W, compute_uv=False))
    steps = np.arange(1, len(values) + 1) / len(values)
    # values repel each other: they stay within five places, where independent draws stray by 20
    assert np.abs(SingularValueLaw.of(shape, 0.7).cdf(values) - steps).max() < 5 / min(shape)
    eigenvalues = np.sort(np.linalg.eigvalsh(W @ W.T / n))[max(0, m - n) :]
    law = MarchenkoPastur(m / n, 0.7)
    steps = (max(0, m - n) + np.arange(1, len(eigenvalues) + 1)) / m
    assert np.abs(law.cdf(eigenvalues) - steps).max() < 5 / m
    assert law.cdf(1e-9) == pytest.approx(max(0, 1 - n / m), abs=0.02 * (m == n) + 1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eigenvalues_of_symmetric_noise_and_what_a_spike_sees(seed):
    n = 400
    W = np.random.default_rng(seed).standard_normal((n, n))
    W = (W + W.T) / math.sqrt(2 * n)
    values = np.linalg.eigvalsh(W)
    assert np.abs(Semicircle().cdf(values) - np.arange(1, n + 1) / n).max() < 0.01
    for theta in (0.5, -2.0):
        spiked = W.copy()
        spiked[0, 0] += theta
        values, vectors = np.linalg.eigh(spiked)
        law = SpikedSemicircle(theta)
        (x,) = (np.linspace(-1.8, 1.8, 30),)
        weight = np.array([(vectors[0, values <= v] ** 2).sum() for v in x])
        # n weights of relative size √2 each: 0.07 at n = 400 is three standard deviations
        assert np.abs(law.cdf(x) - weight).max() < 0.1


# ---- properties


@settings(max_examples=60)
@given(
    st.floats(1e-6, 1e6),
    st.floats(1e-3, 1e3),
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
)
def test_cdf_is_monotone_and_between_0_and_1(ratio, sigma, shares):
    for law in (MarchenkoPastur(ratio, sigma), SingularValueLaw(ratio, sigma)):
        low, high = law.support()
        x = np.sort([low + (high - low) * share for share in shares])
        cdf, sf = law.cdf(x), law.sf(x)
        assert np.all(np.diff(cdf) >= -4e-16)
        assert np.all(np.diff(sf) <= 4e-16)
        assert np.all((cdf >= 0) & (cdf <= 1 + 1e-15) & (sf >= 0) & (sf <= 1 + 1e-15))
        q = law.ppf(np.sort(shares))
        assert np.all(np.diff(q) >= -1e-15 * high)
        assert np.all((q >= low) & (q <= high))


@settings(max_examples=60)
@given(st.floats(-50, 50), st.floats(0.01, 10), st.floats(1e-6, 1e3), st.floats(0, math.pi))
def test_stieltjes_round_trip_of_spikes(theta, sigma, distance, angle):
    law = SpikedSemicircle(theta, sigma)
    z = complex(3 * sigma * math.cos(angle), distance + 0.1 * sigma)
    w = law.stieltjes(z)
    assert w.imag < 0
    assert law.inverse_stieltjes(w) == pytest.approx(z, rel=1e-9)


# ---- errors


def test_parameters_are_checked():
    for bad in (0.0, -1.0, math.inf, math.nan, "1"):
        with pytest.raises(InputError, match=r"expected sigma to be positive and finite, got "):
            Semicircle(bad)
        with pytest.raises(InputError, match=r"expected sigma to be positive and finite, got "):
            SingularValueLaw.of((3, 4), bad)
        for law in (MarchenkoPastur, SingularValueLaw):
            with pytest.raises(InputError, match=r"expected ratio to be positive and finite, got "):
                law(bad)
            with pytest.raises(InputError, match=r"expected sigma to be positive and finite, got "):
                law(1.0, bad)
        with pytest.raises(InputError, match=r"expected sigma to be positive and finite, got "):
            SpikedSemicircle(1.0, bad)
    for bad in (math.inf, math.nan, "1"):
        with pytest.raises(InputError, match=r"expected theta to be finite, got "):
            SpikedSemicircle(bad)
    for shape in ((3,), (0, 3), (1, 2, 3)):
        with pytest.raises(InputError, match=r"expected a shape \(m, n\) of a matrix, got \("):
            SingularValueLaw.of(shape)


@pytest.mark.parametrize("number", [np.float32, np.array, torch.tensor, lambda x: np.float64(x)])
def test_parameters_are_numbers_of_any_kind(number):
    half = number(0.5)
    for law, same in (
        (Semicircle(half), Semicircle(0.5)),
        (SpikedSemicircle(half, half), SpikedSemicircle(0.5, 0.5)),
        (MarchenkoPastur(half, half), MarchenkoPastur(0.5, 0.5)),
        (SingularValueLaw.of((3, 4), half), SingularValueLaw.of((3, 4), 0.5)),
        (QuarterCircle(half), QuarterCircle(0.5)),
        (TracyWidom(number(2.0)), TracyWidom(2)),
        (MarchenkoPastur(np.int64(2)), MarchenkoPastur(2.0)),
    ):
        assert law == same
        assert hash(law) == hash(same)
        assert type(law.mean()) is float
        np.testing.assert_array_equal(law.cdf([0.1, 0.5]), same.cdf([0.1, 0.5]))


def test_the_size_of_a_sample_is_a_whole_number_of_any_kind():
    law, rng = Semicircle(), np.random.default_rng(0)
    for size in (3, np.int64(3), torch.tensor(3), (3,), [3], torch.Size([3])):
        assert law.rvs(size, generator=rng).shape == (3,)
    assert law.rvs((np.int32(2), 3), generator=rng).shape == (2, 3)
    assert isinstance(law.rvs(generator=rng), float)
    for size in (2.0, "3", -1, (2, 1.5), None):
        with pytest.raises(InputError, match=r"expected sizes ≥ 0, got .*; give a whole number"):
            law.rvs(size, generator=rng)


def test_what_has_no_meaning_off_the_real_line_says_so():
    for law in (Semicircle(), SingularValueLaw(0.5), TracyWidom()):
        for ask in (law.pdf, law.cdf, law.sf, law.ppf, law.isf):
            for wrong in (1j, np.array([0.5 + 0j]), torch.tensor([0.5j])):
                with pytest.raises(InputError, match=r"expected real numbers, got complex ones"):
                    ask(wrong)
    with pytest.raises(InputError, match=r"expected real numbers, got complex ones"):
        TracyWidom().logcdf(1j)
    assert Semicircle().stieltjes(3j) == pytest.approx(1 / (1.5j + 1j * math.sqrt(13) / 2))


def test_text_and_dates_are_no_numbers():
    for wrong in ("0.5", ["0.5"], np.array(["2020-01-01"], dtype="datetime64[D]"), 10**400):
        with pytest.raises(InputError, match=r"expected numbers, got "):
            Semicircle().cdf(wrong)


def test_arguments_are_checked():
    law = MarchenkoPastur(0.5)
    for bad in (-0.1, 1.1, math.nan, [0.5, 2]):
        for quantile in (law.ppf, law.isf):
            with pytest.raises(InputError, match=r"expected probabilities in \[0, 1\], got one"):
                quantile(bad)
    with pytest.raises(InputError, match=r"expected z outside the bulk \(0\.0857864, 2\.91421\), "):
        law.stieltjes([5.0, 1.0])
    for bad in (0.0, 5.0, -100.0):
        with pytest.raises(InputError, match=r"expected values that the transform takes outside"):
            law.inverse_stieltjes(bad)
    with pytest.raises(InputError, match=r"expected a generator of NumPy or torch, got int; pass "):
        law.rvs(3, generator=0)
    with pytest.raises(InputError, match=r"expected numbers, got str: "):
        law.cdf("many")
