"""Orthonormal factors: what they are after each step, and what the update is then."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, OrthonormalFactors
from bulkedge.tune.orthonormal import orthonormal


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(dtype=torch.float32, rank=4):
    A = draw(rank, 50, seed=1, dtype=dtype).requires_grad_()
    B = torch.zeros(60, rank, dtype=dtype).requires_grad_()
    return AdaptedMatrix("layer", draw(60, 50), A, B, lambda: 0.25)


@pytest.mark.parametrize("method", ["qr", "polar"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_stay_orthonormal_and_spikes_of_one_strength(method, dtype):
    matrix = layer(dtype)
    error = 2e-2 if dtype is torch.bfloat16 else 2e-6
    optimizer = torch.optim.Adam([matrix.A, matrix.B], lr=0.05)
    holder = OrthonormalFactors([matrix], method=method)
    holder.attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        (matrix.B.float() @ matrix.A.float() - draw(60, 50, seed=3)).square().sum().backward()
        optimizer.step()
        for factor in (matrix.B.detach().double(), matrix.A.detach().double().mT):
            gram = factor.mT @ factor
            torch.testing.assert_close(gram, torch.eye(4).double(), rtol=0, atol=error)
    gamma = matrix.spikes().gamma
    torch.testing.assert_close(gamma, torch.full((4,), 0.25).double(), rtol=2 * error, atol=0)


def test_polar_is_the_nearest_and_qr_keeps_the_first_column():
    X = draw(30, 4, dtype=torch.float64)
    polar, qr = orthonormal(X, "polar"), orthonormal(X, "qr")
    U, _, Vt = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(polar, U @ Vt)
    torch.testing.assert_close(qr[:, 0], X[:, 0] / X[:, 0].norm())
    assert bool((qr.mT @ X).diagonal().gt(0).all())
    assert float((polar - X).norm()) < float((qr - X).norm())


def test_it_learns_rotated_directions():
    """A target that it can reach: orthonormal directions of strength s."""
    matrix = layer()
    target = (
        0.25 * orthonormal(draw(60, 4, seed=7), "qr") @ orthonormal(draw(50, 4, seed=8), "qr").mT
    )
    optimizer = torch.optim.SGD([matrix.A, matrix.B], lr=1.0)
    OrthonormalFactors([matrix]).attach(optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (0.25 * matrix.B @ matrix.A - target).square().sum()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3


def test_a_rank_beyond_the_shorter_side_is_refused():
    wide = AdaptedMatrix("wide", draw(5, 50), draw(6, 50), draw(5, 6))
    with pytest.raises(InputError, match="wide: expected a rank of at most 5"):
        OrthonormalFactors([wide])
    with pytest.raises(InputError, match='expected method to be "qr" or "polar"'):
        OrthonormalFactors([layer()], method="cayley")


@pytest.mark.parametrize("method", ["qr", "polar"])
def test_autocast_does_not_shorten_the_retraction(method):
    matrix = layer()
    with torch.autocast("cpu", torch.bfloat16):
        OrthonormalFactors([matrix], method=method)
    for factor in (matrix.B.detach().double(), matrix.A.detach().double().mT):
        torch.testing.assert_close(
            factor.mT @ factor, torch.eye(4).double(), rtol=0, atol=2 * torch.finfo().eps
        )
