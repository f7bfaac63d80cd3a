from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy.sparse.linalg import svds

from bulkedge._errors import InputError
from bulkedge.rmt import (
    EmpiricalBulk,
    SingularValueLaw,
    WhiteBulk,
    count_outliers,
    d_transform,
    fit_edge,
)
from bulkedge.rmt.bulk import Bulk
from bulkedge.rmt.empirical_bulk import _average_hard, _average_soft
from helpers import some
from noise import diagonal, noise_values, outlier, unit

SHAPES = [(40, 160), (160, 40), (100, 100)]


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def quantiles(shape):
    """A sample of the white bulk without noise."""
    p = min(shape)
    return SingularValueLaw.of(shape).isf((np.arange(p) + 0.5) / p)


def uniform(size):
    return (np.arange(size)[::-1] + 0.5) / size


# ---- the white bulk


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_white_closed_forms_agree_with_the_way_through_the_d_transform(shape):
    bulk = WhiteBulk(shape, sigma=0.3)
    theta = double([1.01, 1.2, 2.0, 5.0, 50.0]) * bulk.threshold
    closed, general = bulk._outlier(theta), Bulk._outlier(bulk, theta)
    torch.testing.assert_close(Bulk._locate(bulk, theta), closed.location, rtol=1e-14, atol=0)
    for one, other in some(zip(closed, general, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=0)
    assert Bulk.threshold.fget(bulk) == pytest.approx(bulk.threshold, rel=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_white_traces_are_integrals_over_the_marchenko_pastur_law(shape):
    (m, n), tau, p = shape, 0.7, min(shape)
    low, high = tau * abs(math.sqrt(m) - math.sqrt(n)), tau * (math.sqrt(m) + math.sqrt(n))

    def mean(function):
        def integrand(s):
            density = math.sqrt(max((s * s - low * low) * (high * high - s * s), 0))
            return function(s) * density / (math.pi * tau**2 * p * s)

        return integrate.quad(integrand, low, high, epsabs=1e-13, limit=300)[0]

    assert mean(lambda s: 1.0) == pytest.approx(1, rel=1e-7)
    for z in (1.02 * high, 1.5 * high, 4 * high):
        total = p * mean(lambda s, z=z: z / (z * z - s * s))
        slope = -p * mean(lambda s, z=z: (z * z + s * s) / (z * z - s * s) ** 2)
        expected = [
            (total + (m - p) / z) / m,
            (total + (n - p) / z) / n,
            (slope - (m - p) / z**2) / m,
            (slope - (n - p) / z**2) / n,
        ]
        found = [float(x) for x in WhiteBulk(shape, tau).traces(double(z))]
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "ratio"), [((100, 400), 2.0), ((400, 100), 1.5), ((200, 200), 2.0)], ids=str
)
def test_white_spikes_lie_where_simulation_puts_them(shape, ratio, seed):
    rng = np.random.default_rng(seed)
    expected = WhiteBulk(shape).spike(ratio * WhiteBulk(shape).threshold)
    draws = np.array([outlier(rng.standard_normal(shape), expected.theta, rng) for _ in range(60)])
    location, left, right = draws.mean(0)
    assert abs(location - expected.location) < 3 * expected.sd / math.sqrt(60)
    assert draws[:, 0].std(ddof=1) == pytest.approx(expected.sd, rel=0.25)
    # fluctuations of an overlap are O(1/√N), its bias O(1/N)
    assert left == pytest.approx(expected.left_overlap, abs=0.025)
    assert right == pytest.approx(expected.right_overlap, abs=0.025)


def test_a_wide_matrix_of_full_size():
    shape, rng = (400, 1600), np.random.default_rng(0)
    expected = WhiteBulk(shape).spike(2 * WhiteBulk(shape).threshold)
    draws = []
    for _ in range(30):
        u, v = unit(400, rng), unit(1600, rng)
        W = rng.standard_normal(shape) + expected.theta * np.outer(u, v)
        U, S, Vh = svds(W, k=1, random_state=rng)
        draws.append((S[0], (u @ U[:, 0]) ** 2, (Vh[0] @ v) ** 2))
    location, left, right = np.mean(draws, axis=0)
    assert abs(location - expected.location) < 3 * expected.sd / math.sqrt(30)
    assert left == pytest.approx(expected.left_overlap, abs=0.01)
    assert right == pytest.approx(expected.right_overlap, abs=0.01)


