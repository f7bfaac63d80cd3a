"""Near-equal singular values: right, or warned of with the gap; never silent, never NaN."""

import itertools
import warnings

import pytest
import torch

from bulkedge import ConvergenceError, DegenerateWarning, InputError
from bulkedge.triplet import KKT, ExplicitSVD, PushThrough, singular_triplet
from cases import gaussian, orthonormal

TARGET = gaussian(9, 7)


def matrix(*sigma, dtype=torch.float64):
    values = torch.tensor(sigma, dtype=torch.float64)
    U, V = orthonormal(9, len(sigma), 1), orthonormal(7, len(sigma), 2)
    return ((U * values) @ V.mT).to(dtype)


def projector_loss(t):
    """Depends on the spaces of the block alone."""
    return ((t.u @ t.u.mT) @ TARGET.to(t.u) @ (t.v @ t.v.mT)).sum()


def partial_isometry_loss(t):
    """UVᵀ: invariant under one rotation of both sides."""
    return (TARGET.to(t.u) * (t.u @ t.v.mT)).sum()


def truncation_loss(t):
    """UΣVᵀ: σ and vectors together."""
    return (TARGET.to(t.u) * ((t.u * t.sigma) @ t.v.mT)).sum()


def vector_loss(t):
    """The first pair alone: even in its sign, but not invariant within the block."""
    return (TARGET.to(t.u) * (t.u[:, :1] @ t.v[:, :1].mT)).sum()


def gradient(loss, A, k=2, **options):
    return torch.func.grad(lambda A: loss(singular_triplet(A, k, **options)))(A)


def invariant_oracle(loss, A, gap=1e-3):
    """The invariant derivative where the two leading values coincide, from those nearby."""
    U, S, Vt = torch.linalg.svd(A.double(), full_matrices=False)
    directions = []
    for sign in (1, -1):
        apart = S.clone()
        apart[0] += sign * gap
        directions.append(gradient(loss, (U * apart) @ Vt))
    return sum(directions) / 2


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-13, 1e-11, 1e-9, 1e-6])
@pytest.mark.parametrize("loss", [projector_loss, partial_isometry_loss])
def test_invariant_losses_do_not_feel_the_gap(loss, gap):
    A = matrix(2.0 + gap, 2.0, 1.0, 0.5)
    expected = invariant_oracle(loss, matrix(2.0, 2.0, 1.0, 0.5))
    torch.testing.assert_close(gradient(loss, A), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3])
def test_invariant_losses_in_float32(gap):
    A = matrix(2.0 + gap, 2.0, 1.0, 0.5, dtype=torch.float32)
    expected = invariant_oracle(projector_loss, matrix(2.0 + gap, 2.0, 1.0, 0.5), gap=0.01)
    error = (gradient(projector_loss, A).double() - expected).norm() / expected.norm()
    assert float(error) < 1e-3


@pytest.mark.parametrize("gap", [0.0, 1e-13, 1e-10])
def test_other_losses_are_warned_of_with_the_gap(gap):
    A = matrix(2.0 + gap, 2.0, 1.0, 0.5)
    with pytest.warns(DegenerateWarning, match=r"values [01] and [01] .* differ by") as caught:
        found = gradient(vector_loss, A)
    assert torch.isfinite(found).all()
    told = float(str(caught[0].message).split("differ by ")[1].split(" ")[0])
    assert told <= gap / 2 + 1e-14


def test_a_truncated_svd_is_right_until_the_gap_is_gone():
    """U Σ Vᵀ hides its turns in σ_i − σ_j: the quotient of two small numbers, or a warning."""
    for gap in (1e-2, 1e-4, 1e-6):
        A = matrix(2.0 + gap, 2.0, 1.0, 0.5)
        U, V = (x[:, :2] for x in (orthonormal(9, 4, 1), orthonormal(7, 4, 2)))
        found = gradient(truncation_loss, A)
        block = U.mT @ found @ V
        torch.testing.assert_close(block, U.mT @ TARGET @ V, rtol=1e-6, atol=1e-6)
    with pytest.warns(DegenerateWarning, match=r"0 and 1 \(from 0\) differ by \S+ of the largest"):
        gradient(truncation_loss, matrix(2.0, 2.0, 1.0, 0.5))


def test_a_loss_of_values_needs_no_gap():
    A = matrix(2.0, 2.0, 1.0, 0.5)
    found = gradient(lambda t: t.sigma.sum(), A)
    U, V = (x[:, :2] for x in (orthonormal(9, 4, 1), orthonormal(7, 4, 2)))
    torch.testing.assert_close(found, U @ V.mT)


@pytest.mark.parametrize("shape", [(20, 20), (30, 10), (10, 30)], ids=str)
def test_subgradient_of_a_multiple_norm(shape):
    """∂‖A‖₂ = conv{U₁ h hᵀ V₁ᵀ}: the gradient has norm one, and supports A from below."""
    A = torch.eye(*shape, dtype=torch.float64)
    G = gradient(lambda t: t.sigma.sum(), A, k=1)
    torch.testing.assert_close((G * A).sum(), torch.linalg.matrix_norm(A, 2))
    assert float(torch.linalg.svdvals(G).sum()) == pytest.approx(1)
    for seed in range(20):
        other = A + 0.1 * gaussian(*shape) * (seed - 10)
        assert torch.linalg.matrix_norm(other, 2) >= 1 + (G * (other - A)).sum() - 1e-12


