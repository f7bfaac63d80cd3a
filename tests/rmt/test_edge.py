from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy import optimize

from bulkedge._errors import InputError
from bulkedge.rmt import BulkFit, EmpiricalBulk, WhiteBulk, count_outliers, edge_test, fit_bulk
from bulkedge.rmt._noise import GRID, SERIES_FROM, spike_phases
from helpers import MINILM, some
from noise import noise_values, spiked_values

LEVELS = (0.5, 0.05, 0.01)


def three_sd(level, draws):
    return 3 * math.sqrt(level * (1 - level) / draws)


def critical(level, shape, **options):
    """The value, in units of sigma, whose p-value is this level."""
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])

    def excess(x):
        return edge_test(x, shape, sigma=1.0, **options) - level

    return optimize.brentq(excess, 0.7 * edge, 1.3 * edge, xtol=1e-6)


# ---- the test of an edge


# from the tables of Tracy–Widom, beta = 1
@pytest.mark.parametrize(("x", "tail"), [(-1.2686, 0.5), (0.9793, 0.05), (2.0234, 0.01)])
def test_the_p_value_is_a_tracy_widom_tail(x, tail):
    a, b = math.sqrt(79.5), math.sqrt(319.5)
    value = 0.3 * math.sqrt((a + b) ** 2 + x * (a + b) * (1 / a + 1 / b) ** (1 / 3))
    assert edge_test(value, (80, 320), sigma=0.3) == pytest.approx(tail, rel=1e-3)
    assert edge_test(value, (320, 80), sigma=0.3) == pytest.approx(tail, rel=1e-3)
    # a k-th value has lost k − 1 rows and columns
    assert edge_test(value, (82, 322), sigma=0.3, k=3) == pytest.approx(tail, rel=1e-3)


@pytest.mark.parametrize("shape", [(30, 30), (50, 200), (200, 50), (100, 100)], ids=str)
def test_noise_of_known_sigma_alarms_as_often_as_it_should(shape):
    rng, draws = np.random.default_rng(7), 600
    values = np.array([noise_values(shape, rng, 1)[0] for _ in range(draws)])
    for level in LEVELS:
        assert abs((values > critical(level, shape)).mean() - level) < three_sd(level, draws)


def test_the_third_value_after_two_strong_spikes():
    shape, rng, draws = (60, 120), np.random.default_rng(0), 600
    strengths = 6 * WhiteBulk(shape).threshold * np.array([1.3, 1.0])
    values = np.array([spiked_values(shape, strengths, rng)[2] for _ in range(draws)])
    own, first = (values > critical(0.05, shape, k=3)), (values > critical(0.05, shape))
    assert abs(own.mean() - 0.05) < three_sd(0.05, draws)
    assert first.mean() < 0.03  # the law of the largest is too strict


def test_the_asymptotic_edge_is_a_bad_test():
    shape, rng, draws = (100, 100), np.random.default_rng(3), 600
    beyond = np.mean([noise_values(shape, rng, 1)[0] > 20 for _ in range(draws)])
    assert beyond > 0.1
    assert edge_test(20.0, shape, sigma=1.0) == pytest.approx(beyond, abs=three_sd(0.15, draws))


def test_the_p_value_falls_with_the_value_and_knows_no_unit():
    p = [edge_test(x, (40, 60), sigma=1.0) for x in (5.0, 13.0, 14.0, 14.5, 16.0, 40.0)]
    assert p == sorted(p, reverse=True)
    assert p[0] == pytest.approx(1)
    assert p[-1] < 1e-30
    for fitted in (False, True):
        one = edge_test(14.6, (40, 60), sigma=1.0, fitted=fitted)
        assert edge_test(14.6e-9, (40, 60), sigma=1e-9, fitted=fitted) == pytest.approx(one)


