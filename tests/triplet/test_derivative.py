"""The derivative rule: every forward × backward solver against finite differences and LAPACK."""

import dataclasses
import itertools

import pytest
import torch
from test_solvers import SOLVERS
from torch.autograd import gradcheck, gradgradcheck

from bulkedge import ConvergenceError, InputError
from bulkedge._linmap import Counted
from bulkedge.triplet import (
    KKT,
    AugmentedLeastSquares,
    DeflatedCG,
    Dense,
    ExplicitSVD,
    LowRank,
    Minres,
    PushThrough,
    Scaled,
    singular_triplet,
)
from bulkedge.triplet._small import Small
from cases import gaussian, generator, orthonormal, with_spectrum
from helpers import some

ADJOINTS = {
    "deflated_cg": DeflatedCG(),
    "minres": Minres(),
    "kkt": KKT(),
    "augmented": AugmentedLeastSquares(),
    "backward_substitution": PushThrough("backward"),
    "forward_substitution": PushThrough("forward"),
    "explicit_svd": ExplicitSVD(),
}
SHAPES = [(4, 6), (5, 5), (7, 4)]


def small(m, n):
    """A generic matrix whose values keep apart, so that differences of 1e-6 are small."""
    return with_spectrum(m, n, torch.tensor([3.0, 2.0, 1.2, 0.5, 0.2]), seed=5)


def outputs(A, k=1, **options):
    """Everything that the signs leave alone."""
    t = singular_triplet(A, k, **options)
    return t.sigma, t.u[:, None] * t.v[None], t.u[:, None] * t.u[None]


def dense_outputs(A, k=1):
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    u, v = U[:, :k], Vt[:k].mT
    return S[:k], u[:, None] * v[None], u[:, None] * u[None]


def loss(function):
    """A combination of the outputs in which no two entries weigh the same."""

    def value(*args, **options):
        parts = torch.cat([part.flatten() for part in function(*args, **options)])
        return (torch.arange(1, len(parts) + 1, dtype=torch.float64).sin().to(parts) * parts).sum()

    return value


def pairs():
    """Every solver with every adjoint, of one shape and k that change; the default one of all."""
    for i, solver in enumerate(sorted(set(SOLVERS) - {"narrow", "restarted"})):
        for j, adjoint in enumerate(ADJOINTS):
            for number, (shape, k) in enumerate(itertools.product(SHAPES, (1, 2))):
                quick = solver == "auto" or (i + j) % 6 == number
                yield pytest.param(
                    solver, adjoint, shape, k, id=f"{solver}-{adjoint}-{shape}-{k}",
                    marks=[] if quick else [pytest.mark.slow],
                )  # fmt: skip


