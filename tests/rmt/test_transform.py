from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bulkedge._errors import InputError
from bulkedge.rmt import (
    MarchenkoPastur,
    Semicircle,
    WhiteBulk,
    d_transform,
    resolvent_traces,
    stieltjes,
    stieltjes_inversion,
)
from noise import noise_values

POINTS = [4.0, -7.0, 0.5 + 0.2j, -1.0 - 3.0j]
SHAPES = [(5, 8), (8, 5), (6, 6)]


def resolvent_blocks(W, z):
    """The diagonal blocks of ``(z − [[0, W], [Wᵀ, 0]])⁻¹``."""
    m, n = W.shape
    H = np.block([[np.zeros((m, m)), W], [W.T, np.zeros((n, n))]])
    G = np.linalg.inv(z * np.eye(m + n) - H)
    return G[:m, :m], G[m:, m:]


def test_stieltjes_is_a_normalised_trace():
    W = np.random.default_rng(0).standard_normal((7, 7))
    W = W + W.T
    for z in [*POINTS, 20.0]:
        trace = np.trace(np.linalg.inv(z * np.eye(7) - W)) / 7
        assert stieltjes(np.linalg.eigvalsh(W), z) == pytest.approx(trace, rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_traces_are_those_of_the_hermitisation(shape):
    W = np.random.default_rng(1).standard_normal(shape)
    values = np.linalg.svd(W, compute_uv=False)
    for z in [*POINTS, 20.0]:
        left, right = (np.trace(G) / len(G) for G in resolvent_blocks(W, z))
        found = resolvent_traces(values, shape, z)
        assert found == pytest.approx((left, right), rel=1e-9)
        assert d_transform(values, shape, z) == pytest.approx(left * right, rel=1e-9)
        back = resolvent_traces(values, shape[::-1], z)
        assert back == pytest.approx((right, left), rel=1e-9)


def test_the_d_transform_finds_the_outlier_of_an_isotropic_spike():
    # any u, v of equal weight on every base vector make the traces exact, but for the cross term
    shape, rng = (120, 120), np.random.default_rng(2)
    values = noise_values(shape, rng)
    theta = 3 * values[0]
    u = rng.choice([-1.0, 1.0], 120) / math.sqrt(120)
    v = rng.choice([-1.0, 1.0], 120) / math.sqrt(120)
    s = np.linalg.svd(np.diag(values) + theta * np.outer(u, v), compute_uv=False)[0]
    cross = u @ (values * v / (s * s - values**2))
    assert d_transform(values, shape, s) == pytest.approx((1 / theta - cross) ** 2, rel=1e-9)


def test_the_sample_approaches_the_law():
    shape, rng = (300, 600), np.random.default_rng(3)
    values = noise_values(shape, rng)
    z = WhiteBulk(shape).edge * np.array([1.1, 1.5, 3.0])
    np.testing.assert_allclose(d_transform(values, shape, z), WhiteBulk(shape).d_transform(z), 0.01)
    squares = values**2 / 600
    points = np.array([4.0, 6.0, 1.0 + 1.0j])
    np.testing.assert_allclose(
        stieltjes(squares, points), MarchenkoPastur(0.5).stieltjes(points), 0.01
    )


@pytest.mark.parametrize("law", [Semicircle(0.7), MarchenkoPastur(0.5), MarchenkoPastur(1.0)])
def test_inversion_gives_the_density_back(law):
    low, high = law.bulk_support()
    x = np.linspace(low, high, 9)[1:-1]
    found = stieltjes_inversion(law.stieltjes, x, width=1e-8)
    np.testing.assert_allclose(found, law.pdf(x), rtol=1e-6)
    outside = stieltjes_inversion(law.stieltjes, np.array([high + 1.0]), width=1e-8)
    assert abs(outside[0]) < 1e-7


def test_an_atom_is_a_peak_of_its_mass():
    width = 1e-3
    peak = stieltjes_inversion(lambda z: stieltjes([0.0, 0.0, 2.0, 5.0], z), 0.0, width=width)
    assert peak == pytest.approx(0.5 / (math.pi * width), rel=1e-5)
    law = MarchenkoPastur(4.0)
    peak = stieltjes_inversion(law.stieltjes, 0.0, width=width)
    assert peak == pytest.approx(0.75 / (math.pi * width), rel=1e-3)


def test_a_value_is_a_pole():
    assert stieltjes([1.0, 2.0], 2.0) == math.inf
    assert resolvent_traces([1.0, 2.0], (2, 2), 2.0)[0] == math.inf


def test_numbers_arrays_and_tensors_answer_in_kind():
    values, shape = [3.0, 1.0], (2, 3)
    asks = (
        lambda z: stieltjes(values, z),
        lambda z: resolvent_traces(values, shape, z)[0],
        lambda z: resolvent_traces(values, shape, z)[1],
        lambda z: d_transform(values, shape, z),
    )
    for ask in asks:
        assert isinstance(ask(5.0), float)
        assert isinstance(ask(5.0 + 1j), complex)
        assert ask([[5.0, 6.0]]).shape == (1, 2)
        assert ask(np.array([5.0 + 1j])).dtype == np.complex128
    for ask in (asks[0], asks[1], asks[2]):
        for dtype in (torch.float32, torch.float64, torch.complex64):
            found = ask(torch.full((2, 1), 5.0, dtype=dtype))
            assert (found.dtype, found.shape) == (dtype, (2, 1))
    z = torch.full((2, 1), 5.0, dtype=torch.float32)
    assert d_transform(torch.tensor(values), shape, z).dtype == torch.float32
    x = stieltjes_inversion(Semicircle().stieltjes, torch.tensor([0.5]), width=1e-6)
    assert x.dtype == torch.float32
    assert isinstance(stieltjes_inversion(Semicircle().stieltjes, 0.5, width=1e-6), float)


def test_gradients_pass():
    z = torch.tensor([5.0, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: d_transform([3.0, 1.0], (2, 3), z), z)
    assert torch.autograd.gradcheck(lambda z: stieltjes([3.0, 1.0], z), z)


def test_bad_input():
    for values in ([], [[1.0, 2.0]], 3.0):
        with pytest.raises(InputError, match=r"expected one row of eigenvalues, got shape"):
            stieltjes(values, 5.0)
    for ask in (resolvent_traces, d_transform):
        with pytest.raises(InputError, match=r"the 2 singular values of a 2×3 matrix, got \(3,\)"):
            ask([3.0, 2.0, 1.0], (2, 3), 5.0)
        with pytest.raises(InputError, match=r"expected a shape \(m, n\) of two sizes ≥ 1"):
            ask([3.0], (0, 1), 5.0)
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match=r"expected a positive width, got"):
            stieltjes_inversion(Semicircle().stieltjes, 0.0, width=width)
    with pytest.raises(InputError, match=r"expected numbers, got str"):
        stieltjes("ab", 5.0)