def test_below_the_threshold_nothing_separates():
    bulk, rng = WhiteBulk((300, 300)), np.random.default_rng(0)
    spike = bulk.spike([0.0, 0.7 * bulk.threshold, bulk.threshold])
    assert spike.supercritical.tolist() == [False] * 3
    assert spike.location.tolist() == [bulk.edge] * 3
    assert spike.left_overlap.tolist() == spike.right_overlap.tolist() == [0.0] * 3
    assert np.isnan(spike.sd).all()
    draws = []
    for _ in range(10):
        u, v = unit(300, rng), unit(300, rng)
        W = rng.standard_normal((300, 300)) + 0.7 * bulk.threshold * np.outer(u, v)
        U, S, _ = np.linalg.svd(W)
        draws.append((S[0], (u @ U[:, 0]) ** 2))
    value, overlap = np.mean(draws, axis=0)
    assert value == pytest.approx(bulk.edge, rel=0.015)
    assert overlap < 0.05


@pytest.mark.parametrize("make", [WhiteBulk, lambda shape: EmpiricalBulk(quantiles(shape), shape)])
def test_transposition_swaps_left_and_right(make):
    one, other = make((60, 90)), make((90, 60))
    theta = one.threshold * np.array([1.2, 2.0, 9.0])
    a, b = one.spike(theta), other.spike(theta)
    np.testing.assert_allclose(a.location, b.location, rtol=1e-13)
    np.testing.assert_allclose(a.left_overlap, b.right_overlap, rtol=1e-11)
    np.testing.assert_allclose(a.right_overlap, b.left_overlap, rtol=1e-11)
    np.testing.assert_allclose(a.sd, b.sd, rtol=1e-11)
    assert (a.left_overlap > a.right_overlap).all()  # the longer side has the smaller overlap


BULKS = st.sampled_from(
    [
        WhiteBulk((40, 90)),
        WhiteBulk((90, 40), 0.02),
        WhiteBulk((50, 50), 7.0),
        EmpiricalBulk(quantiles((60, 90)), (60, 90)),
        EmpiricalBulk(uniform(80), (80, 120)),
    ]
)


@given(BULKS, st.floats(1.05, 1e4))
@settings(max_examples=25)
def test_the_maps_invert_each_other(bulk, ratio):
    theta = ratio * (bulk.threshold or 0.3 * bulk.edge)
    location = bulk.spike(theta).location
    assert bulk.strength(location) == pytest.approx(theta, rel=1e-9)
    assert bulk.inverse_d(bulk.d_transform(location)) == pytest.approx(location, rel=1e-11)
    assert bulk.inverse_d(theta**-2) == pytest.approx(location, rel=1e-11)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(1e-6, 1e6), st.floats(0.1, 50))
@settings(max_examples=60)
def test_white_spikes_scale(m, n, scale, ratio):
    theta = ratio * WhiteBulk((m, n)).threshold
    one, other = WhiteBulk((m, n)).spike(theta), WhiteBulk((m, n), scale).spike(scale * theta)
    assert other.location == pytest.approx(scale * one.location, rel=1e-12)
    assert other.threshold == pytest.approx(scale * one.threshold, rel=1e-12)
    if abs(ratio - 1) > 1e-9:
        assert other.supercritical == one.supercritical
        assert other.left_overlap == pytest.approx(one.left_overlap, rel=1e-6)
        assert other.sd == pytest.approx(scale * one.sd, rel=1e-6, nan_ok=True)


def test_what_goes_in_comes_out_in_kind():
    bulk = WhiteBulk((30, 40))
    for x in (torch.full((2, 1), 20.0), torch.full((2, 1), 20.0, dtype=torch.float64)):
        for y in (bulk.spike(x).location, bulk.strength(x), bulk.d_transform(x)):
            assert isinstance(y, torch.Tensor)
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert bulk.spike(x).supercritical.dtype == torch.bool
    assert isinstance(bulk.spike(20.0).location, float)
    assert bulk.spike(20.0).supercritical is True
    assert bulk.spike([[20.0, 1.0]]).sd.shape == (1, 2)
    assert bulk.d_transform(np.array([20.0])).dtype == np.float64
    assert bulk.spike(torch.tensor([20])).location.dtype == torch.float64
    assert bulk.inverse_d([]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [WhiteBulk, lambda shape: EmpiricalBulk(quantiles(shape), shape)])
