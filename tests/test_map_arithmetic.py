"""Maps with + − · / @ and signs: what a matrix gives, or an error that says what to do."""

import operator

import pytest
import torch

from bulkedge import InputError, singular_triplet
from bulkedge._linmap import Counted, RowScaled, Upcast
from bulkedge.triplet import Adjoint, Dense, LowRank, Scaled, Sum
from cases import gaussian
from test_linmap import MAPS, W0, A, B, D

OTHERS = {"map": LowRank(B, A, 0.5), "tensor": 0.5 * B @ A}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("operation", [operator.add, operator.sub])
def test_sums_and_differences(name, other, operation):
    """On either side; the oracle is the same with matrices."""
    linmap, matrix = MAPS[name]
    added, exact = OTHERS[other], OTHERS["tensor"]
    if linmap.shape != exact.shape:
        added, exact = added.T, exact.T
    for found, expected in (
        (operation(linmap, added), operation(matrix, exact)),
        (operation(added, linmap), operation(exact, matrix)),
    ):
        torch.testing.assert_close(found.to_dense(), expected)
        X = gaussian(linmap.shape[1], 2)
        torch.testing.assert_close(found @ X, expected @ X)


@pytest.mark.parametrize("name", MAPS)
def test_products_with_numbers_vectors_and_matrices(name):
    linmap, matrix = MAPS[name]
    m, n = linmap.shape
    for found, expected in (
        (-linmap, -matrix), (linmap * 3, matrix * 3), (0.5 * linmap, 0.5 * matrix),
        (linmap / 4, matrix / 4), (sum([linmap, linmap]), 2 * matrix),
    ):  # fmt: skip
        torch.testing.assert_close(found.to_dense(), expected)
    X, x, Y, y = gaussian(n, 3), gaussian(n, 1)[:, 0], gaussian(3, m), gaussian(1, m)[0]
    for found, expected in (
        (linmap @ X, matrix @ X), (linmap @ x, matrix @ x),
        (Y @ linmap, Y @ matrix), (y @ linmap, y @ matrix),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected)


def test_gradients_go_through_all_of_it():
    tensors = [x.clone().requires_grad_() for x in (W0, B, A)]
    linmap = 2 * (Dense(tensors[0]) - LowRank(*tensors[1:])) / 3
    sigma = singular_triplet(-linmap).sigma.sum()
    found = torch.autograd.grad(sigma, tensors)
    dense = -2 * (tensors[0] - tensors[1] @ tensors[2]) / 3
    expected = torch.autograd.grad(torch.linalg.matrix_norm(dense, 2), tensors)
    torch.testing.assert_close(found, expected)


def test_a_map_is_printed_by_what_it_is():
    W = 2.0 * (Dense(W0.float()) + LowRank(B.float(), A.float(), 0.5)).T
    assert repr(W) == "2.0 * ((Dense(7×5, float32) + 0.5 * LowRank(7×5, rank 2, float32)).T)"
    assert repr(RowScaled(Dense(W0), D)) == "RowScaled(7×5, float64)"
    assert repr(Counted(Upcast(W0.half()))) == "Counted(7×5, float64)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(W0) + W0.T, "expected maps of one shape, dtype and device"),
        (lambda: Dense(W0) + W0.float(), "expected maps of one shape, dtype and device"),
        (lambda: Dense(W0) + 1.0, "expected a torch tensor or a LinearMap, got float"),
        (lambda: 1 + Dense(W0), "expected a map or a matrix to add to a map, got 1"),
        (lambda: Dense(W0) - None, "expected a torch tensor or a LinearMap, got NoneType"),
        (lambda: Dense(W0) + W0[0], r"floating-point matrix, got shape \(5,\)"),
        (lambda: Dense(W0) * torch.tensor(2.0), "would have no gradient: pass float"),
        (lambda: Dense(W0) * float("nan"), "expected a finite number to scale a map by, got nan"),
        (lambda: Dense(W0) * W0, "expected a finite number to scale a map by, got a tensor"),
        (lambda: Dense(W0) * "2", "expected a finite number to scale a map by, got '2'"),
        (lambda: Dense(W0) / 0, "expected a number other than 0 to divide by, got 0"),
        (lambda: Dense(W0) @ Dense(W0.T), "multiply a map with, got Dense; of another map"),
        (lambda: Dense(W0) @ W0, r"expected a tensor \(5,\) or \(5, b\).*got \(7, 5\)"),
        (lambda: W0 @ Dense(W0), r"expected a tensor \(7,\) or \(b, 7\).*got \(7, 5\)"),
        (lambda: Dense(W0) @ W0.T.float(), r"of torch\.float64 on cpu .* torch\.float32"),
        (lambda: Sum([Dense(W0), "W"]), "expected a torch tensor or a LinearMap, got str"),
        (lambda: Adjoint("W"), "expected a torch tensor or a LinearMap, got str"),
        (lambda: Scaled(Dense(W0), True), "expected a finite number to scale a map by, got True"),
        (lambda: RowScaled(None, D), "expected a torch tensor or a LinearMap, got NoneType"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(make, message):
    with pytest.raises(InputError, match=message):
        make()
