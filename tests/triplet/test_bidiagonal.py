"""The recurrences hold to the noise that the certificate allows them, whatever the spectrum."""

import math

import pytest
import torch

from bulkedge._linmap import Dense
from bulkedge.intruder.certificate import COSINE, ROUNDING
from bulkedge.triplet import Bidiagonalization, GolubKahan, singular_triplet
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
SHAPES = [(100, 80), (80, 100), (80, 80)]


def matrix(kind, m, n):
    if SPECTRA[kind] is None:
        return gaussian(m, n)
    return (orthonormal(m, 80, 5) * SPECTRA[kind]) @ orthonormal(n, 80, 6).mT


def grown(W0, start, steps):
    noise = ROUNDING * torch.finfo(W0.dtype).eps * float(torch.linalg.vector_norm(W0))
    process = Bidiagonalization(Dense(W0), start.to(W0.dtype), noise)
    while not process.closed and process.passes < 2 * steps:
        process.extend()
    return process


def norm(defect):
    return float(torch.linalg.matrix_norm(defect, 2)) if defect.numel() else 0.0


@pytest.mark.parametrize("dtype", [WIDE, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_recurrences_hold_to_the_noise(kind, shape, dtype):
    W0 = matrix(kind, *shape).to(dtype)
    for block, steps in ((1, 24), (3, 20), (9, 9)):
        process = grown(W0, orthonormal(shape[0], block, 7), steps)
        A, P, Q = W0.double(), process.left.double(), process.right.double()
        after, B = process._next.double().mT, process._small
        inner = torch.zeros(len(process._last), B.shape[1], dtype=WIDE)
        inner[:, B.shape[1] - process._last.shape[1] :] = process._last
        defects = norm(A.mT @ P - Q @ B.mT), norm(A @ Q - P @ B - after @ inner)
        assert math.hypot(*defects) < 2**0.5 * process.noise
        for basis in (torch.cat([P, after], dim=1), Q):
            defect = basis.mT @ basis - torch.eye(basis.shape[1])
            assert norm(defect) < COSINE * torch.finfo(dtype).eps


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
    assert process.least == pytest.approx(float(torch.linalg.svdvals(W0 @ process.right)[-1]))
    assert process.least >= float(torch.linalg.svdvals(W0)[-1])


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
        W0, 1, solver=GolubKahan(angle=2e-3), init=(U[:, 1:2], V[:, 1:2]),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    assert float(found.sigma[0]) == pytest.approx(2.0, rel=1e-3)
    assert abs(float(found.u[:, 0] @ U[:, 0])) > 1 - 1e-4


def test_the_gap_of_the_last_triplet_counts_what_has_not_converged():
    values = torch.cat([torch.tensor([3.0, 2.0, 1.9]), torch.linspace(1.8, 0.1, 97)]).to(WIDE)
    W0 = (orthonormal(150, 100, 8) * values) @ orthonormal(130, 100, 9).mT
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        found = singular_triplet(W0, 2, solver=GolubKahan(angle=0.05), generator=g)
        assert float(found.gaps[1]) < 0.1 + 1e-3  # the distance to 1.9


def test_gaps_are_to_where_any_later_value_may_end():
    sigma, rho = torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([0.0, 0.0, 0.1, 2.4])
    assert _gaps(sigma, rho, 1, complete=False).tolist() == pytest.approx([0.1])
    assert _gaps(sigma, 0 * rho, 2, complete=False).tolist() == pytest.approx([1.0, 1.0])
    assert _gaps(sigma, rho, 2, complete=False).tolist() == pytest.approx([1.0, 0.0])
    assert _gaps(sigma[:2], rho[:2], 2, complete=True).tolist() == pytest.approx([1.0, 1.0])
    assert _gaps(sigma[:0], rho[:0], 2, complete=False).tolist() == []