def test_a_row_of_values_is_tested_at_once_and_answered_in_kind():
    values = [13.0, 14.0, 14.5]
    for options in ({}, {"k": 2}, {"fitted": True}):
        one_by_one = [edge_test(x, (40, 60), sigma=1.0, **options) for x in values]
        assert all(type(p) is float for p in one_by_one)
        for kind in (values, np.array(values)):
            found = edge_test(kind, (40, 60), sigma=1.0, **options)
            assert isinstance(found, np.ndarray)
            np.testing.assert_allclose(found, one_by_one, rtol=1e-12)
        x = torch.tensor([values], requires_grad=True)
        found = edge_test(x, (40, 60), sigma=1.0, **options)
        assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, (1, 3), True)
        np.testing.assert_allclose(found.detach()[0], one_by_one, rtol=1e-4)
    expected = edge_test(14.0, (40, 60), sigma=0.5, k=3)
    assert edge_test(np.float32(14), (40, 60), sigma=np.float64(0.5), k=np.int64(3)) == expected
    assert edge_test(torch.tensor(14), (40, 60), sigma=0.5, k=torch.tensor(3)) == expected
    assert edge_test([], (40, 60), sigma=1.0).shape == (0,)


def test_a_test_of_extreme_values():
    for fitted in (False, True):
        found = edge_test([0.0, 1e200, math.inf], (40, 60), sigma=1e-200, fitted=fitted)
        assert found.tolist() == [1.0, 0.0, 0.0]


# ---- the fit


@pytest.fixture(scope="module")
def fits() -> list[tuple[np.ndarray, BulkFit]]:
    """Values of noise with entries of standard deviation 3, and what is made of them."""
    rng, shape = np.random.default_rng(11), (50, 100)
    values = [3 * noise_values(shape, rng) for _ in range(250)]
    return [(s, fit_bulk(s, shape)) for s in values]


def test_noise_is_fitted_without_bias(fits):
    sigma = np.array([fit.sigma for _, fit in fits]) / 3
    error = np.mean([fit.sigma_error for _, fit in fits]) / 3
    assert abs(sigma.mean() - 1) < 0.002
    assert sigma.std() == pytest.approx(error, rel=0.15)


def test_noise_is_white_and_seldom_spiked(fits):
    assert np.mean([fit.white for _, fit in fits]) > 0.99
    for fit in some(fit for _, fit in fits if fit.white):
        assert isinstance(fit.bulk, WhiteBulk)
        assert fit.edge == pytest.approx(fit.sigma * (math.sqrt(50) + 10))
        assert fit.threshold == pytest.approx(fit.sigma * 5000**0.25)
    alarms = np.mean([fit.spikes > 0 for _, fit in fits])
    assert abs(alarms - 0.05) < three_sd(0.05, len(fits))


def test_noise_of_fitted_sigma_alarms_as_often_as_it_should(fits):
    ratios = np.array([s[0] / fit.sigma for s, fit in fits])
    for level in LEVELS:
        alarms = ratios > critical(level, (50, 100), fitted=True)
        assert abs(alarms.mean() - level) < three_sd(level, len(fits))


def test_the_fit_reports_the_p_value_of_the_test(fits):
    for s, fit in some(fits[:20]):
        if fit.white and fit.spikes < 2:
            expected = edge_test(s[0], (50, 100), sigma=fit.sigma, fitted=True)
            assert fit.p_value == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(400, 400), (200, 800)], ids=str)
def test_spikes_are_counted_and_leave_sigma_alone(shape):
    rng, count = np.random.default_rng(5), min(shape) // 20
    found = []
    for _ in range(10):
        strengths = WhiteBulk(shape).threshold * np.sort(rng.uniform(2, 10, count))[::-1]
        found.append(fit_bulk(spiked_values(shape, strengths, rng), shape))
    sigma = np.mean([fit.sigma for fit in found])
    assert abs(sigma - 1) < 0.0025
    # 5 % of the fits may count one too many
    assert all(count <= fit.spikes <= count + 1 for fit in found)
    assert sum(fit.spikes for fit in found) <= 10 * count + 2
    assert all(fit.white for fit in found)
    assert all(fit.p_value < 0.05 for fit in found)


