"""The secular equation against LAPACK's SVD of the formed matrix."""

import functools
import itertools
import math
import re

import pytest
import torch
from scipy.optimize import brentq

from bulkedge import ConvergenceError, InputError
from bulkedge.checkpoint import open_adapter, open_checkpoint, read_tensor
from bulkedge.intruder import base_vectors, scores
from bulkedge.triplet import Dense, LowRank, Sum, thin_svd
from bulkedge.update import Cholesky, ConjugateGradients, Secular
from cases import MATRICES, SHAPES, gaussian, generator, orthonormal, with_spectrum
from helpers import EXAMPLE, MINILM, oracle_scores, some

SOLVERS = [Cholesky(), ConjugateGradients()]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def secular(W0, B, A, scale=1.0):
    return Secular.from_svd(*thin_svd(W0), B, A, scale)


def agrees(W0, B, A, scale=1.0, k=None):
    """Values, vectors, residuals and scores of the k leading triplets, each with its oracle."""
    W = W0 + scale * B @ A
    U, S, V = thin_svd(W)
    equation, size = secular(W0, B, A, scale), float(max(S[0], torch.linalg.svdvals(W0)[0]))
    k = k or len(S)
    assert (equation.singular_values(k) - S[:k]).abs().max() <= 1e-12 * size
    rank = int((S[:k] > 1e-10 * size).sum())
    found = equation.triplets(rank)
    assert len(found) == rank
    assert (found.sigma - S[:rank]).abs().max() <= 1e-12 * size
    assert (found.residuals <= 1e-12 * size).all()
    for x in (found.u, found.v):
        torch.testing.assert_close(x.mT @ x, torch.eye(rank).double(), atol=1e-12, rtol=0)
    assert (W @ found.v - found.sigma * found.u).abs().max() <= 1e-12 * size

    below = torch.cat([S[1:], torch.zeros(1).double()])
    above = torch.cat([torch.tensor([math.inf]).double(), S[:-1]])
    apart = torch.minimum(S - below, above - S)[:rank] > 1e-4 * size
    left, right = (
        scores(Y[:, :rank], base_vectors(*base, W0.shape), 2)
        for Y, base in ((U, thin_svd(W0)[:2]), (V, thin_svd(W0)[2:0:-1]))
    )
    assert ((found.left_score - left.score)[apart].abs() <= 1e-10).all()
    assert ((found.right_score - right.score)[apart].abs() <= 1e-10).all()
    cosines = (found.u * U[:, :rank]).sum(dim=0).abs(), (found.v * V[:, :rank]).sum(dim=0).abs()
    for cosine in cosines:
        assert (1 - cosine[apart] <= 1e-10).all()
    assert int(equation.count(2 * size + equation.spikes.sum())) == 0
    return found


def test_count_is_that_of_a_dense_svd_in_1000_random_cases():
    draw, beyond, inside, wide = generator(5), 0, 0, 0
    for case in range(1000):
        m, n = (int(x) for x in torch.randint(1, 13, (2,), generator=draw))
        r = int(torch.randint(1, 6, (1,), generator=draw))
        W0, B, A = (torch.randn(*x, generator=draw).double() for x in ((m, n), (m, r), (r, n)))
        scale = (-1.0) ** case * 10.0 ** float(torch.rand(1, generator=draw) * 3 - 2)
        S, S0 = torch.linalg.svdvals(W0 + scale * B @ A), torch.linalg.svdvals(W0)
        s = torch.rand(6, generator=draw).double() * 1.3 * torch.maximum(S[0], S0[0])
        counts = secular(W0, B, A, scale).count(s)
        assert torch.equal(counts, (s[:, None] < S).sum(dim=1)), (case, m, n, r)
        beyond += int((s > S0[0]).sum())
        inside += int((s < S0[0]).sum())
        wide += r > min(m, n) / 2
    assert min(beyond, inside, wide) > 100  # every kind was there


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES.keys())
def test_agrees_with_a_dense_svd(make, shape):
    m, n = shape
    agrees(make(m, n), 0.2 * normal(m, 3, seed=1), normal(3, n, seed=2), k=min(8, m, n))


