"""Small matrices in one decomposition, alone, with leading dimensions and under vmap."""

import pytest
import torch

from bulkedge import DegenerateWarning, singular_triplet
from bulkedge.triplet import _small_rule
from bulkedge.triplet._small import decompose


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def value(sigma, u, v):
    """A loss of all three that does not depend on signs, for each matrix."""
    phi, psi = (torch.arange(x.shape[-2]).add(1).sin()[:, None].to(x) for x in (u, v))
    a, b = (u * phi).sum(dim=-2), (v * psi).sum(dim=-2)
    return (sigma.exp().log1p() + a * a + a * b).sum(dim=-1)


def ours(A, k):
    return value(*singular_triplet(A, k))


def theirs(A, k):
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    return value(S[..., :k], U[..., :k], Vt.mT[..., :k])


@pytest.fixture
def solves(monkeypatch):
    """The shapes that were decomposed."""
    shapes = []
    monkeypatch.setattr(
        _small_rule, "decompose", lambda A, k: shapes.append(A.shape) or decompose(A, k)
    )
    return shapes


CASES = [((3, 30, 24), 1), ((2, 2, 20, 33), 3), ((4, 5, 5), 1), ((2, 1, 1), 1), ((2, 90, 88), 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("shape", "k"), CASES, ids=str)
def test_a_batch_is_one_solve_with_the_gradient_of_svds(shape, k, dtype, solves):
    A = (drawn(*shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()
    found = singular_triplet(A, k)
    (gradient,) = torch.autograd.grad(value(*found).sum(), A)
    assert solves == [shape]
    wide = A.detach().double().requires_grad_()
    (reference,) = torch.autograd.grad(theirs(wide, k).sum(), wide)
    tolerance = 1e-9 if dtype is torch.float64 else 3e-6
    torch.testing.assert_close(gradient.double(), reference, rtol=tolerance, atol=tolerance)
    alone = [singular_triplet(one, k) for one in A.detach().flatten(0, -3)]
    for name in ("sigma", "residuals", "gaps"):
        together = getattr(found, name).flatten(0, -2)
        each = torch.stack([getattr(one, name) for one in alone])
        torch.testing.assert_close(together, each, rtol=1e-6, atol=1e-6)
    assert found.passes == sum(one.passes for one in alone)


@pytest.mark.parametrize("k", [1, 2])
def test_vmap_is_one_solve_forward_and_one_backward(k, solves):
    A = drawn(3, 22, 18)
    reference = torch.func.vmap(torch.func.grad(lambda x: theirs(x, k)))(A)
    found = torch.func.vmap(torch.func.grad(lambda x: ours(x, k)))(A)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)
    assert solves == [A.shape, A.shape]
    leaf = A.clone().requires_grad_()
    torch.func.vmap(lambda x: ours(x, k))(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, reference, rtol=1e-9, atol=1e-9)
    assert len(solves) == 3
    over = torch.func.grad(lambda x: torch.func.vmap(lambda y: ours(y, k))(x).sum())(A)
    torch.testing.assert_close(over, reference, rtol=1e-9, atol=1e-9)


def test_a_second_derivative_of_a_batch():
    A, T = drawn(2, 8, 9), drawn(2, 9, 8).mT
    results = []
    for function in (ours, theirs):
        leaf = A.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf, 2).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad((first * T).sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_one_member_without_a_gap_is_warned_of_as_alone():
    A = torch.stack([drawn(12, 12), torch.eye(12).double()]).requires_grad_()
    assert decompose(A, 1) is None
    with pytest.warns(DegenerateWarning, match="relative gap"):
        ours(A, 1).sum().backward()
    (alone,) = torch.autograd.grad(ours(leaf := A[0].detach().requires_grad_(), 1), leaf)
    torch.testing.assert_close(A.grad[0], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_any_scale_of_float32(factor):
    A = drawn(100, 90, dtype=torch.float32)
    found, plain = singular_triplet(A * factor), singular_triplet(A)
    torch.testing.assert_close(found.sigma / factor, plain.sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.u.abs(), plain.u.abs(), rtol=1e-4, atol=1e-6)