def test_a_rounded_edge_is_still_no_point_inside(make, dtype):
    for shape in ((30, 40), (33, 70), (50, 50), (17, 90)):
        bulk = make(shape)
        theta = torch.tensor([0.0, 0.5, 1.0 + 1e-6, 3.0], dtype=dtype) * bulk.threshold
        location = bulk.spike(theta).location
        back = bulk.strength(location)
        assert (back.dtype, bool(back.isfinite().all())) == (dtype, True)
        assert float(back[-1]) == pytest.approx(float(theta[-1]), rel=8 * torch.finfo(dtype).eps)
        assert bulk.d_transform(location).isfinite().all()
        assert bulk.inverse_d(bulk.d_transform(location)).isfinite().all()
        # on either side of the edge, by less than the rounding
        nearly = torch.tensor(bulk.edge * (1 - torch.finfo(dtype).eps / 2), dtype=dtype)
        assert float(bulk.strength(nearly)) == pytest.approx(bulk.threshold, rel=0.15)
        with pytest.raises(InputError, match=r"expected points beyond the bulk edge"):
            bulk.strength(torch.tensor(0.9 * bulk.edge, dtype=dtype))
    single = np.array([bulk.edge], dtype=np.float32) * np.float32(1 - 1e-7)
    assert bulk.strength(single) == pytest.approx(bulk.threshold)
    with pytest.raises(InputError, match=r"expected points beyond the bulk edge"):
        bulk.strength(single.astype(np.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sigma", [1e-100, 1e-160, 1e77, 1e150])
def test_white_spikes_of_extreme_noise(shape, sigma):
    ratios = np.array([0.5, 1.0001, 1.5, 20.0])
    one, other = WhiteBulk(shape), WhiteBulk(shape, sigma)
    a, b = one.spike(ratios * one.threshold), other.spike(ratios * other.threshold)
    assert b.supercritical.tolist() == a.supercritical.tolist() == [False, True, True, True]
    np.testing.assert_allclose(b.location / sigma, a.location, rtol=1e-12)
    np.testing.assert_allclose(b.left_overlap, a.left_overlap, rtol=1e-8)
    np.testing.assert_allclose(b.right_overlap, a.right_overlap, rtol=1e-8)
    np.testing.assert_allclose(b.sd / sigma, a.sd, rtol=1e-8)
    np.testing.assert_allclose(other.strength(b.location[1:]), b.theta[1:], rtol=1e-7)


@pytest.mark.parametrize("make", [WhiteBulk, lambda shape: EmpiricalBulk(quantiles(shape), shape)])
def test_a_huge_spike_is_its_outlier(make):
    bulk = make((60, 90))
    theta = np.array([1e40, 1e80, 1e200, 1e300])
    found = bulk.spike(theta)
    assert found.supercritical.all()
    np.testing.assert_allclose(found.location, theta, rtol=1e-15)
    np.testing.assert_allclose(found.left_overlap, 1, rtol=1e-12)
    np.testing.assert_allclose(found.right_overlap, 1, rtol=1e-12)
    np.testing.assert_allclose(found.sd, found.sd[0], rtol=1e-12)
    gradient = double(theta[:2]).requires_grad_()
    bulk.spike(gradient).location.sum().backward()
    np.testing.assert_allclose(gradient.grad, 1)


def test_just_above_the_threshold_white_spikes_keep_their_digits():
    bulk, excess = WhiteBulk((100, 400)), 1e-6
    found = bulk.spike(bulk.threshold * (1 + excess))
    c = 0.5  # √(m/n); (θ⁴ − θ_c⁴)/(θ²(θ² + τ²m)) to first order, and so on
    assert found.left_overlap == pytest.approx(4 * excess / (1 + c), rel=1e-5)
    assert found.right_overlap == pytest.approx(4 * excess / (1 + 1 / c), rel=1e-5)
    beyond = (2 * excess * bulk.threshold) ** 2 / (2 * bulk.edge)
    assert found.location - bulk.edge == pytest.approx(beyond, rel=0.02)


@pytest.mark.parametrize(
    "bulk",
    [
        WhiteBulk((40, 90)),
        EmpiricalBulk(quantiles((60, 90)), (60, 90)),
        EmpiricalBulk(uniform(80), (80, 120)),
    ],
    ids=["white", "soft", "hard"],
)
def test_there_is_one_answer_to_whether_a_spike_separates(bulk):
    unit = bulk.threshold or bulk.edge
    start = 1 if bulk.threshold else 0
    theta = unit * (start + np.array([0.0, *np.logspace(-12, 0.5, 60)]))
    found = bulk.spike(theta)
    np.testing.assert_array_equal(found.supercritical, bulk.supercritical(theta))
    assert (np.diff(found.supercritical.astype(int)) >= 0).all()
    # no outlier at the edge, no edge given for an outlier, no spread without one
    np.testing.assert_array_equal(found.supercritical, found.location > bulk.edge)
    np.testing.assert_array_equal(found.supercritical, np.isfinite(found.sd))
    np.testing.assert_array_equal(found.supercritical, found.left_overlap > 0)
    first = theta[found.supercritical.argmax()]
    assert first < unit * (1 + 1e-7) if bulk.threshold else 0.05 * unit < first < 0.15 * unit
    assert bulk.supercritical(0.0) is False


def test_bad_input_of_a_bulk():
    for shape in [(0, 3), (3,), 5, (2.5, 4), (math.nan, 3), (math.inf, 3), "ab"]:
        with pytest.raises(InputError, match=r"expected a shape \(m, n\) of two sizes ≥ 1, got"):
            WhiteBulk(shape)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=r"expected a positive finite sigma, got"):
            WhiteBulk((3, 4), sigma)
    bulk = WhiteBulk((3, 4))
    with pytest.raises(InputError, match=r"beyond the bulk edge 3\.73205, got 0\.1"):
        bulk.d_transform([5.0, 0.1])
    with pytest.raises(InputError, match=r"beyond the bulk edge 3\.73205, got 1"):
        bulk.strength(1.0)
    for w in (0.0, -1.0, 0.3, math.nan):
        with pytest.raises(InputError, match=r"values of D between 0 and 0\.288675, where"):
            bulk.inverse_d(w)
    with pytest.raises(InputError, match=r"between 0 and inf, where the bulk ends, got -1"):
        EmpiricalBulk(uniform(30), (30, 30)).inverse_d(-1.0)
    for theta in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"expected finite strengths ≥ 0, got a negative one"):
            bulk.spike(theta)
    for ask in (bulk.spike, bulk.strength, bulk.d_transform, bulk.inverse_d, bulk.supercritical):
        for wrong in (9j, torch.tensor([9j]), np.array([9 + 0j])):
            with pytest.raises(InputError, match=r"expected real numbers, got complex ones"):
                ask(wrong)
    assert (
        WhiteBulk((3, 4), np.float32(0.5)).sigma
        == WhiteBulk((3, 4), torch.tensor(0.5)).sigma
        == 0.5
    )
    for sigma in ("1", None, [1.0], 1j):
        with pytest.raises(InputError, match=r"expected a positive finite sigma, got"):
            WhiteBulk((3, 4), sigma)


