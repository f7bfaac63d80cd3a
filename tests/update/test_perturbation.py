"""Expansions against dense decompositions of A + hD: the error falls with the right power of h."""

import re
import warnings

import pytest
import torch

from bulkedge import DegenerateWarning, InputError
from bulkedge.update import eigen_perturbation, eigenvalue_perturbation, singular_perturbation
from cases import generator, orthonormal, with_spectrum

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (1, 1)]
H = 1e-2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def spread(m, n):
    """Values one apart."""
    return with_spectrum(m, n, torch.arange(min(m, n), 0, -1.0))


def direction(m, n):
    D = normal(m, n, seed=5)
    return D / torch.linalg.matrix_norm(D, 2)


def triplet(A, k, u):
    """The k-th triplet, its sign that of u."""
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    sign = torch.sign(U[:, k] @ u)
    return S[k], sign * U[:, k], sign * Vt[k]


def orders(error):
    """log₂ of the quotients of errors as h is halved."""
    errors = torch.stack([torch.tensor(error(H / 2**i)) for i in range(4)])
    return errors, (errors[:-1] / errors[1:]).log2()


def falls_with(error, order):
    errors, rates = orders(error)
    assert errors[0] < 20 * H**order
    assert ((rates > order - 0.25) | (errors[1:] < 1e-13)).all(), (errors, rates)
    return bool((rates < order + 0.5).any())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_triplets(shape, order):
    A, D = spread(*shape), direction(*shape)
    for k in range(min(shape)):
        expansion = singular_perturbation(A, D, k, order=order)

        for i in range(3):

            def error(h, k=k, i=i, expansion=expansion):
                exact = triplet(A + h * D, k, expansion.u)
                return float((expansion.at(h)[i] - exact[i]).abs().max())

            falls_with(error, order + 1)


def test_no_term_is_there_for_nothing():
    """Where it is generic, first order does not fall faster than it should, nor does second."""
    A, D = spread(7, 5), direction(7, 5)
    for order in (1, 2):
        expansion = singular_perturbation(A, D, 1, order=order)

        def error(h, expansion=expansion):
            return float((expansion.at(h)[1] - triplet(A + h * D, 1, expansion.u)[1]).abs().max())

        assert falls_with(error, order + 1)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)], ids=str)
def test_what_lies_outside_the_span_counts(shape):
    """``σ⁽²⁾`` of a direction that leaves the span of all base vectors: ‖·‖²/(2σ)."""
    m, n = shape
    Q = orthonormal(max(shape), max(shape))
    k = min(shape)
    A = torch.diag(torch.arange(k, 0, -1.0)).double()
    outside = torch.zeros(max(shape) - k, k).double()
    outside[0, 0] = 1.0
    A, D = Q @ torch.cat([A, 0 * outside]), Q @ torch.cat([0 * A, outside])
    A, D = (A, D) if m > n else (A.mT, D.mT)
    expansion = singular_perturbation(A, D)
    assert expansion.sigma2 is not None
    torch.testing.assert_close(expansion.sigma1, torch.tensor(0.0).double())
    torch.testing.assert_close(expansion.sigma2, torch.tensor(1 / (2 * k)).double())


def test_second_order_is_the_sum_over_pairs():
    """``Σ [σ_k(a²+b²) + 2σ_i a b]/(2(σ_k²−σ_i²))`` and what lies outside, written out."""
    A, D, k = spread(7, 5), direction(7, 5), 2
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    u, v = U[:, k], Vt[k]
    total = float(((D @ v - U @ (U.mT @ D @ v)).square().sum()) / (2 * S[k]))
    for i in (0, 1, 3, 4):
        a, b = U[:, i] @ D @ v, u @ D @ Vt[i]
        pairs = S[k] * (a**2 + b**2) + 2 * S[i] * a * b
        total += float(pairs / (2 * (S[k] ** 2 - S[i] ** 2)))
    assert float(singular_perturbation(A, D, k).sigma2) == pytest.approx(total, rel=1e-12)


def test_the_gauge():
    expansion = singular_perturbation(spread(7, 5), direction(7, 5), 1)
    u, u1, u2 = expansion.u, expansion.u1, expansion.u2
    assert abs(float(u @ u1)) < 1e-14
    assert float(u @ u2) == pytest.approx(-float(u1 @ u1) / 2)
    for h in (1e-2, 1e-3):  # length one up to h³
        assert abs(float(expansion.at(h)[1].norm()) - 1) < 10 * h**3