@pytest.mark.parametrize("shape", [(11, 8), (8, 11), (9, 9)], ids=str)
def test_every_triplet_of_small_matrices(shape):
    m, n = shape
    for r in (1, 2, 7, 20):
        agrees(gaussian(m, n), normal(m, r, seed=r), normal(r, n, seed=-r), -0.3)


def test_scores_are_the_published_definition():
    W0, B, A = gaussian(40, 25), normal(40, 2, seed=1), normal(2, 25, seed=2)
    found = secular(W0, B, A).triplets(10)
    for score, side in ((found.left_score, "left"), (found.right_score, "right")):
        oracle = oracle_scores(W0, W0 + B @ A, 10, side)
        torch.testing.assert_close(score, oracle, atol=1e-10, rtol=0)
    cosines = (thin_svd(W0)[0].mT @ found.u).abs()
    assert torch.equal(found.left_matched, cosines.argmax(dim=0))


def test_a_truncated_base():
    U, S, V = (x[..., :4] for x in thin_svd(gaussian(12, 9)))
    B, A = normal(12, 2, seed=1), normal(2, 9, seed=2)
    found = Secular.from_svd(U, S, V, B, A).singular_values(9)
    exact = torch.linalg.svdvals((U * S) @ V.mT + B @ A)
    torch.testing.assert_close(found, exact, atol=1e-13, rtol=0)


def test_no_numbers_give_no_counts():
    W0, B, A = gaussian(5, 4), normal(5, 1), normal(1, 4)
    for solver in SOLVERS:
        solved = Secular.from_solves(W0, B, A, solver=solver)
        assert solved.count([]).shape == (0,)
        assert len(solved.triplets(0)) == 0
    assert secular(W0, B, A).count([]).shape == (0,)
    assert secular(W0, B, A).triplets(0).u.shape == (5, 0)


