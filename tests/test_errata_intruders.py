"""docs/errata-intruders.md, entry by entry: the printed formula fails, the corrected one holds.

The oracles know no theory: random matrices of fixed seeds, dense LAPACK, quadrature, and PEFT.
Where the library has the formula, it is held to the corrected one.
"""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy import integrate, linalg

from bulkedge.intruder import base_vectors, scores
from bulkedge.rmt import (
    MarchenkoPastur,
    QuarterCircle,
    Semicircle,
    SingularValueLaw,
    SpikedSemicircle,
    WhiteBulk,
    Wigner,
    count_outliers,
    d_transform,
    fit_bulk,
    resolvent_traces,
    spike,
    stieltjes,
    strength,
    vector_test,
)
from bulkedge.triplet import thin_svd
from bulkedge.update import (
    Secular,
    budget,
    eigen_perturbation,
    eigenvalue_perturbation,
    predict,
    resolvent_update,
    secular_function,
    singular_perturbation,
)
from helpers import MINILM, some
from noise import outlier, unit

SEED = 0
PAGE = Path(__file__).parents[1] / "docs/errata-intruders.md"


def random():
    return np.random.default_rng(SEED)


def noise(m, n, rng):
    """The paper's W with σ = 1: entries of variance 1/n."""
    return rng.standard_normal((m, n)) / math.sqrt(n)


def wigner(n, rng):
    W = rng.standard_normal((n, n))
    return (W + W.T) / math.sqrt(2 * n)


def orthonormal(rows, columns, rng):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def svdvals(W):
    return np.linalg.svd(W, compute_uv=False)


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]


def distance(values, cdf):
    """Kolmogorov and Smirnov's, between a sample and a law."""
    values = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    below = np.array([cdf(x) for x in values])
    return max(np.abs(steps[1:] - below).max(), np.abs(steps[:-1] - below).max())


def integral(function, low, high):
    return integrate.quad(function, low, high, limit=300)[0]


def semicircle_density(x):
    return math.sqrt(max(4 - x * x, 0)) / (2 * math.pi)