def test_the_p_value_is_that_of_the_last_spike_that_counts():
    shape, rng = (200, 300), np.random.default_rng(9)
    values = spiked_values(shape, WhiteBulk(shape).threshold * np.array([4.0, 1.6]), rng)
    fits = {exact: fit_bulk(values, shape, exact=exact) for exact in (None, 2, 1, 0)}
    assert [fit.spikes for fit in fits.values()] == [2, 2, 1, 0]
    assert all(fit.white for fit in fits.values())
    first, second = (
        edge_test(values[i], shape, sigma=fits[None].sigma, k=i + 1, fitted=True) for i in (0, 1)
    )
    assert first < 1e-30 < second < 0.05
    # beyond the largest value there is none to ask of
    for exact, expected in {None: second, 2: second, 1: first, 0: first}.items():
        assert fits[exact].p_value == pytest.approx(expected)


def test_the_p_value_is_that_of_the_last_spike_without_a_model_too():
    values = np.concatenate([[2.5, 1.8], (1 + np.arange(198) / 20) ** -0.8])
    last, first = (count_outliers(values, exact=exact) for exact in (None, 1))
    assert (last[0], first[0]) == (2, 1)
    assert 0 < first[1] < last[1] < 0.05
    assert count_outliers(values, exact=0) == (0, first[1])
    assert not fit_bulk(values, (200, 300)).white
    for exact, expected in {None: last, 1: first, 0: (0, first[1])}.items():
        fit = fit_bulk(values, (200, 300), exact=exact)
        assert (fit.spikes, fit.p_value) == expected


@pytest.mark.parametrize("count", [0, 15, 16, 17, 40])
def test_more_spikes_than_are_tested_at_first(count):
    shape, rng = (600, 600), np.random.default_rng(count)
    strengths = WhiteBulk(shape).threshold * np.linspace(12, 3, count)
    values = noise_values((600 - count, 600 - count), rng)
    outliers = WhiteBulk(shape).spike(strengths).location if count else []
    fit = fit_bulk(np.concatenate([outliers, values]), shape)
    assert fit.white
    assert fit.spikes == count


def test_turns_of_spikes_are_sums_of_arguments():
    t = np.array([1 + 1e-9, 1.001, 1.1, SERIES_FROM, 1.2, 1.2, 3.0, 1e9])
    expected = np.angle(1 - t[:, None] * np.exp(-1j * GRID)).sum(0)
    np.testing.assert_allclose(spike_phases(t), expected, rtol=0, atol=1e-12)


def test_the_chance_of_a_row_of_values():
    white = fit_bulk(noise_values((60, 80), np.random.default_rng(0)), (60, 80))
    soft = fit_bulk((1 + np.arange(200) / 20) ** -0.8, (200, 300))
    hard = fit_bulk((np.arange(100)[::-1] + 0.5) / 100, (100, 150))
    assert white.white
    assert not soft.bulk.fitted.hard
    assert hard.bulk.fitted.hard
    for fit in (white, soft, hard):
        values = fit.edge * np.array([0.9, 1.001, 2.0])
        one_by_one = [fit.chance_of(float(x)) for x in values]
        assert all(type(p) is float for p in one_by_one)
        assert one_by_one == sorted(one_by_one, reverse=True)
        np.testing.assert_allclose(fit.chance_of(values), one_by_one)
        assert fit.chance_of(torch.from_numpy(values)).tolist() == pytest.approx(one_by_one)
        with pytest.raises(InputError, match=r"expected singular values ≥ 0, got a negative one"):
            fit.chance_of(-1.0)
    assert hard.chance_of([0.5, 1.5]).tolist() == [1.0, 0.0]


def test_the_strength_of_a_spike_decides_whether_it_is_seen():
    shape, rng = (150, 150), np.random.default_rng(6)
    seen = {
        ratio: np.mean(
            [
                fit_bulk(
                    spiked_values(shape, np.array([ratio * WhiteBulk(shape).threshold]), rng), shape
                ).spikes
                for _ in range(15)
            ]
        )
        for ratio in (0.6, 2.0)
    }
    assert seen[0.6] < 0.25
    assert seen[2.0] >= 1


