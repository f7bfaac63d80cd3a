"""The recurrences hold to the noise that is measured, whatever the spectrum and the entries."""

import pytest
import torch

from bulkedge._linmap import Dense
from bulkedge.triplet import Bidiagonalization, GolubKahan, singular_triplet
from bulkedge.triplet._result import Status
from bulkedge.triplet._rounding import (
    ROUNDING_PROBES,
    measure_residuals,
    measure_rounding,
    norm_above,
    safety_factor,
)
from bulkedge.triplet.solver.golub_kahan import _gaps
from cases import gaussian, orthonormal

WIDE = torch.float64
SPECTRA = {
    "noise": None,
    "graded": torch.logspace(0, -8, 80, dtype=WIDE),
    "rank_one": torch.eye(80, dtype=WIDE)[0],
    "clustered": torch.tensor([1.0, 0.1, 1e-4, 1e-5], dtype=WIDE).repeat_interleave(20),
    "flat": torch.ones(80, dtype=WIDE),
    "at_the_noise": torch.cat([torch.ones(1), torch.linspace(1e-6, 1e-8, 79)]).to(WIDE),
    "outliers": torch.cat([torch.tensor([1e3, 1e2, 10.0]), torch.linspace(1, 0.1, 77)]).to(WIDE),
}
ENTRIES = {
    "constant": lambda m, n: torch.full((m, n), 1.1767964, dtype=WIDE),
    "one_signed": lambda m, n: gaussian(m, n).abs(),
    "nearly_equal_columns": lambda m, n: 1.0 + 1e-3 * gaussian(m, n),
    "integers": lambda m, n: gaussian(m, n).mul(3).round() + 2,
    "scaled_rows": lambda m, n: gaussian(m, n) * torch.logspace(0, -6, m, dtype=WIDE)[:, None],
}
SHAPES = [(100, 80), (80, 100), (80, 80)]


def matrix(kind, m, n):
    if kind in ENTRIES:
        return ENTRIES[kind](m, n)
    if SPECTRA[kind] is None:
        return gaussian(m, n)
    return (orthonormal(m, 80, 5) * SPECTRA[kind]) @ orthonormal(n, 80, 6).mT


def grown(W0, start, steps):
    noise = 4 * torch.finfo(W0.dtype).eps * float(torch.linalg.vector_norm(W0))
    process = Bidiagonalization(Dense(W0), start.to(W0.dtype), noise)
    while not process.closed and process.passes < 2 * steps:
        process.extend()
    return process


def measured(process, W0, seed=0):
    count = process.left.shape[1] + process.right.shape[1]
    drawn = torch.randn(
        count, ROUNDING_PROBES, generator=torch.Generator().manual_seed(seed), dtype=WIDE
    )
    size = float(torch.linalg.vector_norm(W0.double()))
    return measure_rounding(process, process.ritz(), drawn, 1e-9, size)


def norm(defect):
    return float(torch.linalg.matrix_norm(defect, 2)) if defect.numel() else 0.0


@pytest.mark.parametrize("dtype", [WIDE, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*SPECTRA, *ENTRIES])
def test_the_measured_rounding_covers_the_space(kind, shape, dtype):
    """The spectral norms of both defects, those of leading Ritz vectors, and of the bases."""
    W0 = matrix(kind, *shape).to(dtype)
    for block, steps in ((1, 24), (3, 20), (9, 9)):
        process = grown(W0, orthonormal(shape[0], block, 7), steps)
        found, ritz = measured(process, W0), process.ritz()
        A, P, Q = W0.double(), process.left.double(), process.right.double()
        after, B, inner = process.after.double(), process.small, process.last
        first, second = A.mT @ P - Q @ B.mT, A @ Q - P @ B - after @ inner
        assert norm(first) <= found.noise
        assert norm(second) <= found.noise
        single = len(found.leading)
        assert single == min(block, len(ritz.residuals))
        assert bool(((first @ ritz.left)[:, :single].norm(dim=0) <= found.leading).all())
        assert bool(((second @ ritz.right)[:, :single].norm(dim=0) <= found.leading).all())
        for basis in (torch.cat([P, after], dim=1), Q):
            assert norm(basis.mT @ basis - torch.eye(basis.shape[1])) <= found.defect
        # a bound that says something: on random entries some ten roundings of a product
        assert found.noise < 300 * torch.finfo(torch.float32).eps * float(A.norm())
        assert found.defect < 100 * torch.finfo(torch.float32).eps


def test_a_space_that_was_tampered_with_is_found_out():
    W0 = gaussian(100, 80).float()
    process = grown(W0, orthonormal(100, 5, 7), 6)
    honest = measured(process, W0)
    process._right[3] += 1e-3 * gaussian(80, 1).float()[:, 0]
    found = measured(process, W0)
    assert found.noise > 100 * honest.noise
    process._right[3] = process._right[4]
    assert measured(process, W0).defect > 0.9


@pytest.mark.parametrize("rank", [1, 5, 60])
def test_a_norm_from_gaussian_vectors_is_not_too_small(rank):
    """As seldom as it says, and sharp for a matrix of rank one."""
    E = gaussian(70, rank) @ gaussian(rank, 60)
    low, probability = 0, 0.3
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(60, 2, generator=generator, dtype=WIDE)
        low += norm_above(E @ drawn, probability, 0.0) < norm(E)
    assert low < 400 * probability + 3 * (400 * probability) ** 0.5
    assert low > 40 or rank > 1
    assert safety_factor(ROUNDING_PROBES, 5e-10) == pytest.approx(4.75, abs=0.01)  # as the docs say