@pytest.mark.parametrize(("solver", "adjoint", "shape", "k"), [*pairs()])
def test_first_and_second_derivatives(solver, adjoint, shape, k):
    options = {"solver": SOLVERS[solver], "adjoint": ADJOINTS[adjoint]}

    def function(A):
        return outputs(A, k, **options)

    A = small(*shape).requires_grad_()
    assert gradcheck(function, A, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, A, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((4, 6), 3),
        ((5, 5), 1),
        ((7, 4), 1),
        pytest.param((5, 5), 3, marks=pytest.mark.slow),
        pytest.param((7, 4), 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_entry_of_every_jacobian(shape, k):
    A = small(*shape).requires_grad_()

    def function(A):
        return outputs(A, k)

    assert gradcheck(function, A, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, A, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("shape", [(40, 25), (30, 30), (25, 40)], ids=str)
@pytest.mark.parametrize("k", [1, 4])
def test_agreement_with_the_full_svd(adjoint, shape, k):
    A = gaussian(*shape)
    ours = torch.func.grad(loss(outputs))(A, k, adjoint=ADJOINTS[adjoint])
    theirs = torch.func.grad(loss(dense_outputs))(A, k)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def test_a_pair_of_maps_gets_its_gradients_unformed(monkeypatch):
    W0, B, A = small(6, 5), gaussian(6, 2), gaussian(2, 5)

    def tuned(W0, B, A):
        return outputs(Scaled(Dense(W0) + LowRank(B, A, 0.3), 2.0), 2)

    def formed(W0, B, A):
        return dense_outputs(2 * (W0 + 0.3 * B @ A), 2)

    ours = torch.func.grad(loss(tuned), argnums=(0, 1, 2))(W0, B, A)
    theirs = torch.func.grad(loss(formed), argnums=(0, 1, 2))(W0, B, A)
    for a, b in some(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    leaves = [x.requires_grad_() for x in (W0, B, A)]
    assert gradgradcheck(tuned, leaves, fast_mode=True, check_fwd_over_rev=True)
    monkeypatch.setattr(LowRank, "to_dense", None)
    torch.func.grad(loss(tuned))(gaussian(300, 200), gaussian(300, 2), gaussian(2, 200))


@pytest.mark.parametrize("which", ["both", "u", "v", "sigma"])
def test_only_what_is_asked_for_is_solved(which, monkeypatch):
    products = []
    for name in ("matmat", "rmatmat"):
        original = getattr(Dense, name)
        monkeypatch.setattr(
            Dense, name, lambda self, X, f=original: products.append(X.shape) or f(self, X)
        )
    outside = Small.outside
    monkeypatch.setattr(Small, "outside", lambda *a: products.append(a) or outside(*a))
    A = gaussian(150, 120).requires_grad_()
    t = singular_triplet(A)
    x = gaussian(150, 1)
    value = {
        "both": (t.u * x).sum() + (t.v * x[:120]).sum(),
        "u": (t.u * x).sum(),
        "v": (t.v * x[:120]).sum(),
        "sigma": t.sigma.sum(),
    }[which]
    products.clear()
    value.backward()
    assert (len(products) == 0) == (which == "sigma")
    U, _, Vt = torch.linalg.svd(A)
    sign = torch.sign(U[0, 0] * t.u[0, 0]).detach()
    reference = {
        "both": ((U[:, :1] * x).sum() + (Vt[:1].mT * x[:120]).sum()) * sign,
        "u": (U[:, :1] * x).sum() * sign,
        "v": (Vt[:1].mT * x[:120]).sum() * sign,
        "sigma": torch.linalg.svdvals(A)[0],
    }[which]
    torch.testing.assert_close(A.grad, torch.autograd.grad(reference, A)[0], rtol=1e-8, atol=1e-9)


def test_cotangents_that_are_zero_cost_nothing(monkeypatch):
    A = gaussian(40, 30).requires_grad_()
    t = singular_triplet(A)
    monkeypatch.setattr(Dense, "matmat", None)
    monkeypatch.setattr(Dense, "rmatmat", None)
    (t.sigma.sum() + 0 * t.u.sum() + 0 * t.v.sum()).backward()
    torch.testing.assert_close(A.grad, (t.u @ t.v.mT).detach())


INVARIANT = {
    "all of u": lambda t: t.u.pow(4).sum(),
    "first u": lambda t: t.u[:, 0].pow(4).sum(),
    "u and v": lambda t: (t.u @ t.v.mT).pow(3).sum(),
    "projector": lambda t: (t.u @ t.u.mT).pow(3).sum(),
    "nothing": lambda t: t.u.square().sum() + (t.v * t.sigma).square().sum(),
}


@pytest.mark.parametrize("adjoint", ["deflated_cg", "minres"])
@pytest.mark.parametrize("loss", INVARIANT)
@pytest.mark.parametrize("shape", [(40, 40), (44, 40), (40, 44)], ids=str)
def test_all_vectors_cost_no_more_than_half_of_them(shape, loss, adjoint):
    """What is orthogonal to all of them is rounding, and no system is solved for it."""

    def passes(k):
        A = Counted(Dense(gaussian(*shape).requires_grad_()))
        found = singular_triplet(A, k, adjoint=ADJOINTS[adjoint])
        before = A.passes[0]
        (G,) = torch.autograd.grad(INVARIANT[loss](found), A.tensors, create_graph=True)
        first = A.passes[0] - before
        G.pow(3).sum().backward()
        return first, A.passes[0] - before - first

    half = passes(20)
    for k in (38, 39, 40):
        assert all(a <= b for a, b in zip(passes(k), half, strict=True))
    assert loss != "nothing" or half[0] == 0


def test_functional_transforms_agree_with_dense_ones():
    A, batch = small(5, 4), torch.stack([small(5, 4) + 0.1 * i for i in range(3)])
    f, g = (loss(function) for function in (outputs, dense_outputs))
    func = torch.func
    for transform in (
        func.grad,
        func.jacrev,
        func.jacfwd,
        func.hessian,
        lambda f: func.jacrev(func.jacrev(f)),
        lambda f: func.jacrev(func.jacfwd(f)),
    ):
        torch.testing.assert_close(transform(f)(A), transform(g)(A), rtol=1e-9, atol=1e-9)
    for transform in (
        func.vmap,
        lambda f: func.vmap(func.grad(f)),
        lambda f: func.grad(lambda X: func.vmap(f)(X).sum()),
        lambda f: func.vmap(func.jacfwd(f)),
        lambda f: func.vmap(func.hessian(f)),
    ):
        torch.testing.assert_close(transform(f)(batch), transform(g)(batch), rtol=1e-9, atol=1e-9)


def test_forward_over_forward_is_refused_not_wrong():
    with pytest.raises(InputError, match=r"jacfwd\(jacrev"):
        torch.func.jacfwd(torch.func.jacfwd(loss(outputs)))(small(4, 3))


@pytest.mark.parametrize("adjoint", [DeflatedCG(max_steps=2), Minres(max_steps=2)], ids=repr)
def test_an_adjoint_that_stops_short_says_so(adjoint):
    A = gaussian(60, 50).requires_grad_()
    with pytest.raises(ConvergenceError, match="raise max_steps of the adjoint"):
        loss(outputs)(A, adjoint=adjoint).backward()


def test_bad_substitution():
    with pytest.raises(InputError, match='expected substitution to be "backward" or "forward"'):
        PushThrough("sideways")


@pytest.mark.parametrize("adjoint", ["deflated_cg", "minres"])
@pytest.mark.parametrize("shape", [(500, 400), (300, 500)], ids=str)
def test_float32_ends_exact_to_float32(shape, adjoint):
    """Close values multiply rounding by σ/gap: here by 300, and the error stays below 1e-5."""
    A = gaussian(*shape).float()
    reference = torch.func.grad(loss(dense_outputs))(A.double())
    ours = torch.func.grad(loss(outputs))(A, adjoint=ADJOINTS[adjoint])
    assert ours.dtype == torch.float32
    error = (ours.double() - reference).norm() / reference.norm()
    assert float(error) < 1e-5


def test_a_hundred_float32_gradients_are_right_or_warned_of():
    worst = 0.0
    for seed in range(100):
        A = torch.randn(64, 64, generator=generator(seed))
        reference = torch.func.grad(loss(dense_outputs))(A.double())
        ours = torch.func.grad(loss(outputs))(A).double()  # a warning would be an error here
        worst = max(worst, float((ours - reference).norm() / reference.norm()))
    assert worst < 1e-4


@pytest.mark.slow
def test_a_thousand_float32_gradients_are_right_or_warned_of():
    """The seeds' author's code fails on a quarter of these, by up to 0.9."""
    worst = 0.0
    for seed in range(1000):
        A = torch.randn(256, 256, generator=generator(seed))
        reference = torch.func.grad(loss(outputs))(A.double())
        ours = torch.func.grad(loss(outputs))(A).double()
        worst = max(worst, float((ours - reference).norm() / reference.norm()))
    assert worst < 1e-3


@pytest.mark.parametrize("exponent", [-140, -30, 30, 140])
def test_the_scale_of_a_matrix_does_not_matter(exponent):
    A = gaussian(40, 30)
    factor = 10.0**exponent

    def vectors_only(A):
        return outputs(A)[1:]

    plain = torch.func.grad(loss(vectors_only))(A)
    scaled = torch.func.grad(loss(vectors_only))(A * factor) * factor
    torch.testing.assert_close(scaled, plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_in_float32(dtype):
    A = gaussian(30, 20).to(dtype).requires_grad_()
    t = singular_triplet(A, 2)
    assert {t.sigma.dtype, t.u.dtype, t.v.dtype} == {torch.float32}
    value = loss(outputs)(A, 2)
    value.backward()
    assert A.grad.dtype == dtype
    reference = torch.func.grad(loss(dense_outputs))(A.detach().double(), 2)
    error = (A.grad.double() - reference).norm() / reference.norm()
    assert float(error) < 2 * torch.finfo(dtype).eps


def test_autocast_does_not_reach_inside():
    A = gaussian(40, 30).float()
    plain = torch.func.grad(loss(outputs))(A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.func.grad(loss(outputs))(A)
    torch.testing.assert_close(inside, plain, rtol=1e-4, atol=1e-4)


def test_strategies_are_values():
    for strategy in (*ADJOINTS.values(), *SOLVERS.values()):
        assert dataclasses.is_dataclass(strategy)
        assert strategy == dataclasses.replace(strategy)
        with pytest.raises(dataclasses.FrozenInstanceError):
            strategy.anything = 1


def test_interior_triplets_are_differentiated_through_the_block():
    """A loss of the third triplet alone: indefinite K, near neighbours on both sides."""
    sigma = torch.tensor([2.0, 1.01, 1.0, 0.99, 0.3])
    A = (orthonormal(8, 5) * sigma) @ orthonormal(6, 5, 1).mT

    def third(function):
        return lambda A: (function(A, 3)[1][..., 2] * gaussian(8, 6)).sum()

    ours, theirs = (torch.func.grad(third(f))(A.double()) for f in (outputs, dense_outputs))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
