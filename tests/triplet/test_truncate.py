"""The best part of rank k: its derivative exists wherever the cut is clear."""

import warnings

import pytest
import torch
from test_derivative import ADJOINTS
from torch.autograd import gradcheck, gradgradcheck

from bulkedge import ConvergenceError, DegenerateWarning, InputError
from bulkedge.triplet import BlockKrylov, Dense, LowRank, Scaled, singular_triplet, truncate
from cases import gaussian, generator, orthonormal, with_spectrum
from helpers import some

SHAPES = [(6, 5), (5, 6), (5, 5)]
SPECTRA = {
    "apart": [3.0, 2.0, 1.2, 0.5, 0.2],
    "pair": [2.0, 2.0, 1.2, 0.5, 0.2],
    "triple": [2.0, 2.0, 2.0, 0.5, 0.2],
    "pair at the cut's end": [3.0, 2.0, 2.0, 0.5, 0.2],
}


def made(shape, sigma):
    return with_spectrum(*shape, torch.tensor(sigma), seed=5)


def dense(A, k):
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    return (U[..., :k] * S[..., None, :k]) @ Vt[..., :k, :]


def difference(A, k, direction, h=1e-5):
    """The derivative by differences of the dense truncation, of fourth order."""

    def central(h):
        return (dense(A + h * direction, k) - dense(A - h * direction, k)) / (2 * h)

    return (4 * central(h) - central(2 * h)) / 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_every_jacobian_whatever_ties_inside(spectrum, shape, k):
    sigma = SPECTRA[spectrum]
    if k < 5 and sigma[k - 1] == sigma[k]:
        pytest.skip("a tie at the cut")
    A = made(shape, sigma).requires_grad_()

    def function(A):
        return truncate(A, k)

    torch.testing.assert_close(function(A), dense(A, k))
    # a warning would be an error
    assert gradcheck(function, A, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, A, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)], ids=str)
def test_every_entry_of_every_jacobian_of_equal_values(shape):
    A = with_spectrum(*shape, torch.tensor([2.0, 2.0, 0.5])).requires_grad_()

    def function(A):
        return truncate(A, 2)

    assert gradcheck(function, A, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, A, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30)], ids=str)
def test_every_adjoint_against_differences(adjoint, shape):
    sigma = torch.cat([torch.full((4,), 3.0), torch.linspace(2, 0.1, 30)])
    A, T, G = with_spectrum(*shape, sigma), gaussian(*shape), gaussian(*shape).flip(0)

    def function(A):
        return truncate(A, 4, adjoint=ADJOINTS[adjoint])

    expected = difference(A, 4, T)
    _, forward = torch.func.jvp(function, (A,), (T,))
    torch.testing.assert_close(forward, expected, rtol=1e-7, atol=1e-7)
    (reverse,) = torch.func.vjp(function, A)[1](G)
    torch.testing.assert_close((reverse * T).sum(), (G * expected).sum(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3])
def test_the_gap_inside_does_not_matter_where_the_sum_of_triplets_is_off(gap):
    A = made((9, 7), [2.0 + gap, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1])
    G, T = gaussian(9, 7), gaussian(9, 7).flip(0)
    expected = (G * difference(A, 2, T)).sum()
    ours = torch.func.grad(lambda A: (G * truncate(A, 2)).sum())(A)
    torch.testing.assert_close((ours * T).sum(), expected, rtol=1e-7, atol=1e-7)

    def total(A):
        t = singular_triplet(A, 2)
        return (G * ((t.u * t.sigma) @ t.v.mT)).sum()

    if gap == 0:
        with pytest.warns(DegenerateWarning, match="differ by"):
            theirs = torch.func.grad(total)(A)
        assert float((theirs - ours).norm() / ours.norm()) > 0.05


def test_the_derivative_is_its_own_transpose():
    A = made((6, 5), SPECTRA["pair"])
    J = torch.func.jacrev(lambda A: truncate(A, 2))(A).reshape(30, 30)
    torch.testing.assert_close(J, J.mT)


def test_functional_transforms_agree_with_dense_ones():
    func = torch.func
    A, batch = made((5, 4), [3.0, 2.0, 1.2, 0.5]), torch.stack([gaussian(5, 4), gaussian(5, 4) + 1])
    weights = gaussian(5, 4).flip(0)
    f, g = (lambda A, h=h: (weights * h(A, 2) ** 2).sum() for h in (truncate, dense))
    third = func.grad(lambda A: (func.hessian(g)(A) ** 2).sum())(A)
    torch.testing.assert_close(
        func.grad(lambda A: (func.jacrev(func.grad(f))(A) ** 2).sum())(A), third
    )
    for transform in (func.grad, func.jacfwd, func.hessian, lambda f: func.jacrev(func.jacfwd(f))):
        torch.testing.assert_close(transform(f)(A), transform(g)(A), rtol=1e-9, atol=1e-9)
    for transform in (func.vmap, lambda f: func.vmap(func.hessian(f))):
        torch.testing.assert_close(transform(f)(batch), transform(g)(batch), rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match=r"jacfwd\(jacrev"):
        func.jacfwd(func.jacfwd(f))(A)


