"""Every solver × every matrix × shape × dtype, against LAPACK in float64."""

import math

import pytest
import torch

from bulkedge import InputError
from bulkedge._linmap import Dense as DenseMap
from bulkedge._linmap import LowRank
from bulkedge.triplet import (
    BlockKrylov,
    DenseSVD,
    GolubKahan,
    Status,
    resolution,
    singular_triplet,
    thin_svd,
)
from bulkedge.triplet._result import neighbour_gaps
from bulkedge.triplet.solver import (
    Auto,
    GradientAscent,
    Lanczos,
    Newton,
    Power,
    RayleighQuotient,
    Refined,
    Riemannian,
    _deflation,
)
from bulkedge.triplet.solver._deflation import solve_nearly_singular, unit
from cases import MATRICES, SHAPES, gaussian, generator, with_spectrum

SOLVERS = {
    "block_krylov": BlockKrylov(),
    "narrow": BlockKrylov(oversample=1, width=3),
    "golub_kahan": GolubKahan(),
    "short_golub_kahan": GolubKahan(max_steps=2, oversample=2),
    "lanczos": Lanczos(),
    "restarted": Lanczos(width=8),
    "refined": Refined(),
    "auto": Auto(dense_below=4),
    "dense": DenseSVD(),
    "power": Power(),
    "gradient": GradientAscent(max_steps=4000),
    "newton": Newton(),
    "rayleigh": RayleighQuotient(),
    "riemannian": Riemannian(),
}
# first-order methods where σ_i differ by 1e-4: their steps are of the order of 1 / gap, and end at
# the limit, which they must then say (MAX_STEPS); everything else must converge
MAY_STOP = {("power", "nearly_degenerate"), ("gradient", "nearly_degenerate")}
# one vector at a time, and no look at the rest of the spectrum: the last gap is 0
NO_NEIGHBOUR = {"gradient", "riemannian"}
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
    strict = (solver, matrix) not in MAY_STOP
    result = singular_triplet(A.to(dtype), k, solver=SOLVERS[solver], strict=strict)
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    scale = float(S[0]) or 1.0
    u, v, sigma = result.u.double(), result.v.double(), result.sigma.double()

    assert result.sigma.dtype == dtype
    for vectors in (u, v):
        torch.testing.assert_close(
            vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=RTOL[dtype]
        )
    measured = torch.hypot((A @ v - u * sigma).norm(dim=0), (A.mT @ u - v * sigma).norm(dim=0))
    torch.testing.assert_close(
        result.residuals.double(), measured, rtol=1e-2, atol=0.1 * RTOL[dtype] * scale
    )
    if not strict and result.status is Status.MAX_STEPS:
        return  # short of the solver's own tolerance, which is not that of this test
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(sigma, S[:k], rtol=0, atol=RTOL[dtype] * scale)
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
    torch.testing.assert_close(singular_triplet(tuned, 5, solver=BlockKrylov()).sigma, expected)