@pytest.mark.parametrize("order", [1, 2])
def test_symmetric_eigenpairs(order):
    Q = orthonormal(6, 6)
    A = (Q * torch.tensor([3.0, 2.0, 1.0, 0.0, -1.5, -3.0])) @ Q.mT
    D = direction(6, 6) + direction(6, 6).mT
    for k in range(6):
        expansion = eigen_perturbation((A + A.mT) / 2, D, k, order=order)

        def exact(h, k=k, expansion=expansion):
            values, vectors = torch.linalg.eigh(A + h * D)
            x = vectors[:, 5 - k]
            return values[5 - k], x * torch.sign(x @ expansion.vector)

        for i in range(2):

            def error(h, i=i, expansion=expansion, exact=exact):
                return float((expansion.at(h)[i] - exact(h)[i]).abs().max())

            falls_with(error, order + 1)


def test_first_order_has_no_second():
    one, other = (
        singular_perturbation(spread(5, 4), direction(5, 4), order=1),
        eigen_perturbation(torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2), order=1),
    )
    assert one.sigma2 is one.u2 is one.v2 is other.value2 is other.vector2 is None


def test_eigenvalues_of_a_general_matrix_and_where_the_symmetric_formula_fails():
    A, D, h = normal(6, 6, seed=1), normal(6, 6, seed=2), 1e-6
    values, slopes = eigenvalue_perturbation(A, D)

    def sorted_near(matrix):
        moved = torch.linalg.eigvals(matrix)
        return moved[(values[:, None] - moved).abs().argmin(dim=1)]

    differences = (sorted_near(A + h * D) - sorted_near(A - h * D)) / (2 * h)
    torch.testing.assert_close(slopes, differences, atol=1e-6, rtol=1e-6)
    assert (values.abs().diff() <= 1e-12).all()

    _, X = torch.linalg.eig(A)
    naive = (X.conj() * (D.to(X) @ X)).sum(dim=0)  # vᴴDv for unit right vectors
    assert float((naive[:, None] - slopes).abs().min(dim=0).values.max()) > 0.1


def test_general_and_symmetric_agree():
    A, D = spread(5, 5), direction(5, 5)
    A, D = A @ A.mT, D + D.mT
    A = (A + A.mT) / 2
    expected = torch.stack([eigen_perturbation(A, D, k).value1 for k in range(5)])
    torch.testing.assert_close(eigenvalue_perturbation(A, D)[1].real, expected)


@pytest.mark.parametrize("gap", [1e-8, 1e-10])
def test_close_values_are_warned_of(gap):
    values = torch.tensor([2.0, 2.0 - gap, 1.0], dtype=torch.float64)
    with pytest.warns(DegenerateWarning, match=r"singular value 1 \(from 0\) lies within"):
        singular_perturbation(torch.diag(values), torch.ones(3, 3), 1)
    with pytest.warns(DegenerateWarning, match=r"eigenvalue 0 \(from 0\) lies within"):
        eigen_perturbation(torch.diag(values), torch.ones(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        singular_perturbation(torch.diag(values), torch.ones(3, 3), 2)


def test_a_small_value_is_close_to_its_negative():
    with pytest.warns(DegenerateWarning, match=r"singular value 1 \(from 0\) lies within 1.0e-09"):
        singular_perturbation(torch.diag(torch.tensor([1.0, 1e-9]).double()), torch.ones(2, 2), 1)


def test_a_nearly_defective_matrix_is_warned_of():
    A = torch.tensor([[1.0, 1.0], [1e-17, 1.0]]).double()
    with pytest.warns(DegenerateWarning, match=r"close to a defective one"):
        eigenvalue_perturbation(A, torch.eye(2))


ONE = torch.eye(3)
UNEVEN = torch.tensor([[2.0, 1.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: singular_perturbation(ONE, ONE), "expected a simple singular value, got singular"),
        (lambda: eigen_perturbation(ONE, ONE, 2), "expected a simple eigenvalue, got eigenvalue 2"),
        (
            lambda: singular_perturbation(0 * ONE, ONE),
            "expected a simple singular value above zero",
        ),
        (lambda: singular_perturbation(ONE, ONE[:2]), "expected a direction of the shape of the"),
        (lambda: singular_perturbation(ONE[0], ONE), "expected A to be a real finite matrix, got"),
        (lambda: singular_perturbation(ONE, ONE / 0), "expected D to be a real finite matrix, got"),
        (lambda: singular_perturbation(ONE, ONE, 3), "expected 0 ≤ k < 3, got k=3"),
        (lambda: singular_perturbation(ONE, ONE, order=3), "expected order 1 or 2, got 3"),
        (lambda: eigen_perturbation(UNEVEN, UNEVEN), "expected A symmetric, got one that is not"),
        (lambda: eigen_perturbation(ONE[:2, :2], UNEVEN), "expected D symmetric, got one that"),
        (lambda: eigenvalue_perturbation(ONE[:2], ONE[:2]), "expected square matrices, got (2, 3)"),
        (
            lambda: eigenvalue_perturbation(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), UNEVEN),
            "expected a matrix with a basis of eigenvectors",
        ),
    ],
)
def test_misuse(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call()