# ---- the empirical bulk


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (400, 400), (100, 1600)], ids=str)
def test_the_empirical_bulk_of_white_values_is_the_white_one(shape):
    empirical, white = EmpiricalBulk(quantiles(shape), shape), WhiteBulk(shape)
    assert not empirical.fitted.hard
    assert empirical.edge == pytest.approx(white.edge, rel=3e-3)
    assert empirical.threshold == pytest.approx(white.threshold, rel=0.01)
    theta = white.threshold * np.array([1.3, 1.5, 2.0, 4.0])
    found, expected = empirical.spike(theta), white.spike(theta)
    np.testing.assert_allclose(found.location, expected.location, rtol=2e-3)
    np.testing.assert_allclose(found.left_overlap, expected.left_overlap, rtol=0.015)
    np.testing.assert_allclose(found.right_overlap, expected.right_overlap, rtol=0.015)
    np.testing.assert_allclose(found.sd, expected.sd, rtol=0.01)


def test_the_empirical_threshold_of_noise_is_right_on_average():
    rng, shape = np.random.default_rng(0), (150, 250)
    bulks = [EmpiricalBulk(noise_values(shape, rng), shape) for _ in range(40)]
    thresholds = np.array([bulk.threshold for bulk in bulks]) / WhiteBulk(shape).threshold
    edges = np.array([bulk.edge for bulk in bulks]) / WhiteBulk(shape).edge
    assert abs(thresholds.mean() - 1) < 0.02
    assert thresholds.std() < 0.06
    assert abs(edges.mean() - 1) < 0.005
    assert not any(bulk.fitted.hard for bulk in bulks)


