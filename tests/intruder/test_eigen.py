"""Eigenvectors by parts, against all of them; and the decompositions that are made of them."""

import pytest
import torch
from threadpoolctl import threadpool_info

from bulkedge._linmap import Dense, LowRank, as_map
from bulkedge.intruder import _eigen, judge
from bulkedge.intruder._dense import BaseByGram, BaseBySVD, factor_base, leading_triplets
from bulkedge.intruder._eigen import eigenvectors, leading_eigenvectors
from helpers import some

SHAPES = [(90, 90), (200, 90), (90, 200)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 3, 40, 130])
def test_eigenvectors_are_those_of_torch(n):
    G = draw(n, n)
    G = G @ G.mT
    values, V = (x.flip(-1) for x in torch.linalg.eigh(G))
    found, Y = eigenvectors(G.clone()), draw(n, 3, seed=1)
    torch.testing.assert_close(found.values, values, rtol=1e-12, atol=1e-12 * float(values[0]))
    mine = found.leading(n)
    torch.testing.assert_close(mine * found.values @ mine.mT, G, rtol=0, atol=1e-12 * n**2)
    torch.testing.assert_close(mine.mT @ mine, torch.eye(n).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.coordinates(Y), mine.mT @ Y, rtol=0, atol=1e-12)
    torch.testing.assert_close((mine.mT @ V).abs().diagonal(), torch.ones(n).double())


@pytest.mark.parametrize("count", [1, 7, 40])
def test_leading_eigenvectors_are_the_first_of_all(count):
    G = draw(40, 40)
    G = G @ G.mT
    every = eigenvectors(G.clone())
    values, V = leading_eigenvectors(G.clone(), count)
    torch.testing.assert_close(values, every.values[:count])
    same = (V.mT @ every.leading(count)).abs()
    torch.testing.assert_close(same, torch.eye(count).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_blas_of_scipy_takes_as_many_threads_as_torch(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with _eigen._threads_of_torch():
        seen = [each for each in threadpool_info() if "scipy" in each["filepath"]]
    assert seen
    assert {each["num_threads"] for each in seen} == {threads}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_coordinates_are_those_of_an_svd(shape, side):
    A = draw(*shape)
    found, by_svd = factor_base(Dense(A)), BaseBySVD(*_thin(A))
    assert isinstance(found, BaseByGram)
    Y = draw(shape[side == "right"], 4, seed=1)
    mine, theirs = found.coordinates(Y, side).abs(), by_svd.coordinates(Y, side).abs()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)
    U, sigma, V = found.leading(20)
    torch.testing.assert_close(A @ V, U * sigma, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_triplets_of_a_sum_are_those_of_its_matrix(shape, scale):
    A = draw(*shape).float()
    update = LowRank(scale * draw(shape[0], 2, seed=1), draw(2, shape[1], seed=2), 0.5)
    W0, W = Dense(A).to(torch.float64), Dense(A).to(torch.float64) + update
    found = leading_triplets(W, 5, factor_base(W0))
    expected = torch.linalg.svdvals(W.to_dense())[:5]
    torch.testing.assert_close(found.sigma, expected, rtol=0, atol=1e-14 * float(expected[0]))
    assert float(found.residuals.max()) <= 1e-6 * float(expected[0])


def test_an_update_that_erases_its_base_is_not_read_off_the_base():
    """Its Gram matrix would be a difference of large terms."""
    A = 1e6 * draw(90, 2) @ draw(2, 90, seed=1) + draw(90, 90, seed=2)
    U, S, V = _thin(A)
    W = Dense(A) + LowRank(-U[:, :2] * S[:2], V[:, :2].mT)
    found = leading_triplets(W, 5, factor_base(Dense(A)))
    expected = torch.linalg.svdvals(W.to_dense())[:5]
    torch.testing.assert_close(found.sigma, expected, rtol=1e-6, atol=0)


def test_a_sum_with_another_matrix_is_not_taken_for_one_with_the_base():
    A, other = draw(90, 90), draw(90, 90, seed=5)
    update = LowRank(draw(90, 1, seed=1), draw(1, 90, seed=2))
    found = leading_triplets(Dense(other) + update, 5, factor_base(Dense(A)))
    expected = torch.linalg.svdvals(other + update.to_dense())[:5]
    torch.testing.assert_close(found.sigma, expected)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-120, 1e120, 1e160, 1e300])
def test_numbers_whose_squares_are_none(scale):
    A = draw(90, 70)
    W = A + 40 * draw(90, 1, seed=1) @ draw(1, 70, seed=2)
    found, usual = (judge(Dense(s * A), Dense(s * W), 3, method="dense") for s in (scale, 1.0))
    for mine, same in some(zip(found.directions, usual.directions, strict=True)):
        assert mine.score == pytest.approx(same.score, abs=1e-9)


@pytest.mark.parametrize(
    "sigma",
    [[2.0] * 2 + [1.0] * 78, [*range(79, -1, -1)], [1.0] + [1e-9] * 79],
    ids=["ties", "zero", "small"],
)
def test_what_a_gram_matrix_cannot_tell_apart_goes_to_an_svd(sigma):
    U, V = (torch.linalg.qr(draw(100, 80, seed=s)).Q for s in (1, 2))
    A = U * torch.tensor(sigma, dtype=torch.float64) @ V.mT
    assert isinstance(factor_base(as_map(A)), BaseBySVD)


def _thin(A):
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    return U, S, Vt.mT