@pytest.mark.parametrize("adjoint", [None, KKT(), ExplicitSVD(), PushThrough()], ids=repr)
@pytest.mark.parametrize("gap", [0.0, 1e-16, 1e-14])
def test_a_block_that_cuts_a_cluster_is_warned_of(gap, adjoint):
    """It is never silent: a warning, or a clear error where a solver breaks down."""

    A = matrix(3.0, 2.0 + gap, 2.0, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = gradient(projector_loss, A, adjoint=adjoint)
        except ConvergenceError:
            return
    assert [
        w for w in caught if w.category is DegenerateWarning and "relative gap" in str(w.message)
    ]
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("gap", [1e-10, 1e-8, 1e-6])
def test_a_cluster_cut_where_float64_still_resolves_it(gap):
    """Nothing to warn of: the vectors are known to eps/gap, and so is the derivative."""
    A = matrix(3.0, 2.0 + gap, 2.0, 0.5)
    found = gradient(projector_loss, A)
    other = gradient(projector_loss, A, adjoint=ExplicitSVD())
    assert float((found - other).norm() / other.norm()) < 1e-14 / gap + 1e-9
    assert float(found.norm()) * gap > 1e-3  # and large it is


def test_a_block_that_cuts_a_cluster_may_be_asked_about_the_rest():
    """No warning where the cotangent does not meet the cluster."""
    A = matrix(3.0, 2.0, 2.0, 0.5)

    def first_alone(t):
        return ((t.u[:, :1].mT @ gaussian(9, 1)) ** 2).sum()

    # the whole cluster beside it in the block: the same gradient
    torch.testing.assert_close(gradient(first_alone, A), gradient(first_alone, A, k=3))


def test_forward_mode_warns_of_ties():
    A = matrix(2.0, 2.0, 1.0, 0.5)
    with pytest.warns(DegenerateWarning, match=r"0 and 1 \(from 0\) differ by \S+ of the largest"):
        _, tangent = torch.func.jvp(lambda A: singular_triplet(A, 2).u, (A,), (TARGET,))
    assert torch.isfinite(tangent).all()


SPECTRA = {
    "apart": (3.0, 2.0, 1.2, 0.5, 0.2),
    "a small one": (3.0, 2.0, 1.2, 0.5, 1e-6),
    "a tiny one": (3.0, 2.0, 1.2, 0.5, 1e-13),
    "two small ones": (3.0, 2.0, 1.2, 2e-7, 1e-7),
    "two tiny ones": (3.0, 2.0, 1.2, 2e-13, 1e-13),
    "first tied": (3.0, 3.0, 1.2, 0.5, 0.2),
    "middle tied": (3.0, 2.0, 0.5, 0.5, 0.2),
    "last tied": (3.0, 2.0, 1.2, 0.5, 0.5),
    "rank four": (3.0, 2.0, 1.2, 0.5, 0.0),
}


def one_by_one(u, v):
    """A loss of each pair of vectors by itself, on both sides."""
    m, n, k = len(u), len(v), u.shape[1]
    left, right = (torch.arange(x * m * k).reshape(k, x, m).double().sin() for x in (m, n))
    pairs = torch.einsum("ai,bi->iab", v, u), torch.einsum("ai,bi->iab", u, u)
    return (right * pairs[0]).sum() + (left * pairs[1]).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [5, 4, 3])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(5, 5), (7, 5), (5, 7)], ids=str)
def test_a_warning_is_given_where_a_gap_is_gone_and_nowhere_else(shape, spectrum, k, seed):
    """All values too: only the longer side of a matrix has vectors beyond them, of the value 0."""
    sigma = SPECTRA[spectrum]
    U, V = orthonormal(shape[0], 5, seed), orthonormal(shape[1], 5, seed + 10)
    A = (U * torch.tensor(sigma).double()) @ V.mT
    beyond = sigma[k : k + 1] or ((0.0,) if shape[0] != shape[1] else ())
    met = [*sigma[:k], *beyond]
    least = min(a - b for a, b in itertools.pairwise(met))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if sigma[k - 1] == 0:
            with pytest.raises(
                InputError, match=r"singular value 4 \(from 0\) is zero to rounding"
            ):
                gradient(lambda t: one_by_one(t.u, t.v), A, k)
            return
        found = gradient(lambda t: one_by_one(t.u, t.v), A, k)
    assert all(w.category is DegenerateWarning for w in caught)
    assert bool(caught) is (least < 1e-12)
    if caught:
        return

    def dense(A):
        U, _, Vt = torch.linalg.svd(A, full_matrices=False)
        return one_by_one(U[:, :k], Vt[:k].mT)

    expected = torch.func.grad(dense)(A)
    if min(a - b for a, b in itertools.pairwise(sigma)) == 0:  # torch's is NaN, or far off
        expected = gradient(lambda t: one_by_one(t.u, t.v), A, k, adjoint=ExplicitSVD())
    assert float((found - expected).norm() / expected.norm()) < 1e-13 / least + 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(12, 12), (14, 12), (12, 14), (1, 1), (3, 1)], ids=str)
def test_all_vectors_of_a_generic_matrix_are_not_warned_of(shape, order, dtype):
    k = min(shape)
    for seed in range(20):
        A = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        A.requires_grad_()
        found = singular_triplet(A, k)
        (G,) = torch.autograd.grad(found.u.pow(4).sum(), A, create_graph=order == 2)
        if order == 2:
            (G,) = torch.autograd.grad(G.pow(2).sum(), A)
        assert bool(G.isfinite().all())


@pytest.mark.parametrize("A", [torch.zeros(5, 4), torch.ones(5, 4)], ids=["zero", "rank one"])
def test_vectors_of_a_zero_singular_value_have_no_derivative(A):
    A = A.double().requires_grad_()
    t = singular_triplet(A, 2)
    with pytest.raises(InputError, match=r"singular value [01] \(from 0\) is zero to rounding"):
        (t.u.sum() + t.v.sum()).backward()
    singular_triplet(A, 2).sigma[0].backward()
    assert torch.isfinite(A.grad).all()