def test_a_power_law_is_not_white():
    values = (1 + np.arange(300) / 20) ** -0.8
    fit = fit_bulk(values, (300, 400))
    assert not fit.white
    assert isinstance(fit.bulk, EmpiricalBulk)
    assert fit.edge == fit.bulk.edge
    assert fit.threshold == fit.bulk.threshold
    assert fit.spikes == fit.bulk.outliers


@pytest.mark.parametrize(
    ("name", "white"),
    [
        ("encoder.layer.0.attention.self.query", False),
        ("encoder.layer.3.attention.self.value", False),
        ("encoder.layer.5.attention.output.dense", False),
        ("pooler.dense", True),  # sentence-transformers never trained it
    ],
)
def test_trained_matrices_are_not_white(name, white):
    with safe_open(MINILM / "model.safetensors", "pt") as weights:
        W = weights.get_tensor(f"{name}.weight").double()
    fit = fit_bulk(torch.linalg.svdvals(W), tuple(W.shape))
    assert fit.white is white
    assert (fit.misfit <= fit.misfit_limit) is white
    if white:
        assert fit.spikes == 0
        assert fit.sigma == pytest.approx(float(W.std()), rel=0.01)


@given(st.floats(1e-20, 1e20), st.sampled_from([(20, 30), (60, 40), (13, 13)]), st.booleans())
@settings(max_examples=20)
def test_the_fit_scales(scale, shape, spiked):
    values = noise_values(shape, np.random.default_rng(1))
    values[0] *= 2 if spiked else 1
    one, other = fit_bulk(values, shape), fit_bulk(scale * values, shape)
    assert other.sigma == pytest.approx(scale * one.sigma, rel=1e-6)
    assert other.edge == pytest.approx(scale * one.edge, rel=1e-6)
    assert other.sigma_error == pytest.approx(scale * one.sigma_error, rel=1e-6)
    assert (other.white, other.spikes) == (one.white, one.spikes)
    assert one.spikes == spiked


def test_every_kind_of_array_is_taken():
    values = noise_values((20, 30), np.random.default_rng(1))
    expected = fit_bulk(values, (20, 30))
    for same in (values.tolist(), torch.from_numpy(values.copy())):
        assert fit_bulk(same, (30, 20)).sigma == expected.sigma
    single = fit_bulk(torch.from_numpy(values.copy()).float().requires_grad_(), (20, 30))
    assert single.sigma == pytest.approx(expected.sigma, rel=1e-6)
    assert isinstance(expected.sigma, float)
    assert isinstance(expected.spikes, int)


def test_bad_input_of_a_fit():
    values = noise_values((20, 30), np.random.default_rng(1))
    with pytest.raises(InputError, match=r"the 20 singular values of a 20×40 matrix, got 19"):
        fit_bulk(values[1:], (20, 40))
    with pytest.raises(InputError, match=r"at least 12 singular values, got 11"):
        fit_bulk(values[:11], (11, 30))
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match=r"expected a significance between 0 and 1, got"):
            fit_bulk(values, (20, 30), significance=level)
    with pytest.raises(InputError, match=r"a bulk, got one whose median singular value is 0"):
        fit_bulk([*values[:5], *[0.0] * 15], (20, 30))
    for exact in (-1, 2.5, "3"):
        with pytest.raises(InputError, match=rf"expected exact ≥ 0, got {exact!r}; give a whole"):
            fit_bulk(values, (20, 30), exact=exact)
    with pytest.raises(InputError, match=r"expected real numbers, got complex ones"):
        fit_bulk(values + 0j, (20, 30))
    with pytest.raises(InputError, match=r"a matrix other than zero, got .*; leave the matrix out"):
        fit_bulk(0 * values, (20, 30))
    for scale in (1e-70, 1e70):
        with pytest.raises(InputError, match=r"norm between 1e-60 and 1e\+60, got .*; rescale"):
            fit_bulk(scale * values, (20, 30))
    with pytest.raises(InputError, match=r"in descending order; sort them first"):
        fit_bulk(values[::-1], (20, 30))
    with pytest.raises(InputError, match=r"singular values that differ, got equal ones"):
        fit_bulk(np.ones(20), (20, 30))
    with pytest.raises(InputError, match=r"one row of finite singular values ≥ 0"):
        fit_bulk([math.nan] * 20, (20, 30))
    with pytest.raises(InputError, match=r"expected a shape \(m, n\)"):
        fit_bulk(values, (20, 0))