def edges(c):
    return (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2


def marchenko_pastur_density(x, c):
    """As section II prints it, with σ = 1."""
    low, high = edges(c)
    return math.sqrt(max((x - low) * (high - x), 0)) / (2 * math.pi * c * x)


def spiked_density(x, theta):
    """The first term of equation (1)."""
    return math.sqrt(max(4 - x * x, 0)) / (2 * math.pi * (theta**2 + 1 - theta * x))


def printed_stieltjes(z):
    return (z - np.sqrt(z * z - 4)) / 2


# --- laws ----------------------------------------------------------------------------------------


def test_B01_the_semicircle_law_holds():
    values = np.linalg.eigvalsh(wigner(500, random()))
    assert integral(semicircle_density, -2, 2) == pytest.approx(1)

    def cdf(x):
        return integral(semicircle_density, -2, min(max(x, -2), 2))

    assert distance(values[::10], cdf) < 0.03
    assert distance(values, Semicircle().cdf) < 0.01
    assert np.abs(values).max() == pytest.approx(2, rel=0.03)
    assert Semicircle().pdf(0.7) == pytest.approx(semicircle_density(0.7))


@pytest.mark.parametrize("c", [0.5, 2.0, 4.0])
def test_B02_the_marchenko_pastur_law_needs_an_atom_for_tall_matrices(c):
    n = 400
    p = int(c * n)
    X = random().standard_normal((p, n))
    values = np.linalg.eigvalsh(X @ X.T / n)
    mass = integral(lambda x: marchenko_pastur_density(x, c), *edges(c))
    assert mass == pytest.approx(min(1, 1 / c), rel=1e-6)
    assert (values < 1e-9).mean() == pytest.approx(max(1 - 1 / c, 0), abs=1e-9)
    law = MarchenkoPastur(c)
    assert mass + sum(weight for _, weight in law.atoms()) == pytest.approx(1, rel=1e-6)
    positive = values[values > 1e-9]
    # a count of eigenvalues fluctuates by a few
    far = distance(positive, lambda x: 1 - law.sf(x) / min(1, 1 / c))
    assert far < 5 / len(positive)


def test_B03_finite_variance_is_enough_for_the_bulk_and_not_for_the_edge():
    n, rng = 400, random()
    for freedom, breaks in ((3, True), (10, False)):
        sigma = math.sqrt(freedom / (freedom - 2) * n)
        values = [svdvals(rng.standard_t(freedom, (n, n))) / sigma for _ in range(4)]
        for s in values:
            assert distance(s, QuarterCircle().cdf) < 0.05
        over_edge = np.array([s[0] / 2 for s in values])
        # the edge of light-tailed noise of this size fluctuates by 0.01
        assert (over_edge > 1.05).all() == breaks
        assert (over_edge.max() > 1.2) == breaks
        assert (np.abs(over_edge - 1) < 0.03).all() != breaks
        assert any(count_outliers(s)[0] > 0 for s in values) == breaks


# --- the transition as printed -------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.5, 1.5])
def test_B04_the_first_equation_is_the_measure_at_the_spike_not_the_histogram(theta):
    n, rng, bins = 500, random(), np.linspace(-2, 2, 9)
    weights, histogram = [], []
    for _ in range(8):
        e = unit(n, rng)
        values, vectors = np.linalg.eigh(wigner(n, rng) + theta * np.outer(e, e))
        weights.append(np.histogram(values, bins, weights=(e @ vectors) ** 2)[0])
        histogram.append(np.histogram(values, bins)[0] / n)
    weights, histogram = np.mean(weights, axis=0), np.mean(histogram, axis=0)
    pieces = list(pairwise(bins))
    at_spike = [integral(lambda x: spiked_density(x, theta), *piece) for piece in pieces]
    unspiked = [integral(semicircle_density, *piece) for piece in pieces]
    np.testing.assert_allclose(weights, at_spike, atol=0.02)
    np.testing.assert_allclose(histogram, unspiked, atol=0.01)
    assert np.abs(weights - unspiked).max() > 0.04
    assert weights[:4].sum() > 0.1  # below zero, where Marchenko–Pastur has nothing
    assert SpikedSemicircle(theta).pdf(0.3) == pytest.approx(spiked_density(0.3, theta))


def test_B05_the_threshold_of_a_symmetric_spike_is_sigma():
    printed = math.sqrt(edges(1.0)[1])
    for theta in (0.5, 1.5, 2.5):
        bulk = integral(lambda x, theta=theta: spiked_density(x, theta), -2, 2)
        atom = 1 - 1 / theta**2
        assert bulk + (theta > 1) * atom == pytest.approx(1)
        loses = 1 < theta < printed
        assert (bulk + (theta >= printed) * atom == pytest.approx(1)) != loses
        law = SpikedSemicircle(theta)
        assert (law.cdf(10.0), len(law.atoms())) == (pytest.approx(1), int(theta > 1))
    assert integral(lambda x: spiked_density(x, 1.5), -2, 2) == pytest.approx(0.444, abs=1e-3)
    n, rng, top = 500, random(), []
    for _ in range(6):
        e = unit(n, rng)
        top.append(np.linalg.eigvalsh(wigner(n, rng) + 1.5 * np.outer(e, e))[-1])
    expected = Wigner(n, 1 / math.sqrt(n)).spike(1.5)
    assert expected.supercritical
    assert expected.location == pytest.approx(1.5 + 1 / 1.5)
    assert np.mean(top) == pytest.approx(expected.location, abs=3 * expected.sd / math.sqrt(6))
    assert min(top) > 2.03


def test_B05_the_printed_threshold_is_that_of_a_population_covariance():
    p, n, rng = 300, 1200, random()
    c = p / n
    top = {}
    for h in (1.2, 2.5):
        X = rng.standard_normal((p, n))
        X[0] *= math.sqrt(h)
        top[h] = svdvals(X)[0] ** 2 / n
    assert 1.2 < math.sqrt(edges(c)[1]) < 2.5
    assert top[1.2] == pytest.approx(edges(c)[1], rel=0.03)
    assert top[2.5] == pytest.approx(2.5 * (1 + c / 1.5), rel=0.1)


def test_B06_squared_singular_values_follow_marchenko_pastur():
    rng = random()
    W = noise(500, 500, rng)
    s = svdvals(W)
    law = MarchenkoPastur(1.0)
    assert distance(s, law.cdf) > 0.15
    assert distance(s**2, law.cdf) < 0.01
    assert distance(s, QuarterCircle().cdf) < 0.01
    assert QuarterCircle().pdf(0.7) == pytest.approx(math.sqrt(4 - 0.49) / math.pi)
    assert distance(np.linalg.eigvalsh(wigner(500, rng)), law.cdf) > 0.4
    modulus = np.abs(np.linalg.eigvals(W[:300, :300] * math.sqrt(500 / 300)))
    assert modulus.max() < 1.1
    assert (modulus < 0.5).mean() == pytest.approx(0.25, abs=0.04)  # a disc, evenly filled
    wide = svdvals(noise(200, 800, rng))
    assert distance(wide, SingularValueLaw(0.25).cdf) < 0.02


@pytest.mark.parametrize(("c", "total"), [(0.25, 0.25), (1.0, 1.0), (4.0, 1.75)])
def test_B07_the_second_equation_lost_a_factor_c(c, total):
    m, n = (200, 800) if c < 1 else (800, 200) if c > 1 else (400, 400)

    def printed(x):
        return c * marchenko_pastur_density(x, c)

    atom = max(1 - 1 / c, 0)
    low, high = edges(c)
    assert integral(printed, low, high) + atom == pytest.approx(total, rel=1e-6)
    # it is the density of the n×n companion, with the companion's atom
    assert integral(printed, low, high) + max(1 - c, 0) == pytest.approx(1, rel=1e-6)
    law = MarchenkoPastur(c)
    assert integral(law.pdf, low, high) + atom == pytest.approx(1, rel=1e-6)
    values = np.linalg.eigvalsh((W := noise(m, n, random())) @ W.T)
    middle = (low + high) / 2
    share = ((values > middle) & (values < 1.1 * high)).mean()
    assert share == pytest.approx(integral(law.pdf, middle, high), abs=0.02)
    assert (share == pytest.approx(integral(printed, middle, high), abs=0.02)) == (c == 1)


# --- full fine-tuning ----------------------------------------------------------------------------


def test_B08_eigenvalues_of_other_matrices_need_left_vectors():
    rng, n, h = random(), 8, 1e-5
    D = rng.standard_normal((n, n))

    def slope(values, A, D):
        return (values(A + h * D) - values(A - h * D)) / (2 * h)

    def top_value(A):
        return np.linalg.eigvals(A).real.max()

    symmetric, direction = wigner(n, rng), D + D.T
    v = np.linalg.eigh(symmetric)[1][:, -1]
    rise = slope(lambda A: np.linalg.eigvalsh(A)[-1], symmetric, direction)
    assert v @ direction @ v == pytest.approx(rise, rel=1e-6)
    found = eigen_perturbation(*tensors(symmetric, direction))
    assert float(found.value1) == pytest.approx(rise, rel=1e-6)

    X = rng.standard_normal((n, n))
    W = X @ np.diag(np.arange(n, 0, -1.0)) @ np.linalg.inv(X)
    _, Y, X = linalg.eig(W, left=True, right=True)
    k = int(np.linalg.eigvals(W).real.argmax())
    x, y, rise = X[:, k].real, Y[:, k].real, slope(top_value, W, D)
    assert y @ D @ x / (y @ x) == pytest.approx(rise, rel=1e-4)
    assert abs(x @ D @ x - rise) > 0.1 * abs(rise)
    assert float(eigenvalue_perturbation(*tensors(W, D))[1][0].real) == pytest.approx(
        rise, rel=1e-4
    )

    A, E = noise(6, 9, rng), rng.standard_normal((6, 9))
    rise = slope(lambda A: svdvals(A)[0], A, E)
    U, _, Vh = np.linalg.svd(A, full_matrices=False)
    assert U[:, 0] @ E @ Vh[0] == pytest.approx(rise, abs=1e-6)
    assert float(singular_perturbation(*tensors(A, E)).sigma1) == pytest.approx(rise, abs=1e-6)


def test_B09_small_and_dense_does_not_mean_a_small_rotation():
    rng, epsilon = random(), 0.1

    def kept(n, epsilon):
        """Mean cosine of old and new vectors in mid-bulk, and that of an outlier."""
        W = noise(n, n, rng) + 3 * np.outer(unit(n, rng), unit(n, rng))
        D = noise(n, n, rng)
        before, after = (np.linalg.svd(A)[0] for A in (W, W + epsilon * D))
        cosines = np.abs((before * after).sum(0))
        expansion = [singular_perturbation(*tensors(W, D), k, order=1) for k in (0, n // 2)]
        turns = [epsilon * float(found.u1.norm()) for found in expansion]
        return cosines[n // 4 : 3 * n // 4].mean(), cosines[0], turns

    middle = {n: kept(n, epsilon) for n in (150, 300, 600)}
    assert middle[150][0] > middle[300][0] > middle[600][0]
    assert middle[600][0] < 0.3
    for cosine_middle, cosine_top, turns in some(middle.values()):
        assert cosine_top > 0.99
        assert turns[0] < 0.1
        assert cosine_middle < 0.75
    assert middle[600][2][1] > 0.5  # first order itself says that it cannot be trusted
    assert kept(600, 0.1 / math.sqrt(600))[0] > 0.9  # below the spacing vectors do stay


# --- the resolvent -------------------------------------------------------------------------------


def test_B10_the_resolvent_and_its_trace_are_right_for_symmetric_matrices():
    rng = random()
    W = wigner(300, rng)
    for z in (2.5, -3.0, 0.5 + 0.5j):
        trace = np.trace(np.linalg.inv(z * np.eye(300) - W)) / 300
        assert stieltjes(np.linalg.eigvalsh(W), z) == pytest.approx(trace)
        assert Semicircle().stieltjes(z) == pytest.approx(trace, abs=0.01)
    assert 1e6 * Semicircle().stieltjes(1e6) == pytest.approx(1)  # m(z) ~ +1/z
    A, z = noise(20, 30, rng), 2.7
    H = np.block([[np.zeros((20, 20)), A], [A.T, np.zeros((30, 30))]])
    G = np.linalg.inv(z * np.eye(50) - H)
    traces = np.trace(G[:20, :20]) / 20, np.trace(G[20:, 20:]) / 30
    assert resolvent_traces(svdvals(A), (20, 30), z) == pytest.approx(traces)
    assert d_transform(svdvals(A), (20, 30), z) == pytest.approx(traces[0] * traces[1])


def rank_one(n, rng):
    """W, u, v, θ, and the outlying eigenvalue of W + θuvᵀ."""
    W, u = noise(n, n, rng), unit(n, rng)
    v = 0.8 * u + 0.6 * unit(n, rng)
    v, theta = v / np.linalg.norm(v), 4.0
    values = np.linalg.eigvals(W + theta * np.outer(u, v))
    return W, u, v, theta, values[np.abs(values).argmax()].real


def test_B11_sherman_morrison_has_both_signs_wrong():
    W, u, v, theta, _ = rank_one(30, random())
    for z in (2.5, 0.3 + 0.7j):
        G = np.linalg.inv(z * np.eye(30) - W)
        right = np.linalg.inv(z * np.eye(30) - W - theta * np.outer(u, v))
        outer, inner = theta * np.outer(G @ u, v @ G), theta * (v @ G @ u)

        def error(G_M, right=right):
            return np.linalg.norm(G_M - right) / np.linalg.norm(right)

        assert error(G + outer / (1 - inner)) < 1e-12
        for wrong in (
            G - outer / (1 + inner),  # as printed
            G + outer / (1 + inner),
            G - outer / (1 - inner),
        ):
            assert error(wrong) > 0.1
        found = resolvent_update(*tensors(G, u, v), theta)
        assert error(found.numpy()) < 1e-12


def test_B12_the_secular_equation_has_a_minus():
    W, u, v, theta, z = rank_one(60, random())
    G = np.linalg.inv(z * np.eye(60) - W)
    assert abs(1 - theta * (v @ G @ u)) < 1e-10
    assert 1 + theta * (v @ G @ u) == pytest.approx(2)
    assert abs(float(secular_function(*tensors(G, u, v), theta))) < 1e-10


def test_B13_the_bilinear_form_carries_the_cosine_of_u_and_v():
    n, rng, z = 500, random(), 2.5
    G = np.linalg.inv(z * np.eye(n) - wigner(n, rng))
    m = Semicircle().stieltjes(z)
    u, other = orthonormal(n, 2, rng).T
    for cosine in (0.0, 0.5, 1.0):
        v = cosine * u + math.sqrt(1 - cosine**2) * other
        # three of its standard deviations, √((1 + cos²)·0.083/n) and less
        assert v @ G @ u == pytest.approx(cosine * m, abs=0.055)
    W, theta = noise(n, n, rng), 2.5
    for cosine, outlying in ((0.0, 1.0), (0.8, 2.0)):
        v = cosine * u + math.sqrt(1 - cosine**2) * other
        M = W + theta * np.outer(u, v)
        assert np.abs(np.linalg.eigvals(M)).max() == pytest.approx(outlying, abs=0.12)
        # the singular value does not care
        expected = WhiteBulk((n, n), 1 / math.sqrt(n)).spike(theta)
        assert svdvals(M)[0] == pytest.approx(expected.location, abs=4 * expected.sd)


def test_B14_the_outlier_solves_theta_m_equal_to_plus_one():
    n, rng, theta = 500, random(), 2.0
    e = unit(n, rng)
    top = np.linalg.eigvalsh(wigner(n, rng) + theta * np.outer(e, e))[-1]
    law = Semicircle()
    assert theta * law.stieltjes(top) == pytest.approx(1, abs=0.1)
    assert law.inverse_stieltjes(1 / theta) == pytest.approx(theta + 1 / theta)
    z = np.linspace(2, 50, 500)
    assert (1 + theta * printed_stieltjes(z)).min() > 1  # no root at all
    squared = -theta - 1 / theta  # what squaring the printed equation gives
    assert 1 + theta * printed_stieltjes(squared) == pytest.approx(-3)
    assert Wigner(n, 1 / math.sqrt(n)).spike(-theta).location == pytest.approx(squared)


@pytest.mark.parametrize(("c", "z"), [(1.0, 5.0), (0.25, 3.0)])
def test_B15_the_printed_transform_is_that_of_the_semicircle(c, z):
    right = integral(lambda x: marchenko_pastur_density(x, c) / (z - x), *edges(c))
    closed = (z - 1 + c - math.sqrt((z - 1 - c) ** 2 - 4 * c)) / (2 * c * z)
    assert closed == pytest.approx(right, rel=1e-6)
    assert MarchenkoPastur(c).stieltjes(z) == pytest.approx(right, rel=1e-6)
    W = noise(int(400 * c), 400, random())
    assert stieltjes(svdvals(W) ** 2, z) == pytest.approx(right, rel=0.01)
    assert abs(printed_stieltjes(z) / right - 1) > 0.1
    semicircle = integral(lambda x: semicircle_density(x) / (z - x), -2, 2)
    assert printed_stieltjes(z) == pytest.approx(semicircle)
    assert Semicircle().stieltjes(z) == pytest.approx(semicircle)


# --- outliers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1.7, -2.5])
def test_B16_theta_plus_sigma_squared_over_theta(theta):
    n, rng, draws = 300, random(), 12
    symmetric, square = [], []
    for _ in range(draws):
        e = unit(n, rng)
        values = np.linalg.eigvalsh(wigner(n, rng) + theta * np.outer(e, e))
        symmetric.append(values[-1 if theta > 0 else 0])
        square.append(outlier(noise(n, n, rng), abs(theta), rng)[0])
    printed = theta + 1 / theta
    options = {"shape": (n, n), "sigma": 1 / math.sqrt(n)}
    for found, expected in (
        (symmetric, spike(theta, symmetric=True, **options)),
        (square, spike(abs(theta), **options)),
    ):
        assert abs(expected.location) == pytest.approx(abs(printed))
        error = 3 * expected.sd / math.sqrt(draws) + 0.01
        assert abs(np.mean(found)) == pytest.approx(abs(printed), abs=error)


@pytest.mark.parametrize(
    ("shape", "theta"), [((400, 400), 1.5), ((200, 800), 1.0), ((800, 200), 2.0)], ids=str
)
def test_B17_spikes_below_the_printed_threshold_do_separate(shape, theta):
    m, n = shape
    c, rng = m / n, random()
    assert theta < math.sqrt(edges(c)[1])
    bulk = WhiteBulk(shape, 1 / math.sqrt(n))
    assert bulk.threshold == pytest.approx(c**0.25)
    expected = bulk.spike(theta)
    assert expected.supercritical
    draws = np.array([outlier(noise(m, n, rng), theta, rng) for _ in range(5)])
    assert draws[:, 0].mean() > 1.03 * bulk.edge
    assert draws[:, 1].mean() == pytest.approx(expected.left_overlap, abs=0.08)
    assert draws[:, 1].mean() > 0.3


@pytest.mark.parametrize(("shape", "theta"), [((200, 800), 2**0.5), ((800, 200), 8**0.5)], ids=str)
def test_B18_the_location_depends_on_the_shape(shape, theta):
    m, n = shape
    c, rng, draws = m / n, random(), 8
    found = np.array([outlier(noise(m, n, rng), theta, rng) for _ in range(draws)]).mean(0)
    right = math.sqrt((1 + theta**2) * (c + theta**2)) / theta
    expected = spike(theta, shape=shape, sigma=1 / math.sqrt(n))
    assert expected.location == pytest.approx(right)
    assert strength(right, shape=shape, sigma=1 / math.sqrt(n)) == pytest.approx(theta)
    assert found[0] == pytest.approx(right, abs=3 * expected.sd / math.sqrt(draws))
    assert abs(theta + 1 / theta - found[0]) > 0.1 * found[0]
    left = 1 - c * (1 + theta**2) / (theta**2 * (theta**2 + c))
    side = 1 - (c + theta**2) / (theta**2 * (theta**2 + 1))
    assert (expected.left_overlap, expected.right_overlap) == pytest.approx((left, side))
    assert found[1:] == pytest.approx([left, side], abs=0.04)


def test_B19_spikes_need_not_be_separated_and_are_not_the_factors_norms():
    n, rng = 400, random()
    P, Q = orthonormal(n, 3, rng), orthonormal(n, 3, rng)
    gamma = np.array([3.0, 2.0, 2.0])
    W0 = noise(n, n, rng)
    U, S, _ = np.linalg.svd(W0 + (P * gamma) @ Q.T)
    expected = spike(gamma, shape=(n, n), sigma=1 / math.sqrt(n))
    assert (np.abs(S[:3] - expected.location) < 4 * expected.sd).all()
    assert S[3] < 2.02
    # the two equal ones share their plane: its overlap is sharp, that of a single pair is not
    plane = np.linalg.norm(P[:, 1:].T @ U[:, 1:3]) ** 2 / 2
    assert plane == pytest.approx(expected.left_overlap[1], abs=0.06)

    B, A = rng.standard_normal((n, 3)) @ np.diag([1.0, 5.0, 2.0]), rng.standard_normal((n, 3))
    A += A[:, :1]  # columns that are not orthogonal
    gamma = svdvals(B @ A.T)[:3]
    norms = np.sort(np.linalg.norm(B, axis=0) * np.linalg.norm(A, axis=0))[::-1]
    assert np.abs(norms / gamma - 1).max() > 0.1
    by_qr = svdvals(np.linalg.qr(B)[1] @ np.linalg.qr(A)[1].T)
    np.testing.assert_allclose(by_qr, gamma)
    W, b, a = tensors(W0, B, A.T)
    np.testing.assert_allclose(predict(W, b, a).theta, gamma)
    np.testing.assert_allclose(Secular.from_svd(*thin_svd(W), b, a).spikes, gamma)


# --- mitigation ----------------------------------------------------------------------------------


def test_B20_rank_stabilised_means_alpha_over_the_root_of_r():
    from peft import LoraConfig, get_peft_model

    alpha, r = 6, 9
    scale = {}
    for rslora in (False, True):
        config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 12)), config)
        scale[rslora] = model.base_model.model[0].scaling["default"]
    assert scale == pytest.approx({False: alpha / r, True: alpha / math.sqrt(r)})

    # with orthonormal factors all spikes are the scale itself, and the larger scale makes outliers
    n, rng = 300, random()
    W0 = noise(n, n, rng)
    B, A = orthonormal(n, r, rng), orthonormal(n, r, rng)
    counts = {}
    for rslora, s in some(scale.items()):
        np.testing.assert_allclose(svdvals(s * B @ A.T)[:r], s)
        counts[rslora] = int((svdvals(W0 + s * B @ A.T) > 1.05 * 2).sum())
    assert counts == {False: 0, True: r}
    allowed = budget(torch.from_numpy(W0), rank=r, alpha=alpha)
    assert allowed.lora > 1 > allowed.rslora  # ‖BAᵀ‖₂ is 1
    assert allowed.lora == pytest.approx(r / alpha, rel=0.05)
    assert allowed.rslora == pytest.approx(math.sqrt(r) / alpha, rel=0.05)

    # what the root is for: with independent factors the size of the output does not follow r
    x = rng.standard_normal(n)
    rms = {
        r: np.sqrt(np.mean((rng.standard_normal((n, r)) @ (rng.standard_normal((r, n)) @ x)) ** 2))
        for r in (4, 16, 64, 256)
    }
    by_root = np.array([value / math.sqrt(r) for r, value in rms.items()])
    assert by_root.max() / by_root.min() < 2
    assert rms[4] / 4 > 4 * rms[256] / 256


def adapters(r=4, m=40, n=30):
    rng = random()
    U, V = orthonormal(m, n, rng), orthonormal(n, n, rng)
    S = np.linspace(3, 0.5, n)
    return rng, U, S, V, r


def test_B21_the_additive_adapter_is_a_concatenation_of_rank_2r():
    rng, U, S, V, r = adapters()
    A_U, A_V = 0.3 * rng.standard_normal((40, r)), 0.3 * rng.standard_normal((30, r))
    left, right = U[:, :r] + A_U, V[:, :r] + A_V
    with pytest.raises(ValueError, match="mismatch in its core dimension"):
        left @ U[:, r:]
    tuned = (np.hstack([left, U[:, r:]]) * S) @ np.hstack([right, V[:, r:]]).T
    update = tuned - (U * S) @ V.T
    np.testing.assert_allclose(update, (left * S[:r]) @ right.T - (U[:, :r] * S[:r]) @ V[:, :r].T)
    assert np.linalg.matrix_rank(update) == 2 * r


def rotational(r=8):
    """Base vectors, base values, the tuned matrix."""
    rng, U, S, V, r = adapters(r)
    R_U, R_V = orthonormal(r, r, rng), orthonormal(r, r, rng)
    left, right = (np.hstack([X[:, :r] @ R, X[:, r:]]) for X, R in ((U, R_U), (V, R_V)))
    return U, S, V, (left * S) @ right.T


def test_B22_the_rotational_adapter_keeps_the_singular_values():
    U, S, V, tuned = rotational(r=8)
    np.testing.assert_allclose(svdvals(tuned), S, rtol=1e-12)
    assert np.linalg.matrix_rank(tuned - (U * S) @ V.T) <= 8
    top = np.linalg.svd(tuned)[0][:, :8]
    np.testing.assert_allclose(np.linalg.norm(U[:, :8].T @ top, axis=0), 1, rtol=1e-12)
    with pytest.raises(ValueError, match="mismatch in its core dimension"):
        U[:, :8] @ U[:, 8:]


def test_B23_rotated_vectors_look_new_to_the_score_and_added_ones_move_values():
    U, S, V, tuned = rotational(r=8)
    new = np.linalg.svd(tuned)[0][:, :8]
    vectors, values, top = tensors(U, S, new)
    found = scores(top, base_vectors(vectors, values, (40, 30)), subspace=8)
    assert float(found.score.min()) < 0.75
    torch.testing.assert_close(found.subspace_overlap, torch.ones(8, dtype=torch.float64))
    rng, r = random(), 8
    left, right = (X[:, :r] + 0.1 * rng.standard_normal((len(X), r)) for X in (U, V))
    added = (np.hstack([left, U[:, r:]]) * S) @ np.hstack([right, V[:, r:]]).T
    assert svdvals(added)[0] > 1.03 * S[0]


def test_B24_more_rank_helps_beyond_the_square_of_the_norm_only():
    n, rng, norm = 300, random(), 3.0
    W0 = noise(n, n, rng)
    outliers, within = {}, {}
    for r in (4, 16):
        P, Q = orthonormal(n, r, rng), orthonormal(n, r, rng)
        outliers[r] = int((svdvals(W0 + norm / math.sqrt(r) * P @ Q.T) > 1.03 * 2).sum())
        within[r] = budget(torch.from_numpy(W0), rank=r).spread > norm
    assert outliers == {4: 4, 16: 0}  # (F/θ_c)² is 9
    assert within == {4: False, 16: True}
    # unequal spikes: rank 16 by name, less in effect
    update = rng.standard_normal((n, 16)) * 0.5 ** np.arange(16) @ rng.standard_normal((16, n))
    update *= norm / np.linalg.norm(update)
    assert svdvals(W0 + update)[0] > 1.03 * 2


def test_B25_the_model_holds_and_lacks_the_scale():
    rng, (m, n), r, alpha = random(), (150, 240), 6, 18
    W0 = noise(m, n, rng)
    low, high = (math.sqrt(x) for x in edges(m / n))
    s = svdvals(W0)
    assert (s[-1], s[0]) == pytest.approx((low, high), abs=0.08)
    fit = fit_bulk(s, (m, n))
    assert fit.white
    assert fit.edge == pytest.approx(high, rel=0.02)
    B, A = 0.15 * rng.standard_normal((m, r)), 0.15 * rng.standard_normal((r, n))
    W, b, a = tensors(W0, B, A)
    secular = Secular.from_svd(*thin_svd(W), b, a, scale=alpha / r)
    np.testing.assert_allclose(secular.singular_values(r), svdvals(W0 + alpha / r * B @ A)[:r])
    assert np.abs(svdvals(W0 + B @ A)[:r] / svdvals(W0 + alpha / r * B @ A)[:r] - 1).max() > 0.3


# --- the page ------------------------------------------------------------------------------------


def test_B26_the_references_are_given_in_full():
    page = " ".join(PAGE.read_text().split())
    assert "Benaych-Georges and Nadakuditi, arXiv:1103.2221" in page
    assert "Hu, E. J., arXiv:2106.09685" in page
    # the library cites the same theorem by the same number
    assert "Benaych-Georges and Nadakuditi, arXiv:1103.2221" in WhiteBulk.__doc__


def test_B27_a_trained_matrix_repels_as_noise_and_is_none():
    name = "encoder.layer.0.attention.self.key.weight"
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        W = file.get_tensor(name).double()
    U, S, _ = torch.linalg.svd(W)
    found = fit_bulk(S, tuple(W.shape))
    assert found.misfit > 5 * found.misfit_limit
    assert found.repulsion.p_value > 0.05
    odd = [int((vector_test(U[:, i : i + 10]).p_value < 0.01).sum()) for i in (0, 187, 374)]
    assert odd[0] >= 8
    assert odd[1] <= 2
    assert odd[2] >= 6


def test_the_page_names_every_test_and_only_tests_that_exist():
    page = PAGE.read_text()
    named = set(re.findall(r"tests/test_errata_intruders\.py::(test_\w+)", page))
    defined = {name for name in globals() if name.startswith("test_")}
    assert named <= defined, named - defined
    entries = {name for name in defined if re.match(r"test_B\d\d_", name)}
    assert entries <= named, entries - named
    assert {name[6:8] for name in entries} == {f"{i:02}" for i in range(1, 28)}
    assert re.findall(r"^\*\*B(\d\d?),", page, re.MULTILINE) == [str(i) for i in range(1, 28)]
    first = (PAGE.parent / "errata.md").read_text()
    assert f"]({PAGE.name})" in first
