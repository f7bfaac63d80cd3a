"""The updated resolvent against the inverse."""

import re

import pytest
import torch

from bulkedge import InputError
from bulkedge.update import resolvent_update, resolvent_update_low_rank, secular_function
from cases import generator

N = 7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def resolvent(W, z):
    z = torch.as_tensor(z)
    return torch.linalg.inv(z[..., None, None] * torch.eye(len(W)) - W)


W, U, V = normal(N, N, seed=1), normal(N, seed=2), normal(N, seed=3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("theta", [1.7, -0.4, 2.0 - 1.0j])
@pytest.mark.parametrize("z", [9.0, 1.0 + 0.5j, [[8.0j, 2.0 - 1.0j]]], ids=str)
def test_rank_one_is_the_inverse(z, theta, symmetric):
    base, v = (W + W.mT, U) if symmetric else (W, V)
    found = resolvent_update(resolvent(base, z), U, v, theta)
    torch.testing.assert_close(found, resolvent(base + theta * torch.outer(U, v), z))


@pytest.mark.parametrize("r", [1, 3, 10])
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.5j])
def test_low_rank_is_the_inverse(r, scale):
    B, A, z = normal(N, r, seed=4), normal(r, N, seed=5), 0.3 + 2.0j
    found = resolvent_update_low_rank(resolvent(W, z), B, A, scale)
    torch.testing.assert_close(found, resolvent(W + scale * (B @ A), z))


def test_complex_vectors_are_not_conjugated():
    u, v, z = U + 0.5j * V, V - 2.0j * U, 3.0 + 1.0j
    found = resolvent_update(resolvent(W, z), u, v, 1.3)
    torch.testing.assert_close(found, resolvent(W + 1.3 * u[:, None] * v, z))


def test_the_secular_function_vanishes_at_the_new_eigenvalues_alone():
    """With a plus in place of the minus it would be two there."""
    theta = 2.5
    new = torch.linalg.eigvals(W + theta * torch.outer(U, V))
    G = resolvent(W, new)
    zeros = secular_function(G, U, V, theta)
    size = theta * (G @ U.cdouble()).abs().sum(dim=-1) * V.abs().max()
    assert zeros.shape == (N,)
    assert (zeros.abs() <= 1e-12 * size).all()
    assert (secular_function(G, U, V, -theta) - 2).abs().max() < 1e-8
    assert (secular_function(resolvent(W, new + 0.1), U, V, theta).abs() > 1e-4).all()


def test_the_secular_function_is_a_quotient_of_determinants():
    """``1 − θ vᵀG u = det(z − W − θuvᵀ)/det(z − W)``."""
    z, eye = 4.0, torch.eye(N)
    quotient = torch.linalg.det(z * eye - W - 0.7 * torch.outer(U, V)) / torch.linalg.det(
        z * eye - W
    )
    torch.testing.assert_close(secular_function(resolvent(W, z), U, V, 0.7), quotient)


def test_single_precision_is_widened():
    found = resolvent_update(resolvent(W, 9.0).float(), U.float(), V.float(), 1.0)
    assert found.dtype is torch.float64


@pytest.mark.parametrize("z", [3.0, torch.tensor([5.0, 3.0])], ids=["one", "one of two"])
def test_at_an_eigenvalue_of_the_updated_matrix(z):
    e = torch.eye(2)[0].double()
    G = resolvent(torch.diag(torch.tensor([1.0, 2.0])).double(), z)
    with pytest.raises(InputError, match=r"singular to rounding: z is an eigenvalue there; move"):
        resolvent_update(G, e, e, 2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resolvent_update(W, U[:, None], V, 1.0), "expected vectors u and v, got shapes"),
        (lambda: secular_function(W, U, V[None], 1.0), "expected vectors u and v, got shapes"),
        (lambda: resolvent_update(W[:3], U, V, 1.0), "expected a square resolvent G (..., n, n)"),
        (
            lambda: secular_function(W, U[:3], V, 1.0),
            "or vectors (n,), got (7, 7), (3, 1) and (1, 7)",
        ),
        (
            lambda: resolvent_update_low_rank(W, W[:, :2], W[:3]),
            "or vectors (n,), got (7, 7), (7, 2) and (3, 7)",
        ),
    ],
)
def test_misuse(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call()