@given(st.floats(0.2, 20))
@settings(max_examples=40)
def test_a_uniform_bulk_has_a_closed_form(theta):
    # φ = ½ ln((z+1)/(z−1)) for a square matrix, so that ρ = coth(1/θ)
    bulk = EmpiricalBulk(uniform(400), (400, 400))
    assert bulk.fitted.hard
    assert bulk.edge == pytest.approx(1, rel=1e-12)
    assert bulk.threshold == 0.0
    spike = bulk.spike(theta)
    assert spike.supercritical
    assert spike.location - 1 == pytest.approx(1 / math.tanh(1 / theta) - 1, rel=2e-4)
    overlap = (theta * math.sinh(1 / theta)) ** -2
    assert spike.left_overlap == pytest.approx(overlap, rel=2e-4)
    assert spike.right_overlap == pytest.approx(overlap, rel=2e-4)


@pytest.mark.parametrize(
    "shape", [(100, 100), (100, 4000), (300, 300), (300, 1200), (303, 12000), (1000, 1000)], ids=str
)
def test_noise_has_no_hard_edge(shape):
    rng = np.random.default_rng(1)
    draws = 1000 if shape[0] < 1000 else 60
    hard = [fit_edge(noise_values(shape, rng)).hard for _ in range(draws)]
    assert np.mean(hard) <= 0.005


@pytest.mark.parametrize("size", [100, 200])
def test_matrices_like_trained_ones_have_no_hard_edge(size):
    rng = np.random.default_rng(4)
    n, found = size, []
    for _ in range(30):
        G, H = rng.standard_normal((2, n, n)) / n**0.5
        left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in "uv")
        rows = np.exp(0.4 * rng.standard_normal((n, 1)))
        decay = 3 * (1.0 + np.arange(n)) ** -0.5
        found += [rows * G, G @ H, G + (left * decay) @ right, left + 0.1 * G]
        found.append(rng.standard_t(5, (n, n)))
    values = [np.linalg.svd(W, compute_uv=False) for W in found]
    hard = [fit_edge(s[count_outliers(s)[0] :]).hard for s in values]
    assert np.mean(hard) < 0.01


def test_independent_values_of_a_soft_density_are_mostly_called_soft():
    rng, law = np.random.default_rng(5), SingularValueLaw.of((1000, 2000))
    hard = []
    for _ in range(200):
        values = np.sort(law.rvs(1000, generator=rng))[::-1]
        hard.append(fit_edge(values[count_outliers(values)[0] :]).hard)
    assert np.mean(hard) < 0.08


def test_nearly_even_values_have_a_hard_edge():
    """Up to a fifth of their spacing out of place."""
    rng = np.random.default_rng(0)
    places = np.arange(200) + 0.2 * rng.standard_normal((40, 200))
    hard = [fit_edge(-np.sort(-(1 + row / 200))).hard for row in places]
    assert np.mean(hard) > 0.7


def test_long_tails_have_no_hard_edge():
    rng = np.random.default_rng(2)
    for _ in range(100):
        values = np.sort(rng.exponential(size=1000))[::-1]
        assert not fit_edge(values[count_outliers(values)[0] :]).hard
    for power in (-0.3, -0.8, -2.0):
        assert not fit_edge((1 + np.arange(400) / 20) ** power).hard


@pytest.mark.parametrize("theta", [0.5, 1.5])
def test_a_hard_edge_holds_back_no_spike(theta):
    shape, rng = (200, 300), np.random.default_rng(1)
    expected = EmpiricalBulk(uniform(200), shape).spike(theta)
    draws = np.array([outlier(diagonal(uniform(200), shape), theta, rng) for _ in range(50)])
    location, left, right = draws.mean(0)
    assert abs(location - expected.location) < 3 * expected.sd / math.sqrt(50)
    assert draws[:, 0].std(ddof=1) == pytest.approx(expected.sd, rel=0.25)
    assert left == pytest.approx(expected.left_overlap, abs=0.03)
    assert right == pytest.approx(expected.right_overlap, abs=0.03)


