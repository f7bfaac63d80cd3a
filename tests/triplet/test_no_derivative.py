"""Zero, rank-deficient and tied matrices: each derivative is refused, warned of, or right."""

import pytest
import torch
from test_solvers import SOLVERS

from bulkedge import DegenerateWarning, InputError
from bulkedge.spectral import cap, normalize, spectral_norm
from bulkedge.triplet import Dense, LowRank, singular_triplet, truncate
from cases import gaussian, with_spectrum
from helpers import some

F64 = torch.float64
K = 2
MATRICES = {
    "zero": torch.zeros(6, 5, dtype=F64),
    "rank one": with_spectrum(6, 5, torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0])),
    "rank one, axes": torch.zeros(6, 5, dtype=F64).index_fill_(1, torch.tensor([0]), 1.0),
    "tie inside": with_spectrum(6, 5, torch.tensor([2.0, 2.0, 1.0, 0.5, 0.2])),
    "tie at the cut": with_spectrum(6, 5, torch.tensor([3.0, 2.0, 2.0, 0.5, 0.2])),
    "tie at the cut, axes": torch.eye(6, 5, dtype=F64) * torch.tensor([3.0, 2.0, 2.0, 0.5, 0.2]),
}


def corner(A):
    """The direction of the last entry: vectors that are axes are orthogonal to it."""
    E = torch.zeros_like(A)
    E[-1, -1] = 1.0
    return E


DIRECTIONS = {"all": torch.ones_like, "corner": corner, "random": lambda A: gaussian(*A.shape)}


def by_hand(A):
    t = singular_triplet(A, K)
    return (t.u * t.sigma[..., None, :]) @ t.v.mT


def projector(A):
    t = singular_triplet(A, K)
    return t.u @ t.v.mT


def values(A):
    return singular_triplet(A, K).sigma


# right: the derivative; supports: a subgradient of a convex function; refused: InputError
OUTCOMES = {
    truncate: {
        "zero": "refused",
        "rank one": "refused",
        "rank one, axes": "refused",
        "tie inside": "right",
        "tie at the cut": "warned",
        "tie at the cut, axes": "warned",
    },
    by_hand: {"zero": "refused", "rank one": "refused", "rank one, axes": "refused"},
    projector: {"zero": "refused", "rank one": "refused", "rank one, axes": "refused"},
    values: dict.fromkeys(MATRICES, "supports"),
    spectral_norm: dict.fromkeys(MATRICES, "supports"),
    normalize: {"zero": "refused", "rank one": "right", "rank one, axes": "right"},
    cap: dict.fromkeys(("zero", "rank one", "tie at the cut, axes"), "right"),
}
CASES = [
    pytest.param(function, MATRICES[name], outcome, id=f"{function.__name__}, {name}")
    for function, outcomes in OUTCOMES.items()
    for name, outcome in outcomes.items()
]


def result(function, A):
    return function(A, K) if function is truncate else function(A)


def backward(function, A, G):
    A = A.clone().requires_grad_()
    out = result(function, A)
    (out * G).sum().backward()
    return A.grad


def functional(function, A, G):
    return torch.func.grad(lambda A: (result(function, A) * G).sum())(A)


def vmapped(function, A, G):
    batch = torch.stack([A, A])
    return torch.func.vmap(torch.func.grad(lambda A: (result(function, A) * G).sum()))(batch)[1]


def in_a_batch(function, A, G):
    other = with_spectrum(*A.shape, torch.arange(5.0, 0.0, -1.0), seed=9)
    batch = torch.stack([other, A]).requires_grad_()
    (result(function, batch)[1] * G).sum().backward()
    return batch.grad[1]


MODES = (backward, functional, vmapped, in_a_batch)


def dense(function, A):
    """The same function by a dense SVD."""
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    if function is truncate:
        return (U[:, :K] * S[:K]) @ Vt[:K]
    if function is values:
        return S[:K]
    scales = {normalize: 1 / S[0], cap: 1 / S[0].clamp_min(1.0)}
    return A * scales[function] if function in scales else S[0]


def differences(function, A, G, T, h=1e-5):
    return sum(
        sign * (dense(function, A + sign * h * T) * G).sum() / (2 * h) for sign in (1.0, -1.0)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(("function", "A", "outcome"), CASES)
def test_every_derivative_is_refused_or_warned_of_or_right(function, A, outcome, mode, direction):
    of_values = function in (values, spectral_norm)
    G = torch.ones((), dtype=F64) if of_values else DIRECTIONS[direction](A)
    if outcome == "refused" and function is normalize and mode is vmapped:
        assert mode(function, A, G).isnan().all()  # no number can be looked at to refuse it
        return
    if outcome == "refused":
        with pytest.raises(InputError, match=r"is zero to rounding|other than zero"):
            mode(function, A, G)
        return
    if outcome == "warned":
        with pytest.warns(DegenerateWarning, match="have a relative gap"):
            mode(function, A, G)
        return
    gradient = mode(function, A, G)  # a warning would be an error
    for seed in some(range(4)):
        T = gaussian(6, 5).roll(seed, 0)
        if outcome == "right":
            expected = differences(function, A, G, T)
            torch.testing.assert_close((gradient * T).sum(), expected, rtol=1e-6, atol=1e-6)
        else:
            now, moved = (dense(function, X).sum() for X in (A, A + T))
            assert moved >= now + (gradient * T).sum() - 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["zero", "rank one", "rank one, axes"])
def test_every_solver_leaves_the_refusal_to_the_rule(solver, name):
    A = MATRICES[name].clone().requires_grad_()
    for loss in (torch.sum, lambda low: low[-1, -1]):
        low = truncate(A, K, solver=SOLVERS[solver])
        torch.testing.assert_close(low, A)
        with pytest.raises(InputError, match="is zero to rounding"):
            loss(low).backward()


@pytest.mark.parametrize("function", [truncate, by_hand, projector])
def test_a_lora_before_its_first_step_has_no_such_derivative(function):
    B, A = torch.zeros(6, 2, dtype=F64, requires_grad=True), gaussian(2, 5)
    with pytest.raises(InputError, match="is zero to rounding"):
        result(function, LowRank(B, A)).sum().backward()
    result(function, Dense(gaussian(6, 5)) + LowRank(B, A)).sum().backward()
    assert torch.isfinite(B.grad).all()


@pytest.mark.parametrize("name", ["zero", "rank one", "rank one, axes"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("function", [truncate, by_hand, projector])
def test_forward_mode_warns_whatever_the_direction(function, direction, name):
    A = MATRICES[name]
    with pytest.warns(DegenerateWarning, match="theirs is NaN"):
        _, tangent = torch.func.jvp(
            lambda A: result(function, A), (A,), (DIRECTIONS[direction](A),)
        )
    assert tangent.isnan().all()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_graph_that_returns_vectors_keeps_the_gradient_of_values():
    """The graph has cotangents of zero for what the loss leaves out, and nothing else to tell."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda A: tuple(singular_triplet(A))[:3], backend="aot_eager")
    A = MATRICES["zero"].clone().requires_grad_()
    with pytest.warns(DegenerateWarning, match="theirs was taken for 0"):
        compiled(A)[0].sum().backward()
    torch.testing.assert_close(torch.linalg.matrix_norm(A.grad, "nuc"), torch.ones((), dtype=F64))
