"""Every solver × every matrix × shape × dtype, against LAPACK in float64."""

import pytest
import torch

from bulkedge._linmap import Dense as DenseMap
from bulkedge._linmap import LowRank
from bulkedge.triplet import BlockKrylov, DenseSVD, Status, singular_triplet, thin_svd
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