U, S, V = thin_svd(gaussian(20, 14))
ALIGNED = {
    "raises one value": (U[:, 4:5], 3 * V[:, 4:5]),
    "cancels one value": (U[:, 4:5], -S[4] * V[:, 4:5]),
    "reverses one value": (U[:, 4:5], -3 * S[4] * V[:, 4:5]),
    "makes two values equal": (U[:, 4:5], (S[2] - S[4]) * V[:, 4:5]),
    "couples two values": (U[:, 3:4], V[:, 7:8]),
    "lies in the span": (U[:, 2:5] @ normal(3, 2), V[:, 3:8] @ normal(5, 2)),
    "cancels half the base": (U[:, :7] * S[:7], -V[:, :7]),
    "couples weakly": (U[:, 3:4] + 1e-9 * normal(20, 1), V[:, 3:4] + 1e-9 * normal(14, 1)),
    "is zero": (torch.zeros(20, 2).double(), normal(14, 2)),
    "has equal columns": (normal(20, 1).repeat(1, 3), normal(14, 3)),
    "has equal spikes": (orthonormal(20, 3), orthonormal(14, 3, 1)),
    "is tiny": (1e-13 * normal(20, 2), normal(14, 2)),
    "is huge": (1e9 * normal(20, 2), normal(14, 2)),
    "is unbalanced": (1e-9 * normal(20, 2), 1e9 * normal(14, 2)),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_an_update_that(name):
    B, A = ALIGNED[name]
    agrees(gaussian(20, 14), B, A.mT)


@pytest.mark.parametrize("noise", [0, 1e-14, 1e-12, 1e-9, 1e-6])
def test_nearly_equal_base_values(noise):
    """More of them than couple: most values of W are pinned, or nearly so."""
    sigma = torch.where(torch.arange(30) < 5, 2.0, 1.0).double()
    W0 = with_spectrum(40, 30, sigma) + noise * normal(40, 30)
    found = agrees(W0, normal(40, 2, seed=1), normal(2, 30, seed=2))
    assert int(((found.sigma - 1).abs() < 1e-5).sum()) >= 30 - 5 - 2 * 2


def test_an_orthogonal_base_in_single_precision():
    """Values 1e-7 apart all over, hundreds to a coupling direction."""
    agrees(orthonormal(120, 120).float().double(), 0.1 * normal(120, 3), normal(3, 120), k=20)


@functools.cache
def crossings():
    """A base, a direction, and where a value of ``W0 + t·uvᵀ`` passes through one of W0: (i, t)."""
    W0, u, v = gaussian(9, 7), normal(9, 1, seed=1), normal(7, 1, seed=2)
    S0, found = torch.linalg.svdvals(W0), []
    for i in range(7):

        def above(t, i=i):
            return float(torch.linalg.svdvals(W0 + t * u @ v.mT)[i] - S0[i])

        for low, high in itertools.pairwise(0.1 * j for j in range(2, 60)):
            if above(low) * above(high) < 0:
                found.append((i, brentq(above, low, high, xtol=1e-16)))
    return W0, u, v.mT, S0, found


@pytest.mark.parametrize("off", [0.0, 1e-15, 1e-12, 1e-9, 1e-6])
def test_a_value_of_the_tuned_matrix_at_a_value_of_the_base(off):
    """Not pinned, but passing through: there M has a pole and W a value at once."""
    W0, u, vt, S0, found = crossings()
    assert found
    for i, t in some(found):
        agrees(W0, (t + off) * u, vt)
        assert int(secular(W0, (t + off) * u, vt).count(S0[i])) in (i, i + 1)


def test_the_count_is_regular_at_the_values_of_the_base():
    W0, B, A = gaussian(15, 12), normal(15, 2, seed=1), normal(2, 12, seed=2)
    poles, S = thin_svd(W0)[1], torch.linalg.svdvals(W0 + B @ A)
    equation = secular(W0, B, A)
    around = torch.stack([poles, poles * (1 + 1e-15), poles * (1 - 1e-12)])
    assert torch.equal(equation.count(around), (around[..., None] < S).sum(dim=-1))
    with pytest.raises(InputError, match=r"M\(s\) has a pole; count\(\) is regular"):
        equation.matrix(poles[3])


def test_values_interlace():
    W0, B, A = gaussian(30, 20), 3 * normal(30, 2, seed=1), normal(2, 20, seed=2)
    S0, S = torch.linalg.svdvals(W0), secular(W0, B, A).singular_values(20)
    assert (S[2:] <= S0[:-2]).all()
    assert (S[:-2] >= S0[2:]).all()
    assert int(secular(W0, B, A).count(S0[0])) == 2  # at most r, here all


def test_the_matrix_is_singular_at_the_values_and_its_determinant_is_known():
    """``det M(s) = (−1)^r Π (s² − σ_i(W)²)/(s² − σ_i(W0)²)`` for a square base."""
    W0, B, A = gaussian(6, 6), normal(6, 2, seed=1), normal(2, 6, seed=2)
    equation, S0, S = secular(W0, B, A), *(torch.linalg.svdvals(x) for x in (W0, W0 + B @ A))
    s = torch.tensor([[0.37, 1.3], [2.9, 8.0]]).double()
    squares = s.square()[..., None]
    expected = ((squares - S.square()) / (squares - S0.square())).prod(dim=-1)
    assert equation.matrix(s).shape == (2, 2, 4, 4)
    torch.testing.assert_close(torch.linalg.det(equation.matrix(s)), expected)
    torch.testing.assert_close(equation.matrix(0.37), equation.matrix(s)[0, 0])
    eigenvalues = torch.linalg.eigvalsh(equation.matrix(S[:2])).abs()
    assert (eigenvalues.min(dim=1).values < 1e-12 * eigenvalues.max(dim=1).values).all()


def test_rank_one_is_the_scalar_equation():
    """``(1 − θ uᵀG₁₂v)² = θ² (uᵀG₁₁u)(vᵀG₂₂v)`` with resolvents by inversion."""
    W0, u, v, theta = gaussian(8, 5), orthonormal(8, 1, 1), orthonormal(5, 1, 2), 9.0
    (s,) = secular(W0, u, v.mT, theta).outliers(float(torch.linalg.svdvals(W0)[0])).sigma
    G = torch.linalg.inv(s**2 * torch.eye(8) - W0 @ W0.mT)
    G11, G12 = s * (u.mT @ G @ u), u.mT @ G @ W0 @ v
    G22 = s * (v.mT @ torch.linalg.inv(s**2 * torch.eye(5) - W0.mT @ W0) @ v)
    torch.testing.assert_close((1 - theta * G12) ** 2, theta**2 * G11 * G22)


def test_transposing_swaps_the_sides():
    W0, B, A = gaussian(30, 18), normal(30, 2, seed=1), normal(2, 18, seed=2)
    one, other = secular(W0, B, A, -2.0).triplets(5), secular(W0.mT, A.mT, B.mT, -2.0).triplets(5)
    torch.testing.assert_close(one.left_score, other.right_score)
    torch.testing.assert_close(one.u @ one.v.mT, other.v @ other.u.mT)
    assert torch.equal(one.right_matched, other.left_matched)


@pytest.mark.parametrize("size", [1e-120, 1e120])
def test_any_scale(size):
    W0, B, A = gaussian(12, 9), normal(12, 2, seed=1), normal(2, 9, seed=2)
    expected = secular(W0, B, A).triplets(5)
    found = secular(size * W0, size * B, A).triplets(5)
    torch.testing.assert_close(found.sigma / size, expected.sigma)
    torch.testing.assert_close(found.left_score, expected.left_score)


@pytest.mark.parametrize("shape", [(30, 18), (18, 30), (20, 20)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: type(x).__name__)
def test_solves_agree_with_the_svd(shape, solver):
    m, n = shape
    W0, B, A = gaussian(m, n), 3 * normal(m, 3, seed=1), normal(3, n, seed=2)
    known, solved = secular(W0, B, A), Secular.from_solves(W0, B, A, solver=solver)
    norm = float(torch.linalg.svdvals(W0)[0])
    s = torch.linspace(norm * 1.001, norm + float(known.spikes[0]), 7).double()
    assert torch.equal(known.count(s), solved.count(s))
    torch.testing.assert_close(solved.matrix(s), known.matrix(s), atol=1e-9, rtol=1e-9)
    for edge in (norm * 1.001, norm * 1.5):
        one, other = known.outliers(edge), solved.outliers(edge)
        assert len(one) == len(other) > 0
        assert (other.residuals <= 1e-12 * other.sigma[0]).all()
        torch.testing.assert_close(one.sigma, other.sigma, atol=0, rtol=1e-13)
        torch.testing.assert_close(one.u @ one.v.mT, other.u @ other.v.mT, atol=1e-11, rtol=0)
        assert other.left_score is other.right_matched is None
    torch.testing.assert_close(solved.singular_values(2), known.singular_values(2))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: type(x).__name__)
def test_equal_outliers_from_solves(solver):
    """Beyond a zero base, and beyond another, the spikes of equal size give equal values."""
    B, A = orthonormal(12, 3, 1), orthonormal(9, 3, 2).mT
    found = Secular.from_solves(torch.zeros(12, 9), B, A, 2.0, solver=solver).triplets(3)
    torch.testing.assert_close(found.sigma, torch.full((3,), 2.0).double())
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(3).double())
    torch.testing.assert_close(found.u @ found.v.mT, B @ A)


