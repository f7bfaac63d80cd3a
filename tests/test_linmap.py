import pytest
import torch

from bulkedge import InputError
from bulkedge._linmap import (
    Adjoint,
    Counted,
    Dense,
    Difference,
    LowRank,
    RowScaled,
    Scaled,
    Sum,
    Upcast,
    as_map,
    frobenius,
)
from cases import gaussian
from helpers import some

W0, B, A = gaussian(7, 5), gaussian(7, 2), gaussian(2, 5)
D = gaussian(7, 1).flatten()
MAPS = {
    "dense": (Dense(W0), W0),
    "low_rank": (LowRank(B, A, 0.5), 0.5 * B @ A),
    "sum": (Dense(W0) + LowRank(B, A, 2.0), W0 + 2 * B @ A),
    "adjoint": (Adjoint(LowRank(B, A)), (B @ A).T),
    "adjoint_twice": (Dense(W0).T.T, W0),
    "scaled": (Scaled(Dense(W0) + LowRank(B, A), -3.0), -3 * (W0 + B @ A)),
    "scaled_adjoint": (Scaled(LowRank(B, A, 0.5).T, 2.0), (B @ A).T),
    "row_scaled": (RowScaled(Dense(W0) + LowRank(B, A), D), D.diag() @ (W0 + B @ A)),
    "column_scaled": (RowScaled(Dense(W0).T, D[:5]).T, W0 @ D[:5].diag()),
    "counted": (Counted(Dense(W0) + LowRank(B, A)), W0 + B @ A),
    "difference": (Difference(W0, 2 * W0 + B @ A), -W0 - B @ A),
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
    torch.testing.assert_close(linmap.gram(), matrix.T @ matrix)
    assert linmap.norm_bound() >= (1 - 1e-12) * float(matrix.norm())
    assert (linmap.T.dtype, linmap.T.device) == (matrix.dtype, matrix.device)


@pytest.mark.parametrize("name", MAPS)
def test_derivatives_in_the_tensors_of_a_map(name):
    linmap, _ = MAPS[name]
    m, n = linmap.shape
    L, R = gaussian(m, 2), gaussian(n, 2)
    tangents = tuple(gaussian(t.numel(), 1).reshape(t.shape).flip(0) for t in linmap.tensors)

    def dense(*tensors):
        return linmap.with_tensors(*tensors).to_dense()

    _, pull = torch.func.vjp(dense, *linmap.tensors)
    for found, expected in some(zip(linmap.pullback(L, R), pull(L @ R.mT), strict=True)):
        torch.testing.assert_close(found, expected)
    _, expected = torch.func.jvp(dense, linmap.tensors, tangents)
    moved = linmap.pushforward(*tangents)
    torch.testing.assert_close(moved.to_dense(), expected)
    torch.testing.assert_close(moved.matmat(R), expected @ R)
    torch.testing.assert_close(moved.rmatmat(L), expected.mT @ L)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_widened_maps_multiply_in_float64(name, dtype):
    linmap = MAPS[name][0]
    narrow = linmap.with_tensors(*(tensor.to(dtype) for tensor in linmap.tensors))
    exact = linmap.with_tensors(*(tensor.to(dtype).double() for tensor in linmap.tensors))
    wide = narrow.to(torch.float64)
    m, n = linmap.shape
    X, Y = gaussian(n, 3), gaussian(m, 3)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.matmat(X), exact.matmat(X))
    torch.testing.assert_close(wide.rmatmat(Y), exact.rmatmat(Y))
    torch.testing.assert_close(wide.to_dense(), exact.to_dense())
    again = wide.with_tensors(*wide.tensors)
    torch.testing.assert_close(again.matmat(X), exact.matmat(X))


def test_tiles_of_a_widened_matrix_cover_it():
    matrix = gaussian(200, 30).float()
    wide = Dense(matrix).to(torch.float64)
    torch.testing.assert_close(wide.matmat(gaussian(30, 2)), matrix.double() @ gaussian(30, 2))
    torch.testing.assert_close(
        wide.rmatmat(gaussian(200, 2)), matrix.double().mT @ gaussian(200, 2)
    )


@pytest.mark.parametrize("make", [Dense, Upcast])
def test_gram_matrices_in_strips_and_tiles(make):
    matrix = gaussian(150, 1100)  # more than one tile of rows, and more than two strips of columns
    torch.testing.assert_close(make(matrix).gram(), matrix.mT @ matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frobenius_norm_is_exact_however_many_entries(dtype):
    """Sums of squares in float32 are off by per cents of these."""
    W = torch.full((3000, 4096), 1.1).to(dtype)
    exactly = float(W[0, 0]) * W.numel() ** 0.5  # of equal entries
    summed = float(torch.linalg.vector_norm(W, dtype=torch.float32))
    assert abs(summed / exactly - 1) > 1e-4
    for made in (Dense(W), Dense(W).T, Upcast(W, torch.float32), Dense(W).to(torch.float64)):
        assert made.norm_bound() == pytest.approx(exactly, rel=1e-12)
    assert frobenius(W) == pytest.approx(exactly, rel=1e-12)


@pytest.mark.parametrize("entry", [1e-42, 1e-30, 3e38, float("inf"), float("nan")])
def test_a_frobenius_norm_of_extreme_entries(entry):
    W = torch.full((40, 10), entry)
    assert frobenius(W) == pytest.approx(20 * float(W[0, 0]), rel=1e-12, nan_ok=True)
    assert frobenius(W[:0]) == 0.0


def test_counted_counts_for_its_relatives_too():
    counted = Counted(Dense(W0))
    counted.matmat(gaussian(5, 1))
    counted.to(torch.float64).rmatmat(gaussian(7, 1))
    counted.with_tensors(W0).matmat(gaussian(5, 1))
    counted.T.matmat(gaussian(7, 1))
    assert counted.passes == [4]


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
        (lambda: Dense(torch.ones(3, 3, dtype=torch.int64)), "floating-point matrix, got .*int64"),
        (
            lambda: LowRank(B, gaussian(3, 5)),
            r"factors B \(m, r\) and A \(r, n\), got \(7, 2\) and \(3, 5\)",
        ),
        (lambda: LowRank(B, A, torch.tensor(2.0)), "expected a number as scale, got a tensor"),
        (lambda: LowRank(B, A.float()), "factors alike, got B torch.float64"),
        (lambda: Dense(W0) + Dense(W0.T), "maps of one shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("factors", [gaussian(6, 1).flatten(), gaussian(7, 1), D.float()], ids=str)
def test_row_factors_must_fit(factors):
    with pytest.raises(InputError, match=r"expected 7 factors in torch\.float64, one per row, got"):
        RowScaled(Dense(W0), factors)
