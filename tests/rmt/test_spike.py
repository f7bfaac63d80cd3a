from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkedge._errors import InputError
from bulkedge.rmt import EmpiricalBulk, WhiteBulk, Wigner, spike, strength
from noise import noise_values, unit


def wigner(size, rng):
    """Off the diagonal of variance 1, on it of variance 2."""
    W = rng.standard_normal((size, size))
    return (W + W.T) / math.sqrt(2)


# ---- symmetric matrices


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ratio", [2.0, -1.5])
def test_symmetric_spikes_lie_where_simulation_puts_them(ratio, seed):
    size, draws, rng = 200, 60, np.random.default_rng(seed)
    expected = Wigner(size).spike(ratio * math.sqrt(size))
    found = []
    for _ in range(draws):
        e = unit(size, rng)
        values, vectors = np.linalg.eigh(wigner(size, rng) + expected.theta * np.outer(e, e))
        k = -1 if ratio > 0 else 0
        found.append((values[k], (e @ vectors[:, k]) ** 2))
    found = np.array(found)
    assert abs(found[:, 0].mean() - expected.location) < 3 * expected.sd / math.sqrt(draws)
    assert found[:, 0].std(ddof=1) == pytest.approx(expected.sd, rel=0.25)
    assert found[:, 1].mean() == pytest.approx(expected.left_overlap, abs=0.025)
    assert expected.right_overlap == expected.left_overlap
    assert expected.supercritical is True


def test_a_symmetric_spike_below_the_threshold_stays_inside():
    found = Wigner(100, 0.5).spike([-5.0, -4.0, 0.0, 5.0])
    assert found.threshold == pytest.approx(5)
    assert found.location.tolist() == [-10.0, -10.0, 10.0, 10.0]
    assert found.left_overlap.tolist() == [0.0] * 4
    assert np.isnan(found.sd).all()
    assert not found.supercritical.any()
    assert Wigner(7).spike([-1.0, 1.0]).location.tolist() == [-2 * math.sqrt(7), 2 * math.sqrt(7)]


@given(st.integers(1, 500), st.floats(1e-6, 1e6), st.floats(1.001, 1e4), st.booleans())
@settings(max_examples=60)
def test_symmetric_spikes_mirror_scale_and_invert(size, sigma, ratio, negative):
    theta = (-1 if negative else 1) * ratio * math.sqrt(size)
    one, other = Wigner(size).spike(theta), Wigner(size, sigma).spike(-sigma * theta)
    assert other.location == pytest.approx(-sigma * one.location, rel=1e-12)
    assert other.left_overlap == pytest.approx(one.left_overlap, rel=1e-9)
    assert other.sd == pytest.approx(sigma * one.sd, rel=1e-9)
    assert Wigner(size).strength(one.location) == pytest.approx(theta, rel=1e-7)


@pytest.mark.parametrize("sigma", [1e-160, 1.0, 1e150])
def test_symmetric_spikes_of_any_size(sigma):
    bulk = Wigner(10, sigma)
    found = bulk.spike([2e150 * bulk.threshold, -2 * bulk.threshold])
    np.testing.assert_allclose(found.left_overlap, [1.0, 0.75])
    np.testing.assert_allclose(found.location, [found.theta[0], -2.5 * bulk.threshold])
    np.testing.assert_allclose(found.sd, np.sqrt([2, 1.5]) * sigma)
    np.testing.assert_allclose(bulk.strength(found.location), found.theta)
    huge = Wigner(10).spike([1e200, -1e300])
    assert huge.left_overlap.tolist() == [1.0, 1.0]
    assert huge.location.tolist() == [1e200, -1e300]


def test_a_rounded_symmetric_edge_is_still_no_point_inside():
    for size in range(2, 40):
        theta = torch.tensor([1.0, -1.0, 0.0]) * math.sqrt(size)
        back = Wigner(size).strength(Wigner(size).spike(theta).location)
        np.testing.assert_allclose(back.abs(), math.sqrt(size), rtol=1e-3)
    with pytest.raises(InputError, match=r"eigenvalues beyond ±20, got 20"):
        Wigner(100).strength(20.0 * (1 - 1e-7))