@pytest.mark.parametrize("power", [-970, -1000, -1010, 900])
def test_vector_errors_of_ties_are_one_at_any_scale(power):
    generator = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(60, 9, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    values = torch.tensor([2.0] * 6 + [1.0, 0.5, 0.1], dtype=torch.float64) * 2.0**power
    found = singular_triplet((U * values) @ V.mT, 5)
    assert found.vector_errors.tolist() == [1.0] * 5


def test_vector_errors_bound_the_true_ones():
    A = gaussian(120, 100)
    U, _, Vt = torch.linalg.svd(A)
    result = singular_triplet(A, 6, solver=BlockKrylov(rtol=1e-4))
    for found, true in ((result.u, U[:, :6]), (result.v, Vt[:6].mT)):
        sines = (1 - (found * true).sum(dim=0).square()).clamp_min(0).sqrt()
        assert (sines <= result.vector_errors * 1.01 + 1e-7).all()
    assert float(result.vector_errors.max()) < 0.1  # a bound of 1 would bound everything


def test_coinciding_values_have_no_single_vector():
    result = singular_triplet(torch.eye(20, dtype=torch.float64), 3, solver=BlockKrylov())
    assert result.vector_errors.tolist() == [1.0, 1.0, 1.0]


def test_passes_count_the_products(monkeypatch):
    products = []
    for name in ("matmat", "rmatmat"):
        original = getattr(DenseMap, name)
        monkeypatch.setattr(
            DenseMap, name, lambda self, X, f=original: products.append(X.shape) or f(self, X)
        )
    result = singular_triplet(gaussian(90, 70), 5, solver=BlockKrylov())
    assert len(products) == result.passes
    assert max(shape[1] for shape in products) == 9


def test_warm_cache_of_randomness_is_the_generator_alone():
    A = gaussian(50, 40)
    torch.manual_seed(1)
    first = singular_triplet(A, 3, solver=BlockKrylov())
    torch.manual_seed(2)
    second = singular_triplet(A, 3, solver=BlockKrylov())
    assert torch.equal(first.u, second.u)
    other = singular_triplet(A, 3, solver=BlockKrylov(), generator=generator(5))
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
    torch.testing.assert_close(scaled.gaps, plain.gaps * factor, rtol=1e-2, atol=0)
    known = slice(-1) if solver in NO_NEIGHBOUR else slice(None)
    assert float(scaled.vector_errors[known].max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("k", [1, 3])
def test_powers_of_two_change_no_digit(k, dtype):
    """Multiplying by one rounds nothing, so that values, vectors and passes must be the same."""
    A = gaussian(500, 400).to(dtype)
    plain = singular_triplet(A, k)
    for exponent in range(-60, 61, 3):
        scaled = singular_triplet(A * 2.0**exponent, k)
        assert scaled.passes == plain.passes, exponent
        assert torch.equal(scaled.sigma, plain.sigma * 2.0**exponent), exponent
        assert torch.equal(scaled.residuals, plain.residuals * 2.0**exponent), exponent
        assert torch.equal(scaled.u, plain.u), exponent
        assert torch.equal(scaled.v, plain.v), exponent


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
    assert singular_triplet(A, 4, solver=BlockKrylov()).steps <= 2 * endless.steps


def solved(solver, A, k=1, start=None, seed=0):
    with torch.no_grad():
        return solver.compute(DenseMap(A), k, start, generator(seed))


METHODS = [Power(), GradientAscent(max_steps=20_000), Newton(), RayleighQuotient(), Riemannian()]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("solver", METHODS, ids=lambda solver: type(solver).__name__)
def test_every_product_is_counted(solver, k, monkeypatch):
    products = []
    for name in ("matmat", "rmatmat"):
        original = getattr(DenseMap, name)
        monkeypatch.setattr(
            DenseMap, name, lambda self, X, f=original: products.append(X.shape) or f(self, X)
        )
    result = solved(solver, gaussian(50, 30), k)
    assert result.status is Status.CONVERGED
    assert len(products) == result.passes


@pytest.mark.parametrize("solver", METHODS, ids=lambda solver: type(solver).__name__)
def test_the_step_limit_is_told(solver):
    A = MATRICES["nearly_degenerate"](60, 60)
    result = solved(type(solver)(rtol=1e-300, max_steps=1), A, 2)
    assert result.status is Status.MAX_STEPS
    assert result.steps <= 2
    measured = torch.hypot(
        (A @ result.v - result.u * result.sigma).norm(dim=0),
        (A.mT @ result.u - result.v * result.sigma).norm(dim=0),
    )
    torch.testing.assert_close(result.residuals, measured, rtol=1e-6, atol=1e-15)
    assert all(torch.isfinite(x).all() for x in (result.sigma, result.u, result.v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("solver", METHODS, ids=lambda solver: type(solver).__name__)
def test_a_start_that_is_the_answer_is_the_answer(solver, k, dtype):
    A = gaussian(40, 30)
    start = torch.linalg.svd(A, full_matrices=False).Vh[:k].mT.to(dtype)
    before = start.clone()
    result = solved(solver, A.to(dtype), k, start)
    assert torch.equal(start, before)
    assert result.status is Status.CONVERGED
    assert result.steps <= 2 * k
    assert result.passes <= (100 * k if isinstance(solver, Riemannian) else 4 + 2 * k)
    torch.testing.assert_close((result.v * start).sum(dim=0).abs(), torch.ones(k, dtype=dtype))


def test_power_on_one_vector_is_the_iteration_of_the_book():
    A, v = gaussian(30, 20), torch.ones(20, 1, dtype=torch.float64)
    result = solved(Power(max_steps=8, oversample=0), A, start=v)
    for _ in range(8):
        u = A @ v / (A @ v).norm()
        v_last, v = v, A.mT @ u / (A.mT @ u).norm()
    torch.testing.assert_close(result.u @ result.v.mT, u @ v_last.mT / v_last.norm())
    assert result.passes == 16


def test_gradient_ascent_shrinks_the_error_at_the_rate_that_it_promises():
    A = with_spectrum(30, 20, torch.tensor([2.0, 1.5] + [0.1] * 18))
    v = torch.linalg.svd(A, full_matrices=False).Vh[0]
    errors = []
    for steps in (40, 60):
        found = solved(GradientAscent(max_steps=steps, step=0.4), A).v[:, 0]
        errors.append(float((found - v * (found @ v)).norm()))
    rate = 1 - 0.4 * (1 - 1.5 / 2.0)
    assert errors[1] / errors[0] == pytest.approx(rate**20, rel=1e-2)


@pytest.mark.parametrize("step", [0.0, -0.1, 0.5, 0.55, float("nan")])
def test_gradient_ascent_refuses_an_unstable_step(step):
    with pytest.raises(InputError, match=r"expected step between 0 and 0\.5 .* got"):
        GradientAscent(step=step)


def residuals(method, A, steps):
    """Relative residual after 0, 1, 2, … steps from the end of a short warm-up."""
    solvers = [method(rtol=1e-15, max_steps=j, warmup=0.5) for j in range(steps)]
    results = [solved(solver, A) for solver in solvers]
    return [float(result.residuals / result.sigma) for result in results]


@pytest.mark.parametrize(("method", "order"), [(Newton, 2), (RayleighQuotient, 3)])
def test_the_order_of_convergence(method, order):
    first, second, third, last = residuals(method, gaussian(40, 30), 4)
    assert 1e-2 < first < 1e-1  # a warm-up that stops early
    observed = math.log(third / second) / math.log(second / first)
    assert order - 0.3 < observed < order + 0.7
    assert last < 1e-14


@pytest.mark.parametrize("method", [Newton, RayleighQuotient])
def test_the_nearest_triplet_is_the_top_one_after_the_warm_up(method):
    """A crowd right below σ₁: far from it, the nearest triplet is any of them."""
    sigma = torch.cat([torch.tensor([1.0]), 1 - 1e-3 * torch.arange(1, 41)])
    for seed in range(10):
        A = with_spectrum(60, 41, sigma, seed)
        torch.testing.assert_close(solved(method(), A, 1, seed=seed).sigma, sigma[:1].double())


@pytest.mark.parametrize("method", [Newton, RayleighQuotient])
def test_singular_systems_do_no_harm(method, monkeypatch):
    """Steps from the exact answer, where the matrix to be solved with is singular."""
    monkeypatch.setattr(_deflation.Goal, "reached", lambda self, pair: False)
    for A in (torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]).double()), torch.eye(4).double()):
        start = torch.eye(4, dtype=torch.float64)[:, :1]
        result = solved(method(), A, start=start)
        assert float(result.residuals) < 1e-14
        assert result.steps == method().max_steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_a_singular_system_has_the_null_vector_for_its_direction(dtype):
    null = torch.linalg.qr(gaussian(8, 1)).Q.to(dtype)
    singular = torch.eye(8, dtype=dtype) - null @ null.mT
    for matrix in (torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=dtype)), singular):
        found = unit(solve_nearly_singular(matrix, torch.ones(len(matrix), 1, dtype=dtype)))
        assert float((matrix @ found).norm()) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", [Newton, RayleighQuotient])