POWER = (1 + np.arange(200) / 30) ** -1.0


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)], ids=str)
def test_a_power_law_bulk_against_haar_vectors(shape):
    rng, theta = np.random.default_rng(2), 1.3
    expected = EmpiricalBulk(POWER, shape).spike(theta)
    draws = np.array([outlier(diagonal(POWER, shape), theta, rng) for _ in range(50)])
    location, left, right = draws.mean(0)
    assert abs(location - expected.location) < 3 * expected.sd / math.sqrt(50)
    assert draws[:, 0].std(ddof=1) == pytest.approx(expected.sd, rel=0.25)
    assert left == pytest.approx(expected.left_overlap, abs=0.02)
    assert right == pytest.approx(expected.right_overlap, abs=0.02)


@pytest.mark.parametrize("own", [(2.2, 1.9), (5.0, 4.0)], ids=["near", "far"])
def test_outliers_left_out_of_a_bulk_cost_a_few_percent(own):
    values, shape = np.array([*own, *POWER[2:]]), (200, 300)
    bulk = EmpiricalBulk(values, shape, outliers=2)
    rng, theta = np.random.default_rng(2), 1.3
    expected = bulk.spike(theta)
    draws = np.array([outlier(diagonal(values, shape), theta, rng) for _ in range(50)])
    location, left, right = draws.mean(0)
    # an outlier above ρ repels it and takes of its overlap, which the bulk alone cannot know
    assert bulk.edge < location < own[1]
    assert location == pytest.approx(expected.location, rel=0.02)
    assert left == pytest.approx(expected.left_overlap, abs=0.05)
    assert right == pytest.approx(expected.right_overlap, abs=0.05)
    whole = EmpiricalBulk(values, shape)  # takes them for bulk
    assert whole.threshold > 1.3 * bulk.threshold


def test_far_from_the_edge_the_smooth_sum_is_the_plain_one():
    values = noise_values((60, 80), np.random.default_rng(0))
    z = values[0] * np.array([3.0, 10.0, 100.0])
    plain = d_transform(values, (60, 80), z)
    np.testing.assert_allclose(EmpiricalBulk(values, (60, 80)).d_transform(z), plain, rtol=1e-3)


def test_values_that_nearly_coincide_lose_no_digits():
    values = 1 + 1e-9 * uniform(40)
    spike = EmpiricalBulk(values, (40, 40)).spike(np.array([1.0, 1e3]))
    # all values one: φ = z/(z² − 1)
    location = (theta := np.array([1.0, 1e3])) / 2 + np.sqrt(theta**2 / 4 + 1)
    np.testing.assert_allclose(spike.location, location, rtol=1e-8)
    overlap = (location**2 - 1) ** 2 / (theta**2 * (location**2 + 1))
    np.testing.assert_allclose(spike.left_overlap, overlap, rtol=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1e5])
def test_the_empirical_bulk_scales(scale):
    values = noise_values((30, 50), np.random.default_rng(0))
    one, other = EmpiricalBulk(values, (30, 50)), EmpiricalBulk(scale * values, (30, 50))
    a, b = one.spike(20.0), other.spike(scale * 20.0)
    assert other.threshold == pytest.approx(scale * one.threshold, rel=1e-10)
    assert b.location == pytest.approx(scale * a.location, rel=1e-10)
    assert b.left_overlap == pytest.approx(a.left_overlap, rel=1e-9)
    assert b.sd == pytest.approx(scale * a.sd, rel=1e-9)


SPANS = [(0.3, 0.5), (1e-6, 0.5), (5.0, 0.01), (20.0, 0.5), (2.0, -1.9), (2.0, -0.1), (1e3, -1e-3)]


@pytest.mark.parametrize(("g", "w"), SPANS)
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_closed_integrals_over_the_first_values(g, w, soft):
    # x = y²
    def moment(power):
        def integrand(y):
            return (3 * y * y if soft else 2 * y) / (g + w * y * y) ** power

        cut = min(0.5, 3 * math.sqrt(abs(g / w)))
        options = {"epsabs": 0, "epsrel": 1e-12, "limit": 500}
        pieces = [integrate.quad(integrand, *ends, **options)[0] for ends in ((0, cut), (cut, 1))]
        return sum(pieces)

    for point, lib in ((double(g), torch), (np.asarray(g), np)):
        value, slope = (_average_soft if soft else _average_hard)(point, w, lib)
        assert float(value) == pytest.approx(moment(1), rel=1e-11)
        assert float(slope) == pytest.approx(-moment(2), rel=1e-11)


