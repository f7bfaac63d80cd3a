"""Every solver × every matrix × shape × dtype, against LAPACK in float64."""

import pytest
import torch

from bulkedge._linmap import Dense as DenseMap
from bulkedge._linmap import LowRank
from bulkedge.triplet import (
    BlockKrylov,
    DenseSVD,
    Status,
    resolution,
    singular_triplet,
    thin_svd,
)
from bulkedge.triplet._result import neighbour_gaps
from cases import MATRICES, SHAPES, gaussian

SOLVERS = {
    "block_krylov": BlockKrylov(),
    "narrow": BlockKrylov(oversample=1, width=3),
    "dense": DenseSVD(),
}
RTOL = {torch.float64: 1e-11, torch.float32: 2e-5}


def projector(vectors):
    return vectors @ vectors.mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_leading_triplets(solver, matrix, shape, dtype):
    A = MATRICES[matrix](*shape)
    k = min(4, *shape)
    result = singular_triplet(A.to(dtype), k, solver=SOLVERS[solver])
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    scale = float(S[0]) or 1.0
    u, v, sigma = result.u.double(), result.v.double(), result.sigma.double()

    assert result.status is Status.CONVERGED
    assert result.sigma.dtype == dtype
    torch.testing.assert_close(sigma, S[:k], rtol=0, atol=RTOL[dtype] * scale)
    for vectors in (u, v):
        torch.testing.assert_close(
            vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=RTOL[dtype]
        )
    measured = torch.hypot((A @ v - u * sigma).norm(dim=0), (A.mT @ u - v * sigma).norm(dim=0))
    assert float(measured.max()) <= RTOL[dtype] * scale
    # compare projectors, where the k-space is defined at all
    if k < len(S) and S[k - 1] - S[k] > 1e-2 * scale:
        torch.testing.assert_close(
            projector(u), projector(U[:, :k]), rtol=0, atol=100 * RTOL[dtype]
        )
        torch.testing.assert_close(
            projector(v), projector(Vt[:k].mT), rtol=0, atol=100 * RTOL[dtype]
        )


@pytest.mark.parametrize("shape", [(80, 50), (50, 80)], ids=str)
def test_sum_of_dense_and_low_rank_is_not_formed(shape, monkeypatch):
    m, n = shape
    W0, B, A = gaussian(m, n), gaussian(m, 2), gaussian(2, n)
    expected = torch.linalg.svdvals(W0 + 3 * B @ A)[:5]
    tuned = DenseMap(W0) + LowRank(B, A, 3.0)
    monkeypatch.setattr(LowRank, "to_dense", None)
    torch.testing.assert_close(singular_triplet(tuned, 5).sigma, expected)


def test_vector_errors_bound_the_true_ones():
    A = gaussian(120, 100)
    U, _, Vt = torch.linalg.svd(A)
    result = singular_triplet(A, 6, solver=BlockKrylov(rtol=1e-4))
    for found, true in ((result.u, U[:, :6]), (result.v, Vt[:6].mT)):
        sines = (1 - (found * true).sum(dim=0).square()).clamp_min(0).sqrt()
        assert (sines <= result.vector_errors * 1.01 + 1e-7).all()
    assert float(result.vector_errors.max()) < 0.1  # a bound of 1 would bound everything


def test_coinciding_values_have_no_single_vector():
    result = singular_triplet(torch.eye(20, dtype=torch.float64), 3)
    assert result.vector_errors.tolist() == [1.0, 1.0, 1.0]


def test_passes_count_the_products(monkeypatch):
    products = []
    for name in ("matmat", "rmatmat"):
        original = getattr(DenseMap, name)
        monkeypatch.setattr(
            DenseMap, name, lambda self, X, f=original: products.append(X.shape) or f(self, X)
        )
    result = singular_triplet(gaussian(90, 70), 5)
    assert len(products) == result.passes + 1  # and one to look for NaN
    assert max(shape[1] for shape in products) == 9


def test_warm_cache_of_randomness_is_the_generator_alone():
    A = gaussian(50, 40)
    torch.manual_seed(1)
    first = singular_triplet(A, 3)
    torch.manual_seed(2)
    second = singular_triplet(A, 3)
    assert torch.equal(first.u, second.u)
    other = singular_triplet(A, 3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first.u, other.u)
    torch.testing.assert_close(first.sigma, other.sigma)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thin_svd_gives_the_matrix_back(shape):
    A = gaussian(*shape)
    U, S, V = thin_svd(A)
    assert (U.shape, V.shape) == ((shape[0], min(shape)), (shape[1], min(shape)))
    torch.testing.assert_close((U * S) @ V.mT, A)
    torch.testing.assert_close(S, torch.linalg.svdvals(A))


@pytest.mark.parametrize("solver", SOLVERS)
def test_rank_counts_the_triplets_that_exist(solver):
    result = singular_triplet(MATRICES["rank_deficient"](60, 40), 6, solver=SOLVERS[solver])
    assert result.rank == 3
    assert singular_triplet(torch.zeros(5, 4), 2, solver=SOLVERS[solver]).rank == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("exponent", [-100, -25, 25, 30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scale_of_a_matrix_does_not_matter(solver, exponent, dtype):
    A = gaussian(80, 60).to(dtype)
    factor = 10.0**exponent
    if not 0 < A.abs().min() * factor < torch.inf:
        pytest.skip("not in the range of the dtype")
    plain = singular_triplet(A, 4, solver=SOLVERS[solver])
    scaled = singular_triplet(A * factor, 4, solver=SOLVERS[solver])
    torch.testing.assert_close(scaled.sigma, plain.sigma * factor, rtol=1e-5, atol=0)
    assert float((scaled.gaps / plain.gaps / factor - 1).abs().max()) < 1e-2
    assert float(scaled.vector_errors.max()) < 1e-3


def test_gaps_look_both_ways_and_trust_no_missing_neighbour():
    S = torch.tensor([5.0, 4.0, 3.9, 1.0])
    expected = torch.tensor([1.0, 0.1, 0.1])
    torch.testing.assert_close(neighbour_gaps(S, 3, complete=False), expected)
    assert neighbour_gaps(S, 4, complete=True)[3] == 1.0
    assert neighbour_gaps(S, 4, complete=False)[3] == 0.0
    lonely = singular_triplet(torch.eye(20), 1, solver=BlockKrylov(oversample=0))
    assert lonely.vector_errors.tolist() == [1.0]


def test_resolution_is_that_of_the_longer_side():
    eps = torch.finfo(torch.float64).eps
    assert float(resolution(torch.tensor([2.0], dtype=torch.float64), (3, 50))) == 100 * eps


def test_restarts_cost_few_steps():
    """A basis of 8 blocks, compressed to half, stays within twice the steps of an endless one."""
    A = MATRICES["nearly_degenerate"](400, 400)
    endless = singular_triplet(A, 4, solver=BlockKrylov(width=1000))
    assert singular_triplet(A, 4).steps <= 2 * endless.steps
