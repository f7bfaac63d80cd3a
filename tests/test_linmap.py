import pytest
import torch

from bulkedge import InputError
from bulkedge._linmap import Adjoint, Dense, LowRank, Sum, as_map
from cases import gaussian

W0, B, A = gaussian(7, 5), gaussian(7, 2), gaussian(2, 5)
MAPS = {
    "dense": (Dense(W0), W0),
    "low_rank": (LowRank(B, A, 0.5), 0.5 * B @ A),
    "sum": (Dense(W0) + LowRank(B, A, 2.0), W0 + 2 * B @ A),
    "adjoint": (Adjoint(LowRank(B, A)), (B @ A).T),
    "adjoint_twice": (Dense(W0).T.T, W0),
    "nested_sum": (Sum([Dense(W0), Dense(W0) + LowRank(B, A)]), 2 * W0 + B @ A),
}


@pytest.mark.parametrize("name", MAPS)
def test_products_equal_those_of_the_dense_matrix(name):
    linmap, matrix = MAPS[name]
    m, n = linmap.shape
    assert (m, n) == matrix.shape
    X, Y = gaussian(n, 3), gaussian(m, 3)
    torch.testing.assert_close(linmap.matmat(X), matrix @ X)
    torch.testing.assert_close(linmap.rmatmat(Y), matrix.T @ Y)
    torch.testing.assert_close(linmap.to_dense(), matrix)
    torch.testing.assert_close(linmap.T.matmat(Y), matrix.T @ Y)
    torch.testing.assert_close(linmap.T.to_dense(), matrix.T)
    assert (linmap.T.dtype, linmap.T.device) == (matrix.dtype, matrix.device)


@pytest.mark.parametrize("shape", [(9, 4), (3, 8), (2, 2)])
def test_low_rank_singular_values_equal_the_dense_ones(shape):
    m, n = shape
    linmap = LowRank(gaussian(m, 3), gaussian(3, n), scale=-1.5)
    expected = torch.linalg.svdvals(linmap.to_dense())
    found = linmap.singular_values()
    torch.testing.assert_close(found[: len(expected)], expected[: len(found)])


def test_as_map_leaves_maps_alone():
    assert as_map(MAPS["sum"][0]) is MAPS["sum"][0]
    assert as_map(W0).matrix is W0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(torch.ones(3)), r"floating-point matrix, got shape \(3,\)"),
        (lambda: Dense(torch.ones(3, 3, dtype=torch.int64)), "int64"),
        (lambda: LowRank(B, gaussian(3, 5)), r"got \(7, 2\) and \(3, 5\)"),
        (lambda: LowRank(B, A.float()), "factors alike, got B torch.float64"),
        (lambda: Dense(W0) + Dense(W0.T), "maps of one shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