def test_bad_input_of_a_test():
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=r"expected a positive finite sigma, got"):
            edge_test(3.0, (20, 30), sigma=sigma)
    for k in (0, 21, 1.5, "1", None):
        with pytest.raises(InputError, match=rf"expected k between 1 and 20, got {k!r}"):
            edge_test(3.0, (20, 30), sigma=1.0, k=k)
    for value in (-1.0, math.nan, [1.0, -1e-9]):
        with pytest.raises(InputError, match=r"expected singular values ≥ 0, got a negative one"):
            edge_test(value, (20, 30), sigma=1.0)
    with pytest.raises(InputError, match=r"expected real numbers, got complex ones"):
        edge_test(3j, (20, 30), sigma=1.0)


# ---- without a model


@pytest.mark.parametrize("shape", [(30, 90), (100, 100)], ids=str)
def test_noise_seldom_stands_apart_from_itself(shape):
    rng, draws = np.random.default_rng(0), 200
    alarms = [count_outliers(noise_values(shape, rng))[0] > 0 for _ in range(draws)]
    assert np.mean(alarms) < 0.05 + three_sd(0.05, draws)


def test_heavy_tails_do_stand_apart():
    rng = np.random.default_rng(0)
    draws = [np.linalg.svd(rng.standard_t(3, (60, 60)), compute_uv=False) for _ in range(60)]
    assert np.mean([count_outliers(s)[0] > 0 for s in draws]) > 0.2


def test_what_stands_apart_is_counted():
    shape, rng = (200, 300), np.random.default_rng(4)
    for count in (1, 3, 8):
        strengths = WhiteBulk(shape).threshold * np.linspace(6, 3, count)
        found, p_value = count_outliers(spiked_values(shape, strengths, rng))
        assert found == count
        assert p_value < 0.05


@given(st.floats(1e-50, 1e50))
@settings(max_examples=20)
def test_standing_apart_knows_no_unit(scale):
    values = noise_values((40, 60), np.random.default_rng(2))
    values[0] *= 1.3
    one, other = count_outliers(values), count_outliers(scale * values)
    assert one[0] == other[0] == 1
    assert other[1] == pytest.approx(one[1], rel=1e-6)


def test_bad_input_of_what_stands_apart():
    values = noise_values((40, 60), np.random.default_rng(2))
    for level in (0.0, 2, math.nan, None):
        with pytest.raises(InputError, match=r"expected a significance between 0 and 1, got"):
            count_outliers(values, significance=level)
    for exact in (-1, 2.5):
        with pytest.raises(InputError, match=rf"expected exact ≥ 0, got {exact!r}; give a whole"):
            count_outliers(values, exact=exact)
    assert count_outliers(values, exact=np.int64(40), significance=np.float32(0.05))[0] in (0, 1)


def test_a_dozen_values_can_spare_none():
    values = np.concatenate([[9.0], np.linspace(1, 0.9, 11)])
    assert fit_bulk(values, (12, 40)).spikes == 0
    assert count_outliers(values) == (0, 1.0)
    assert count_outliers(np.concatenate([[9.0], np.linspace(1, 0.9, 12)]))[0] == 1


@pytest.mark.parametrize(("size", "alarms"), [(12, 0.0), (13, 0.12), (20, 0.077), (30, 0.044)])
def test_few_values_alarm_more_often_as_documented(size, alarms):
    rng = np.random.default_rng(size)
    found = [count_outliers(noise_values((size, 2 * size), rng))[0] > 0 for _ in range(800)]
    assert np.mean(found) == pytest.approx(alarms, abs=4 * math.sqrt(alarms / 800))
