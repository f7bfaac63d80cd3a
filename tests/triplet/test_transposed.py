"""A map whose rmatmat is not the transpose of its matmat is named, whatever the solver."""

from dataclasses import replace

import pytest
import torch
from test_solvers import MAY_STOP, SOLVERS

from bulkedge import InputError
from bulkedge._linmap import Counted
from bulkedge.intruder import certify
from bulkedge.triplet import Dense, LinearMap, Status, singular_triplet
from cases import MATRICES, gaussian, with_spectrum


class Wrong(LinearMap):
    """W, with a transposed product of one's own."""

    def __init__(self, W, transposed):
        self.W, self.transposed = W, transposed
        self.shape, self.dtype, self.device = tuple(W.shape), W.dtype, W.device

    def matmat(self, X):
        return self.W @ X

    def rmatmat(self, Y):
        return self.transposed(self.W, Y)

    def to_dense(self):
        return self.W

    @property
    def tensors(self):
        return (self.W,)

    def with_tensors(self, *tensors):
        return Wrong(*tensors, self.transposed)


WRONG = {
    "twice": lambda W, Y: 2 * (W.mT @ Y),
    "minus": lambda W, Y: -(W.mT @ Y),
    "five percent": lambda W, Y: 1.05 * (W.mT @ Y),
    "rows turned": lambda W, Y: W.mT.roll(1, 0) @ Y,
    "nothing": lambda W, Y: 0 * (W.mT @ Y),
}
KINDS = {
    "f64": torch.float64,
    "f32": torch.float32,
    "widened": torch.bfloat16,
}
SHAPES = [(16, 12), (12, 16)]
# enough for a matrix that is one, too many for the patience of a test where it is none
STEPS = {"power": 100, "gradient": 100, "riemannian": 20}
FOUND = {
    name: replace(solver, max_steps=STEPS[name]) if name in STEPS else solver
    for name, solver in SOLVERS.items()
    if name not in ("dense", "narrow", "short_golub_kahan", "newton", "rayleigh")
}


def matrix(shape, kind):
    W = with_spectrum(*shape, torch.linspace(3, 1, min(shape)) ** 2)
    return W.to(KINDS[kind]).to(torch.float32 if kind == "widened" else KINDS[kind])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("solver", FOUND)
def test_a_wrong_transpose_is_named(solver, wrong, shape, kind, k):
    if solver == "auto" and 4 * k >= min(shape):
        pytest.skip("a dense SVD, which multiplies nothing")
    A = Wrong(matrix(shape, kind), WRONG[wrong])
    named = rf"rmatmat of Wrong\({shape[0]}×{shape[1]}.* compare both with to_dense"
    with pytest.raises(InputError, match=named):
        singular_triplet(A, k, solver=FOUND[solver])


@pytest.mark.parametrize("solver", ["auto", "lanczos", "block_krylov", "golub_kahan"])
def test_a_transpose_that_is_off_by_a_thousandth_is_named_in_float32(solver):
    """Its residuals are above the tolerance by which the recurrences have ended."""
    A = Wrong(gaussian(500, 400).float(), lambda W, Y: 1.001 * (W.mT @ Y))
    with pytest.raises(InputError, match=r"rmatmat of Wrong\(500×400.* compare both with to_dense"):
        singular_triplet(A, 1, solver=SOLVERS[solver])


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_widened_matrix_is_not(solver, name):
    """Nor are those of `test_solvers.py`, in float32 and float64."""
    if solver == "gradient" or (solver, name) in MAY_STOP:
        pytest.skip("thousands of steps")
    W = MATRICES[name](90, 40).to(torch.bfloat16)
    found = singular_triplet(Dense(W).to(torch.float32), 3, solver=SOLVERS[solver])
    assert found.status is Status.CONVERGED


@pytest.mark.parametrize("solver", ["lanczos", "golub_kahan", "block_krylov"])
@pytest.mark.parametrize("mean", [1.0, 300.0])
def test_rounding_of_long_sums_is_not(solver, mean):
    """Entries of one sign lose most."""
    W = (gaussian(1000, 250) + mean).float()
    assert singular_triplet(W, solver=SOLVERS[solver]).status is Status.CONVERGED


@pytest.mark.parametrize("wrong", WRONG)
def test_a_certificate_names_it_too(wrong):
    Y = torch.linalg.qr(gaussian(40, 2)).Q
    with pytest.raises(InputError, match=r"rmatmat of Wrong|other than zero|exceed rounding"):
        certify(Wrong(matrix((40, 30), "f64"), WRONG[wrong]), Y)


@pytest.mark.parametrize("solver", ["lanczos", "golub_kahan", "block_krylov"])
def test_nothing_is_multiplied_for_it(solver):
    A = Counted(Dense(matrix((40, 30), "f64")))
    found = singular_triplet(A, solver=SOLVERS[solver])
    assert found.passes == A.passes[0]