def test_solves_of_a_map_and_of_nothing():
    W0 = gaussian(15, 10).float()
    base = Sum([Dense(W0), LowRank(torch.ones(15, 1), torch.ones(1, 10))])
    B, A = 5 * normal(15, 1, seed=1), normal(1, 10, seed=2)
    found = Secular.from_solves(base, B, A).triplets(1)
    exact = torch.linalg.svdvals(W0.double() + 1 + B @ A)[:1]
    torch.testing.assert_close(found.sigma, exact)
    nothing = Secular.from_solves(W0, 0 * B, A)
    assert nothing.rank == 0
    assert nothing.count([100.0]).tolist() == [0]
    assert len(nothing.outliers(100.0)) == 0
    with pytest.raises(InputError, match=r"expected k ≤ 0, the number of singular values beyond"):
        nothing.singular_values(1)


def test_a_real_adapter():
    name = "encoder.layer.2.attention.self.value.weight"
    base, adapter = open_checkpoint(MINILM), open_adapter(EXAMPLE / "lora-r8")
    (factors,) = (x for key, x in adapter.factors.items() if key.endswith(name))
    W0, B, A = (read_tensor(x).double() for x in (base.tensors[name], factors.B, factors.A))
    found = agrees(W0, B, A, factors.scale, k=10)
    W = W0 + factors.scale * B @ A
    for score, side in ((found.left_score, "left"), (found.right_score, "right")):
        torch.testing.assert_close(score, oracle_scores(W0, W, 10, side), atol=1e-10, rtol=0)
    edge = float(torch.linalg.svdvals(W0)[0]) * 1.0001
    solved = Secular.from_solves(W0, B, A, factors.scale).outliers(edge)
    torch.testing.assert_close(solved.sigma, secular(W0, B, A, factors.scale).outliers(edge).sigma)