def test_batches_are_stacks():
    A = torch.stack([gaussian(6, 5) + i for i in range(6)]).unflatten(0, (2, 3))
    torch.testing.assert_close(truncate(A, 2), dense(A, 2))
    assert gradcheck(lambda A: truncate(A, 2), A.requires_grad_(), fast_mode=True)


def test_a_map_gets_its_gradients():
    W0, B, A, G = gaussian(9, 7), gaussian(9, 2), gaussian(2, 7), gaussian(9, 7).flip(0)

    def tuned(W0, B, A):
        return truncate(Scaled(Dense(W0) + LowRank(B, A, 0.3), 2.0), 3)

    def formed(W0, B, A):
        return dense(2 * (W0 + 0.3 * B @ A), 3)

    torch.testing.assert_close(tuned(W0, B, A), formed(W0, B, A))
    for ours, theirs in some(
        zip(
            *(
                torch.func.grad(lambda *x, f=f: (G * f(*x)).sum(), argnums=(0, 1, 2))(W0, B, A)
                for f in (tuned, formed)
            ),
            strict=True,
        )
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    leaves = [x.requires_grad_() for x in (W0, B, A)]
    assert gradgradcheck(tuned, leaves, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
def test_float32_ends_exact_to_float32(shape):
    sigma = torch.cat([torch.full((5,), 2.0), torch.linspace(1.9, 0.01, 195)])
    A, G = with_spectrum(*shape, sigma), gaussian(*shape)
    ours, reference = (
        torch.func.grad(lambda A: (G.to(A) * truncate(A, 5)).sum())(X) for X in (A.float(), A)
    )
    assert ours.dtype == torch.float32
    assert float((ours.double() - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back(dtype):
    A = gaussian(12, 9).to(dtype).requires_grad_()
    low = truncate(A, 2)
    assert low.dtype == dtype
    low.sum().backward()
    assert A.grad.dtype == dtype
    assert truncate(A, 9).dtype == dtype


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("gap", [0.0, 1e-15])
def test_a_tie_at_the_cut_is_never_silent(gap, mode):
    A = made((9, 7), [3.0, 2.0 + gap, 2.0, 0.5, 0.3, 0.2, 0.1])
    G = gaussian(9, 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if mode == "reverse":
                torch.func.grad(lambda A: (G * truncate(A, 2)).sum())(A)
            else:
                torch.func.jvp(lambda A: truncate(A, 2), (A,), (G,))
        except ConvergenceError:
            return
    assert [
        w for w in caught if w.category is DegenerateWarning and "relative gap" in str(w.message)
    ]


@pytest.mark.parametrize("loss", [lambda low: low[0, 0], torch.sum], ids=["one entry", "all"])
def test_a_tie_at_the_cut_is_warned_of_in_its_own_words(loss):
    """Also where the loss asks for a part that this choice of basis does not move."""
    A = torch.eye(3, dtype=torch.float64).requires_grad_()
    with pytest.warns(
        DegenerateWarning, match=r"truncate\(A, k=2\): σ_2 and σ_3 .* choose a k"
    ) as w:
        loss(truncate(A, 2)).backward()
    assert "vector" not in str(w[0].message)
    loss(truncate(torch.diag(torch.tensor([2.0, 2.0, 1.0])).requires_grad_(), 2)).backward()


def test_a_rank_below_k_has_no_derivative():
    A = (orthonormal(6, 2) @ orthonormal(5, 2, 1).mT).requires_grad_()
    torch.testing.assert_close(truncate(A, 3), A)
    with pytest.raises(InputError, match=r"singular value 2 \(from 0\) is zero to rounding"):
        truncate(A, 3).sum().backward()
    with pytest.warns(DegenerateWarning, match="theirs is NaN"):
        _, tangent = torch.func.jvp(lambda A: truncate(A, 3), (A.detach(),), (gaussian(6, 5),))
    assert torch.isnan(tangent).all()


def test_the_whole_rank_is_the_matrix_itself():
    A = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    low = truncate(A, 3)
    assert torch.equal(low, A)
    (G,) = torch.autograd.grad(low.sum(), A)
    assert torch.equal(G, torch.ones(4, 3, dtype=torch.float64))


def test_errors():
    A = gaussian(5, 4)
    for k in (0, 5, 1.5):
        with pytest.raises(InputError, match="expected 1 ≤ k ≤ 4"):
            truncate(A, k)
    with pytest.raises(InputError, match="expected solver to be an object"):
        truncate(A, 2, solver="krylov")
    with pytest.raises(InputError, match="NaN or Inf"):
        truncate(A / 0, 2)
    with pytest.raises(ConvergenceError, match="raise max_steps"):
        truncate(gaussian(90, 80), 2, solver=BlockKrylov(max_steps=1))
    assert truncate(gaussian(90, 80), 2, solver=BlockKrylov(max_steps=1), strict=False).shape
    torch.testing.assert_close(truncate(A, 2, generator=generator()), dense(A, 2))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_one_graph_under_compile():
    A, G = made((6, 5), SPECTRA["pair"]), gaussian(6, 5)

    def gradient(A):
        return torch.func.grad(lambda A: (G * truncate(A, 2)).sum())(A)

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A), gradient(A))