def test_without_a_warm_up_nothing_breaks(method):
    for seed in range(10):
        result = solved(method(warmup=1e9), MATRICES["nearly_degenerate"](40, 30), 3, None, seed)
        assert all(torch.isfinite(x).all() for x in (result.sigma, result.u, result.v))


@pytest.mark.parametrize(
    ("matrix", "dtype"),
    [
        ("gaussian", torch.float64),
        ("gaussian", torch.float32),
        ("spiked", torch.float32),
        ("nearly_degenerate", torch.float64),  # in float32 the saddles hide below the tolerance
    ],
)
@pytest.mark.parametrize("which", ["second", "last", "orthogonal"])
def test_riemannian_leaves_the_saddles(which, matrix, dtype):
    A = MATRICES[matrix](60, 40).to(dtype)
    S, Vt = torch.linalg.svd(A, full_matrices=False)[1:]
    start = {"second": Vt[1:2].mT, "last": Vt[-1:].mT}.get(which)
    if start is None:
        start = gaussian(40, 1).to(dtype)
        start = start - Vt[:1].mT @ (Vt[:1] @ start)
    for seed in range(3):
        result = solved(Riemannian(), A, start=start, seed=seed)
        assert result.status is Status.CONVERGED
        torch.testing.assert_close(result.sigma, S[:1])