X, Y = normal(6, 2), normal(2, 4)
BASE = gaussian(6, 4)
SVD = thin_svd(BASE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Secular.from_svd(*SVD, X.mT, Y), "expected factors B (6, r) and A (r, 4), got"),
        (lambda: Secular.from_svd(*SVD, X, Y.mT), "expected factors B (6, r) and A (r, 4), got"),
        (lambda: Secular.from_svd(SVD[0], SVD[1], SVD[2][:, :3], X, Y), "expected a thin SVD U"),
        (lambda: Secular.from_svd(SVD[0], SVD[1].flip(0), SVD[2], X, Y), "S ≥ 0, descending"),
        (lambda: Secular.from_svd(SVD[0], -SVD[1], SVD[2], X, Y), "S ≥ 0, descending"),
        (lambda: Secular.from_svd(*SVD, X, math.nan * Y), "got NaN or Inf in A"),
        (lambda: Secular.from_svd(*SVD, X.cfloat(), Y), "B to be a real torch tensor, got torch.c"),
        (lambda: Secular.from_svd(*SVD, X, Y, math.inf), "expected a finite number as scale"),
        (lambda: Secular.from_svd(*SVD, X, Y, torch.ones(1)), "expected a finite number as scale"),
        (lambda: secular(BASE, X, Y).count([1.0, 0.0]), "expected positive finite numbers s"),
        (lambda: secular(BASE, X, Y).singular_values(5), "expected 0 ≤ k ≤ 4 for shape (6, 4)"),
        (lambda: secular(0 * BASE, X, Y).triplets(3), "expected k ≤ 2, the rank of W"),
        (lambda: Secular.from_solves(BASE, X, Y).count(0.1), "expected s > σ₁(W0) ="),
        (lambda: Secular.from_solves(BASE, X, Y, norm=-1.0), "expected norm to be σ₁(W0), got -1"),
        (lambda: Secular.from_solves(BASE, X, Y).singular_values(4), "those inside need Secular"),
        (lambda: Secular.from_solves(math.nan * BASE, X, Y), "got NaN or Inf in W0"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: type(x).__name__)
def test_a_norm_that_is_too_small_is_found_out(solver):
    equation = Secular.from_solves(BASE, X, Y, norm=0.1, solver=solver)
    with pytest.raises(InputError, match=r"the norm given is too small"):
        equation.count(0.2)


def test_conjugate_gradients_that_stop_short():
    equation = Secular.from_solves(BASE, X, Y, solver=ConjugateGradients(max_steps=1))
    with pytest.raises(ConvergenceError, match=r"after 1 steps; raise max_steps"):
        equation.count(float(SVD[1][0]) * 1.01)
