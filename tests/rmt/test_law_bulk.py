"""Bulks made from a law, of singular values or of eigenvalues."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bulkedge._errors import InputError
from bulkedge.rmt import (
    EmpiricalBulk,
    Law,
    LawBulk,
    MarchenkoPastur,
    Semicircle,
    SingularValueLaw,
    SymmetricLawBulk,
    TracyWidom,
    WhiteBulk,
    Wigner,
    spike,
)
from helpers import some
from noise import diagonal, outlier, unit

SHAPES = [(100, 400), (160, 40), (100, 100), (1000, 1001), (10, 4000)]


class Power(Law):
    """``P(X ≤ x) = 1 − (1 − x/b)ᵏ`` on [0, b]: a density that falls to 0 at b for k > 1."""

    def __init__(self, power: float, end: float = 1.0) -> None:
        self.power, self.end = power, end

    def bulk_support(self):
        return 0.0, self.end

    def mean(self):
        return self.end / (1 + self.power)

    def var(self):
        return self.end**2 * self.power / (1 + self.power) ** 2 / (2 + self.power)

    def _pdf(self, x):
        inside = (x >= 0) & (x <= self.end)
        found = self.power / self.end * (1 - x / self.end).clamp(0.0, 1.0) ** (self.power - 1)
        return torch.where(inside, found, 0.0)

    def _cdf(self, x):
        return 1 - self._sf(x)

    def _sf(self, x):
        return (1 - x / self.end).clamp(0.0, 1.0) ** self.power

    def _ppf(self, q):
        return self._isf(1 - q)

    def _isf(self, q):
        return self.end * (1 - q ** (1 / self.power))


class Kinked(Power):
    """Half of that mass."""

    def _pdf(self, x):
        return torch.where(x < 0.3, super()._pdf(x), 0.0)


def away(edge: float) -> np.ndarray:
    return edge * (1 + np.array([0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 1e5]))


@pytest.mark.parametrize("sigma", [1.0, 0.02])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_the_law_of_noise_it_is_the_white_bulk(shape, sigma):
    law, white = SingularValueLaw.of(shape, sigma), WhiteBulk(shape, sigma)
    bulk = LawBulk(law, shape)
    assert bulk.edge == pytest.approx(white.edge, rel=1e-15)
    assert bulk.threshold == pytest.approx(white.threshold, rel=1e-11)
    z = away(max(bulk.edge, white.edge))
    np.testing.assert_allclose(bulk.d_transform(z)[1:], white.d_transform(z)[1:], rtol=1e-10)
    assert bulk.d_transform(bulk.edge) == pytest.approx(white.d_transform(white.edge), rel=1e-10)
    theta = white.threshold * np.array([1 + 1e-6, 1.001, 1.1, 2.0, 50.0])
    one, other = bulk.spike(theta), white.spike(theta)
    np.testing.assert_allclose(one.location, other.location, rtol=1e-13)
    for field in ("left_overlap", "right_overlap", "sd"):
        found, expected = getattr(one, field), getattr(other, field)
        np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-8)
        np.testing.assert_allclose(found[2:], expected[2:], rtol=1e-9)
    # nearer the edge the rounding of a location is that much more of a strength
    np.testing.assert_allclose(bulk.strength(one.location[1:]), theta[1:], rtol=1e-11)
    low = bulk.d_transform(z[3:])
    np.testing.assert_allclose(bulk.inverse_d(low), z[3:], rtol=1e-9)


def test_a_law_with_an_atom_and_a_closed_form():
    """Of the square of noise the eigenvalues are the singular values, and G is known."""
    for ratio in (0.3, 1.0, 2.5):
        law = MarchenkoPastur(ratio, 0.7)
        bulk = LawBulk(law, (80, 80))
        z = away(bulk.edge)[1:]
        phi = (law.stieltjes(z) - law.stieltjes(-z)) / 2
        np.testing.assert_allclose(bulk.d_transform(z), phi**2, rtol=1e-10)
        assert bulk.d_transform(bulk.edge) == pytest.approx(
            ((law.stieltjes(bulk.edge) - law.stieltjes(-bulk.edge)) / 2) ** 2, rel=1e-10
        )


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_outliers_of_a_square_of_noise_lie_and_point_where_its_law_says(ratio):
    n = 400
    rng = np.random.default_rng(11)
    bulk = LawBulk(MarchenkoPastur(ratio), (n, n))
    theta = np.array([1.3, 2.0]) * bulk.threshold
    told = bulk.spike(theta)
    for i, strength in some(enumerate(theta)):
        found = []
        for _ in range(12):
            X = rng.standard_normal((n, int(n / ratio))) / math.sqrt(int(n / ratio))
            found.append(outlier(X @ X.T, float(strength), rng))
        location, left, right = np.mean(found, axis=0)
        # the bulk itself moves by O(1/n)
        assert abs(location - told.location[i]) < 4 * told.sd[i] / math.sqrt(12) + 3 / n
        assert left == pytest.approx(told.left_overlap[i], abs=0.05)
        assert right == pytest.approx(told.right_overlap[i], abs=0.05)
    # and below the threshold nothing leaves the bulk
    X = rng.standard_normal((n, int(n / ratio))) / math.sqrt(int(n / ratio))
    assert outlier(X @ X.T, 0.5 * bulk.threshold, rng)[1] < 0.2


@pytest.mark.parametrize("shape", [(300, 450), (450, 300)], ids=str)
def test_outliers_of_a_soft_bulk_of_another_kind(shape):
    """A density that falls like the square of the distance: the threshold exists all the same."""
    rng = np.random.default_rng(12)
    law = Power(3.0)
    bulk = LawBulk(law, shape)
    W0 = diagonal(law.isf((np.arange(300) + 0.5) / 300), shape)
    strength = 2 * bulk.threshold
    told = bulk.spike(strength)
    found = np.array([outlier(W0, strength, rng) for _ in range(20)])
    assert found[:, 0].std() == pytest.approx(told.sd, rel=0.5)
    mean = found.mean(axis=0)
    assert mean[0] == pytest.approx(told.location, abs=told.sd)
    assert mean[1] == pytest.approx(told.left_overlap, abs=0.03)
    assert mean[2] == pytest.approx(told.right_overlap, abs=0.03)


def test_a_density_that_breaks_off_has_no_threshold():
    bulk = LawBulk(Power(1.0), (80, 120))
    assert bulk.threshold == 0
    z = away(1.0)[2:]
    # ∫₀¹ z/(z² − s²) ds = artanh(1/z)
    total = np.arctanh(1 / z)
    np.testing.assert_allclose(bulk.d_transform(z), total * (2 * total + 1 / z) / 3, rtol=1e-9)
    values = (np.arange(80)[::-1] + 0.5) / 80
    one, other = (b.spike([0.3, 1.0]) for b in (bulk, EmpiricalBulk(values, (80, 120))))
    assert one.supercritical.all()
    np.testing.assert_allclose(one.location, other.location, rtol=1e-3)
    assert bulk.spike(0.001).supercritical is False


def test_a_density_falling_by_any_power_is_integrated():
    """At b, where ``∫ b/(b² − s²) dμ`` of ``k(1 − s)^(k−1)`` has a closed form for k = 2, 3."""
    for power, total in ((2.0, 2 * math.log(2)), (3.0, 6 * math.log(2) - 3)):
        bulk = LawBulk(Power(power, 5.0), (30, 30))
        assert bulk.d_transform(5.0) == pytest.approx((total / 5) ** 2, rel=1e-10)


def test_it_answers_in_kind_and_is_taken_by_spike():
    law, shape = SingularValueLaw.of((60, 90)), (60, 90)
    bulk = LawBulk(law, shape)
    theta = torch.tensor([20.0, 1.0], requires_grad=True)
    found = spike(theta, bulk=bulk)
    assert found.location.dtype == torch.float32
    found.location.sum().backward()
    assert theta.grad.tolist() == [pytest.approx(1 - 60 * 90 / 20**4, rel=0.2), 0.0]
    assert (bulk.law, bulk.shape) == (law, shape)


@pytest.mark.parametrize("sigma", [1.0, 1e-3])
def test_of_the_semicircle_a_symmetric_bulk_is_that_of_wigner(sigma):
    size = 100
    bulk, wigner = SymmetricLawBulk(Semicircle(sigma * size**0.5), size), Wigner(size, sigma)
    assert bulk.thresholds == pytest.approx((wigner.threshold,) * 2, rel=1e-10)
    theta = np.array([-40.0, -1.1, -0.5, 0.0, 0.5, 1.001, 2.0]) * wigner.threshold
    one, other = bulk.spike(theta), wigner.spike(theta)
    np.testing.assert_array_equal(one.supercritical, other.supercritical)
    np.testing.assert_allclose(one.location, other.location, rtol=1e-12)
    np.testing.assert_allclose(one.left_overlap, other.left_overlap, rtol=1e-8)
    np.testing.assert_array_equal(one.left_overlap, one.right_overlap)
    np.testing.assert_allclose(one.sd, other.sd, rtol=1e-8)
    outside = one.supercritical
    np.testing.assert_allclose(bulk.strength(one.location[outside]), theta[outside], rtol=1e-10)


def test_outliers_of_a_symmetric_bulk_of_another_law():
    """Both ends of a law that is not even, against matrices."""
    size, rng = 400, np.random.default_rng(13)
    law = MarchenkoPastur(0.5)
    bulk = SymmetricLawBulk(law, size)
    values = law.ppf((np.arange(size) + 0.5) / size)
    for strength in (-2 * bulk.thresholds[0], 2 * bulk.thresholds[1]):
        told = bulk.spike(strength)
        assert told.supercritical
        found = []
        for _ in range(12):
            e = unit(size, rng)
            w, V = np.linalg.eigh(np.diag(values) + strength * np.outer(e, e))
            k = -1 if strength > 0 else 0
            found.append((w[k], (e @ V[:, k]) ** 2))
        location, overlap = np.mean(found, axis=0)
        assert location == pytest.approx(told.location, abs=2 * told.sd)
        assert overlap == pytest.approx(told.left_overlap, abs=0.04)


def test_bad_input_of_a_bulk_of_a_law():
    for law in (Semicircle(), TracyWidom()):
        with pytest.raises(InputError, match=r"expected a law of singular values, got one from -"):
            LawBulk(law, (3, 4))
    with pytest.raises(InputError, match=r"expected a shape \(m, n\) of two sizes ≥ 1, got"):
        LawBulk(Power(2.0), (3, 0))
    with pytest.raises(InputError, match=r"expected a law of mass 1, got 0\.5.*a density that"):
        LawBulk(Kinked(2.0), (3, 4))
    with pytest.raises(InputError, match=r"expected a law on a bounded interval, got one on"):
        SymmetricLawBulk(TracyWidom(), 3)
    with pytest.raises(InputError, match=r"expected a size ≥ 1, got 2\.5; give a whole number"):
        SymmetricLawBulk(Semicircle(), 2.5)