def test_riemannian_costs_the_root_of_the_condition():
    """Products of the Hessian a digit: about √(2σ₁ / gap), so 10 times for a 100th of the gap."""
    passes = []
    for gap in (1e-1, 1e-3):
        sigma = torch.cat([torch.tensor([1.0]), torch.linspace(1 - gap, 0, 399)])
        passes.append(solved(Riemannian(), with_spectrum(400, 400, sigma)).passes)
    assert 3 < passes[1] / passes[0] < 10


@pytest.mark.parametrize("solver", METHODS, ids=lambda solver: type(solver).__name__)
def test_deflation_never_forms_the_sum(solver, monkeypatch):
    if not isinstance(solver, (Newton, RayleighQuotient)):  # they are for matrices small enough
        monkeypatch.setattr(LowRank, "to_dense", None)
        monkeypatch.setattr(DenseMap, "to_dense", None)
    W0, B, A = gaussian(50, 30), gaussian(50, 2), gaussian(2, 30)
    with torch.no_grad():
        tuned = DenseMap(W0) + LowRank(B, A, 3.0)
        found = solver.compute(tuned, 4, None, generator()).sigma
    torch.testing.assert_close(found, torch.linalg.svdvals(W0 + 3 * B @ A)[:4])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("gap", [0.0, 1e-8, 1e-6, 1e-4])
def test_refined_values_are_exact_to_float32_at_any_gap(gap, wide):
    sigma = torch.cat(
        [torch.tensor([2.0, 1.5, 1.0, 1.0 - gap]).double(), torch.linspace(0.5, 0, 96)]
    )
    A = with_spectrum(*((100, 300) if wide else (300, 100)), sigma)
    found = singular_triplet(A.float(), 3, solver=Refined())
    true = torch.linalg.svdvals(A.float().double())[:3]
    torch.testing.assert_close(found.sigma.double(), true, rtol=1.2e-7, atol=0)
    assert found.passes < 100


def test_nothing_is_known_of_the_vectors_of_zero():
    for zero in (torch.zeros(40, 30), torch.zeros(3, 40, 30)):
        assert bool((singular_triplet(zero, 2).vector_errors == 1).all())