@pytest.mark.parametrize("dtype", [WIDE, torch.float32])
def test_measured_residuals_are_those_of_the_triplets(dtype):
    W0 = matrix("outliers", 100, 80).to(dtype)
    found = singular_triplet(W0, 3, solver=GolubKahan(rtol=1e-3))
    A, sigma, u, v = W0.double(), *(x.double() for x in found)
    true = torch.hypot((A @ v - u * sigma).norm(dim=0), (A.mT @ u - v * sigma).norm(dim=0))
    bound = measure_residuals(Dense(W0), found, Dense(W0).rounding_scale())
    assert bool((bound >= true).all())
    assert bool((bound <= true + 1e-4 * sigma[0] * (1e-5 if dtype is WIDE else 1)).all())


def test_a_solver_that_proves_reports_measured_residuals():
    """Of constant columns, whose products round in one direction."""
    W0 = torch.full((600, 400), 1.1767964) + 0.02 * gaussian(600, 400).float()
    solver = GolubKahan(vector_tol=5e-3, oversample=8, failure_probability=1e-9, max_steps=40)
    found = singular_triplet(W0, 2, solver=solver, generator=torch.Generator().manual_seed(0))
    assert found.status is Status.CONVERGED
    A, sigma, u, v = W0.double(), *(x.double() for x in found)
    true = torch.hypot((A @ v - u * sigma).norm(dim=0), (A.mT @ u - v * sigma).norm(dim=0))
    assert bool((found.residuals.double() >= true * (1 - 1e-6)).all())
    S = torch.linalg.svdvals(A)
    assert float(found.gaps[1]) <= float(S[1] - S[2]) + float(found.residuals[1])


@pytest.mark.parametrize("dtype", [WIDE, torch.float32])
def test_ritz_is_the_svd_of_the_small_matrix(dtype):
    W0 = gaussian(60, 40).to(dtype)
    process = grown(W0, orthonormal(60, 4, 1), 5)
    ritz = process.ritz()
    u, v = process.left.double() @ ritz.left, process.right.double() @ ritz.right
    pairs = len(ritz.residuals)
    A, s = W0.double(), ritz.sigma[:pairs]
    slack = process.noise
    assert norm(A.mT @ u[:, :pairs] - v[:, :pairs] * s) < 8 * slack
    rest = torch.linalg.vector_norm(A @ v[:, :pairs] - u[:, :pairs] * s, dim=0)
    torch.testing.assert_close(rest, ritz.residuals, rtol=0, atol=slack)
    assert bool((ritz.sigma[:pairs] <= torch.linalg.svdvals(A)[:pairs] + slack).all())
    assert len(ritz.sigma) == max(len(ritz.left), len(ritz.right))
    assert process.size == process.left.shape[1] == 20
    assert process.passes == 10


def test_least_is_the_smallest_image_of_the_right_space():
    W0 = gaussian(60, 40)
    process = grown(W0, orthonormal(60, 4, 1), 4)
    assert process.min_sigma_upper_bound == pytest.approx(
        float(torch.linalg.svdvals(W0 @ process.right)[-1])
    )
    assert process.min_sigma_upper_bound >= float(torch.linalg.svdvals(W0)[-1])


def test_directions_that_a_block_does_not_add_are_left_out():
    U, V = orthonormal(50, 5, 2), orthonormal(40, 5, 3)
    W0 = (U * torch.arange(5, 0, -1)) @ V.mT
    process = grown(W0, U[:, :2], 9)
    assert process.closed
    assert process.left.shape[1] == process.right.shape[1] == 2
    torch.testing.assert_close(process.ritz().sigma, torch.tensor([5.0, 4.0], dtype=WIDE))
    every = grown(W0, orthonormal(50, 8, 4), 9)
    assert every.closed
    torch.testing.assert_close(every.ritz().sigma[:5], torch.arange(5, 0, -1).to(WIDE))


@pytest.mark.parametrize("seed", range(5))
def test_golub_kahan_is_not_content_with_the_first_vector_it_is_given(seed):
    """A start on a lower singular vector converges at once, and is not the leading one."""
    values = torch.cat([torch.tensor([2.0, 1.9]), torch.linspace(1.2, 0.1, 58)]).to(WIDE)
    U, V = orthonormal(200, 60, seed), orthonormal(120, 60, seed + 1)
    W0 = (U * values) @ V.mT
    found = singular_triplet(
        W0, 1, solver=GolubKahan(vector_tol=2e-3), init=(U[:, 1:2], V[:, 1:2]),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    assert float(found.sigma[0]) == pytest.approx(2.0, rel=1e-3)
    assert abs(float(found.u[:, 0] @ U[:, 0])) > 1 - 1e-4


def test_the_gap_of_the_last_triplet_counts_what_has_not_converged():
    values = torch.cat([torch.tensor([3.0, 2.0, 1.9]), torch.linspace(1.8, 0.1, 97)]).to(WIDE)
    W0 = (orthonormal(150, 100, 8) * values) @ orthonormal(130, 100, 9).mT
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        found = singular_triplet(W0, 2, solver=GolubKahan(vector_tol=0.05), generator=g)
        assert float(found.gaps[1]) < 0.1 + 1e-3  # the distance to 1.9


def test_gaps_are_to_where_any_later_value_may_end():
    sigma, rho = torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([0.0, 0.0, 0.1, 2.4])
    assert _gaps(sigma, rho, 1, complete=False).tolist() == pytest.approx([0.1])
    assert _gaps(sigma, 0 * rho, 2, complete=False).tolist() == pytest.approx([1.0, 1.0])
    assert _gaps(sigma, rho, 2, complete=False).tolist() == pytest.approx([1.0, 0.0])
    assert _gaps(sigma[:2], rho[:2], 2, complete=True).tolist() == pytest.approx([1.0, 1.0])
    assert _gaps(sigma[:0], rho[:0], 2, complete=False).tolist() == []