def test_at_a_soft_edge_the_average_is_finite():
    value, slope = _average_soft(double(0.0), 0.5, torch)
    assert float(value) == 6.0
    assert float(slope) == -math.inf


@pytest.mark.parametrize(
    "values", [uniform(60) ** 2 + 0.1, uniform(60) + 0.1], ids=["soft", "hard"]
)
def test_traces_are_the_same_with_a_gradient_and_without(values):
    bulk = EmpiricalBulk(values, (60, 90))
    for z in (double([1.0, 1.0 + 1e-9, 1.3, 1e3, math.nan]) * bulk.edge, double(1.1 * bulk.edge)):
        with_gradient = bulk.traces(z.clone().requires_grad_())
        assert with_gradient.left.requires_grad
        for one, other in some(zip(bulk.traces(z), with_gradient, strict=True)):
            assert one.shape == other.shape == z.shape
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=0, equal_nan=True)


def test_the_threshold_is_computed_once(monkeypatch):
    bulk = EmpiricalBulk(uniform(60) ** 2, (60, 90))
    first = bulk.threshold
    monkeypatch.setattr(EmpiricalBulk, "traces", None)
    assert bulk.threshold == first > 0


def test_the_slopes_are_derivatives():
    bulk = EmpiricalBulk(noise_values((40, 60), np.random.default_rng(3)), (40, 60), outliers=1)
    z = double([1.01, 1.3, 4.0]) * bulk.edge
    h = 1e-5 * z
    up, down, middle = bulk.traces(z + h), bulk.traces(z - h), bulk.traces(z)
    for i in (0, 1):
        torch.testing.assert_close((up[i] - down[i]) / (2 * h), middle[i + 2], rtol=1e-6, atol=0)


def test_bad_input_of_an_empirical_bulk():
    values = uniform(30)
    with pytest.raises(InputError, match=r"all 30 singular values of a 30×40 matrix, got 29"):
        EmpiricalBulk(values[1:], (30, 40))
    for make in (fit_edge, count_outliers, lambda v: EmpiricalBulk(v, (len(v), 90))):
        with pytest.raises(InputError, match=r"at least 12 singular values in a bulk, got 11"):
            make(values[:11])
        with pytest.raises(InputError, match=r"in descending order; sort them first"):
            make(values[::-1])
        with pytest.raises(InputError, match=r"singular values that differ, got equal ones"):
            make(np.ones(30))
        for wrong in (-values[::-1], np.full(30, math.nan)):
            with pytest.raises(InputError, match=r"one row of finite singular values ≥ 0"):
                make(wrong)
    with pytest.raises(InputError, match=r"one row of finite singular values ≥ 0"):
        fit_edge(values[:, None])
    with pytest.raises(InputError, match=r"at least 12 singular values in a bulk, got 11"):
        EmpiricalBulk(values, (30, 40), outliers=19)
    for outliers in (-1, 1.5, None):
        with pytest.raises(InputError, match=rf"expected outliers ≥ 0, got {outliers!r}; give a"):
            EmpiricalBulk(values, (30, 40), outliers=outliers)
    assert EmpiricalBulk(values, (30, 40), outliers=np.int64(2)).outliers == 2


def test_gradients_pass_through_the_root_of_an_empirical_bulk():
    values = torch.linspace(1, 0.1, 60, dtype=torch.float64) ** 2
    bulk = EmpiricalBulk(values, (60, 90))

    def told(theta):
        found = bulk.spike(theta)
        return found.location, found.left_overlap, found.right_overlap, found.sd

    theta = torch.tensor([3.0, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(told, theta)
    w = (0.05 * theta).detach().requires_grad_()
    assert torch.autograd.gradcheck(bulk.inverse_d, w)


def test_an_outlier_that_digits_cannot_tell_from_the_edge_is_none():
    soft = EmpiricalBulk(torch.linspace(1, 0.1, 60, dtype=torch.float64) ** 2, (60, 90))
    hard = EmpiricalBulk(torch.linspace(1, 0.1, 60, dtype=torch.float64), (60, 90))
    assert hard.threshold == 0
    for found in (soft.spike(soft.threshold * (1 + 1e-9)), hard.spike(1e-8)):
        assert (found.supercritical, found.left_overlap, found.right_overlap) == (False, 0.0, 0.0)
        assert math.isnan(found.sd)
    assert hard.spike(0.5).supercritical