def test_bad_input_of_a_symmetric_bulk():
    with pytest.raises(InputError, match=r"expected a shape \(m, n\) of two sizes ≥ 1"):
        Wigner(0)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=r"expected a positive finite sigma, got"):
            Wigner(3, sigma)
    for theta in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match=r"expected finite strengths, got NaN or infinity"):
            Wigner(3).spike(theta)
    with pytest.raises(InputError, match=r"eigenvalues beyond ±20, got 19\.5"):
        Wigner(100).strength([-25.0, -19.5])
    for ask in (Wigner(3).spike, Wigner(3).strength):
        with pytest.raises(InputError, match=r"expected real numbers, got complex ones"):
            ask(9j)


# ---- the front door


def test_a_shape_means_white_noise():
    theta = np.array([0.5, 2.0])
    found = spike(theta, shape=(400, 1600), sigma=0.025)
    expected = WhiteBulk((400, 1600), 0.025).spike(theta)
    for name in ("location", "left_overlap", "right_overlap", "supercritical"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    # Benaych-Georges and Nadakuditi print it for entries of variance 1/n
    c, t = 0.25, 2.0
    assert found.threshold == pytest.approx(c**0.25)
    assert found.location[1] == pytest.approx(math.sqrt((1 + t * t) * (c + t * t)) / t)
    assert found.left_overlap[1] == pytest.approx(1 - c * (1 + t * t) / (t * t * (t * t + c)))
    assert found.right_overlap[1] == pytest.approx(1 - (c + t * t) / (t * t * (t * t + 1)))


def test_square_noise_is_the_symmetric_formula_by_coincidence():
    found = spike(3.0, shape=(100, 100), sigma=0.1)
    assert found.location == pytest.approx(3 + 1 / 3)
    assert found.left_overlap == pytest.approx(1 - 1 / 9)
    symmetric = spike(3.0, shape=(100, 100), sigma=0.1, symmetric=True)
    assert symmetric.location == pytest.approx(3 + 1 / 3)
    assert spike(-3.0, shape=(100, 100), sigma=0.1, symmetric=True).location < 0


def test_any_other_bulk():
    values = noise_values((40, 60), np.random.default_rng(0))
    bulk = EmpiricalBulk(values, (40, 60))
    assert spike(30.0, bulk=bulk).location == bulk.spike(30.0).location
    assert strength(40.0, bulk=bulk) == bulk.strength(40.0)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(1e-3, 1e3), st.floats(1.001, 1e4))
@settings(max_examples=60)
def test_strength_inverts_the_printed_formula(m, n, sigma, ratio):
    theta = ratio * sigma * (m * n) ** 0.25
    s = spike(theta, shape=(m, n), sigma=sigma).location
    x = s * s - sigma**2 * (m + n)
    root = math.sqrt(max(x * x - 4 * sigma**4 * m * n, 0))
    assert strength(s, shape=(m, n), sigma=sigma) == pytest.approx(theta, rel=1e-6)
    assert math.sqrt((x + root) / 2) == pytest.approx(theta, rel=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_kinds_of_numbers(symmetric):
    options = {"shape": (50, 50), "symmetric": symmetric}
    x = torch.tensor([[5.0], [40.0]])
    found = spike(x, **options)
    for name in ("location", "left_overlap", "right_overlap", "sd"):
        value = getattr(found, name)
        assert (value.dtype, value.shape) == (torch.float32, (2, 1))
    assert found.supercritical.tolist() == [[False], [True]]
    assert strength(x[1:], **options).dtype == torch.float32
    assert isinstance(strength(40.0, **options), float)
    assert isinstance(spike([5, 40], **options).location, np.ndarray)
    assert found.theta is x


def test_bad_input_of_the_front_door():
    bulk = WhiteBulk((3, 4))
    for options in ({}, {"shape": (3, 4), "bulk": bulk}):
        for ask in (spike, strength):
            with pytest.raises(InputError, match=r"expected either shape or bulk; give shape="):
                ask(5.0, **options)
    with pytest.raises(InputError, match=r"symmetric=True is for a white bulk; give shape="):
        spike(5.0, bulk=bulk, symmetric=True)
    with pytest.raises(InputError, match=r"a square shape for symmetric=True, got 3×4"):
        spike(5.0, shape=(3, 4), symmetric=True)
    with pytest.raises(InputError, match=r"expected a shape \(m, n\) of two sizes ≥ 1"):
        spike(5.0, shape=(3, 0))
    with pytest.raises(InputError, match=r"beyond the bulk edge 3\.73205, got 3"):
        strength(3.0, shape=(3, 4))
