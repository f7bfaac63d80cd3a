import pytest
import torch

from bulkedge import InputError
from bulkedge.spectral import Probable, Rigorous, cap, normalize, spectral_norm
from bulkedge.triplet import Dense, LowRank
from cases import MATRICES, SHAPES, gaussian, generator, with_spectrum


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("matrix", MATRICES)
def test_norm_and_its_gradient(matrix, shape):
    A = MATRICES[matrix](*shape).requires_grad_()
    norm = spectral_norm(A)
    assert norm.shape == ()
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(A, 2))
    (G,) = torch.autograd.grad(norm, A)
    # a subgradient: nuclear norm 1 at most, and it supports the norm where it was taken
    assert float(torch.linalg.svdvals(G).sum()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close((G * A).sum(), norm)


def test_second_derivatives_and_batches():
    A = with_spectrum(5, 4, torch.tensor([3.0, 2.0, 1.0, 0.5]))
    assert torch.autograd.gradgradcheck(spectral_norm, A.clone().requires_grad_())
    batch = torch.stack([A, 2 * A.flip(0)])[None].requires_grad_()
    torch.testing.assert_close(spectral_norm(batch), torch.linalg.matrix_norm(batch, 2))
    assert torch.autograd.gradcheck(normalize, batch)
    assert torch.autograd.gradcheck(lambda A: cap(A, 4.0), batch)


def test_norm_of_a_map():
    W0, B, A = gaussian(20, 15), gaussian(20, 2), gaussian(2, 15)
    found = spectral_norm(Dense(W0) + LowRank(B, A, 0.5))
    torch.testing.assert_close(found, torch.linalg.matrix_norm(W0 + 0.5 * B @ A, 2))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_the_gradient_of_normalize_is_orthogonal_to_the_matrix(shape):
    """y is homogeneous of degree 0, so ⟨Ā, A⟩ = 0; and Ā is of degree −1."""
    A, V = gaussian(*shape), gaussian(*shape).flip(0)

    def gradient(A):
        A = A.clone().requires_grad_()
        return torch.autograd.grad((normalize(A) * V).sum(), A)[0]

    G = gradient(A)
    assert abs(float((G * A).sum())) < 1e-12
    torch.testing.assert_close(gradient(3 * A), G / 3)
    U, S, Vt = torch.linalg.svd(A)
    expected = V / S[0] - (V * A).sum() / S[0] ** 2 * torch.outer(U[:, 0], Vt[0])
    torch.testing.assert_close(G, expected)


def test_cap_is_the_identity_inside_to_the_bit():
    A = gaussian(8, 5).float().requires_grad_()
    norm = float(torch.linalg.matrix_norm(A.detach(), 2))
    assert torch.equal(cap(A, 1.01 * norm), A)
    (G,) = torch.autograd.grad(cap(A, 1.01 * norm).sum(), A)
    assert torch.equal(G, torch.ones_like(A))
    outside = cap(A, 0.5 * norm)
    torch.testing.assert_close(torch.linalg.matrix_norm(outside, 2), torch.tensor(0.5 * norm))
    zero = torch.zeros(3, 2, requires_grad=True)
    (G,) = torch.autograd.grad(cap(zero).sum(), zero)
    assert torch.equal(G, torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back(dtype):
    A = gaussian(6, 5).to(dtype)
    assert normalize(A).dtype == cap(A).dtype == dtype
    assert spectral_norm(A).dtype == torch.float32


def test_errors():
    with pytest.raises(InputError, match="other than zero"):
        normalize(torch.zeros(3, 3))
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="expected a positive finite bound"):
            cap(torch.ones(2, 2), bound)
    with pytest.raises(InputError, match="expected certified to be True or a certificate"):
        spectral_norm(torch.ones(2, 2), certified="yes")
    with pytest.raises(InputError, match="certify one at a time"):
        spectral_norm(torch.ones(2, 2, 2), certified=Rigorous())


@pytest.mark.parametrize(
    "certificate", [True, Rigorous(), Probable(failure=1e-6, rtol=1e-7)], ids=repr
)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=str)
def test_certified_interval(certificate, shape):
    A = gaussian(*shape)
    true = float(torch.linalg.matrix_norm(A, 2))
    found = spectral_norm(A.requires_grad_(), certified=certificate, generator=generator(3))
    assert found.lower <= true <= found.upper
    assert found.upper <= true * (1 + 1e-6)


def test_vmap():
    A = torch.stack([gaussian(5, 4), gaussian(5, 4).flip(0)])
    torch.testing.assert_close(torch.func.vmap(normalize)(A), normalize(A))
    assert torch.isnan(torch.func.vmap(normalize)(0 * A)).all()  # cannot be looked at there
