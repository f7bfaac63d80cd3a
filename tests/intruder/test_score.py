import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bulkedge import InputError
from bulkedge.intruder import BaseVectors, Verdict, base_vectors, scores, verdict
from bulkedge.triplet import thin_svd
from cases import gaussian, orthonormal, with_spectrum
from helpers import oracle_scores


def judge(W0, Y, subspace=20):
    U, S, _ = torch.linalg.svd(W0, full_matrices=False)
    return scores(Y, base_vectors(U, S, tuple(W0.shape)), subspace)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)], ids=str)
def test_score_is_the_published_definition(shape):
    W0 = gaussian(*shape)
    W = W0 + 12 * orthonormal(shape[0], 1, 3) @ orthonormal(shape[1], 1, 4).mT
    Y = torch.linalg.svd(W, full_matrices=False).U[:, :10]
    torch.testing.assert_close(judge(W0, Y).score, oracle_scores(W0, W, 10))


def test_matched_index_and_overlap_point_at_the_base_vector():
    W0 = with_spectrum(30, 30, torch.arange(30, 0, -1))
    U = torch.linalg.svd(W0).U
    Y = torch.stack([U[:, 4], (U[:, 2] + U[:, 25]) / 2**0.5], dim=1)
    result = judge(W0, Y, subspace=10)
    assert result.matched_index[0] == 4
    assert result.matched_index[1] in (2, 25)
    torch.testing.assert_close(result.score, torch.tensor([1.0, 0.5**0.5], dtype=torch.float64))
    torch.testing.assert_close(result.subspace_overlap[1] ** 2, torch.tensor(0.5).double())


def test_equal_values_are_scored_by_their_common_space():
    # a rotation inside the eigenspace of an orthogonal matrix is nothing new
    Q = orthonormal(20, 20, 1)
    Y = orthonormal(20, 3, 2)
    result = judge(Q, Y)
    torch.testing.assert_close(result.score, torch.ones(3, dtype=torch.float64))
    one_by_one = (torch.linalg.svd(Q).U.mT @ Y).abs().max()
    assert one_by_one < 0.95  # what the definition read literally would have given


@pytest.mark.parametrize("noise", [1e-9, 1e-12])
def test_a_dense_tail_is_no_eigenspace(noise):
    """Values a little above rounding, each near the next, are not all one value."""
    sigma = torch.cat([torch.tensor([9.0, 8, 7, 6, 5]), noise * torch.linspace(2, 1, 165)])
    W0 = with_spectrum(200, 170, sigma.double())
    Y = orthonormal(200, 1, 9)
    literal = (thin_svd(W0)[0].mT @ Y).abs().max()
    assert judge(W0, Y).score.item() < 2 * literal.item() + 0.05


@pytest.mark.parametrize("n", [50, 300, 900])
def test_all_values_of_an_orthogonal_matrix_are_one(n):
    U, S, _ = thin_svd(orthonormal(n, n, n))
    assert int(base_vectors(U, S, (n, n)).eigenspace[-1]) == 0


def test_the_match_lies_in_the_best_space():
    base = BaseVectors(torch.eye(4, dtype=torch.float64), torch.tensor([0, 1, 1, 2]))
    y = torch.tensor([[0.0], [0.55], [0.55], [0.6]], dtype=torch.float64)
    result = scores(y / y.norm(), base, 2)
    assert result.matched_index.item() == 1  # not 3, the largest single cosine


def test_null_space_of_the_base_does_not_count():
    W0 = with_spectrum(
        20, 20, torch.where(torch.arange(20) < 5, 1.0, 0.0) * torch.arange(20, 0, -1)
    )
    null = torch.linalg.svd(W0).U[:, 12:13]
    assert judge(W0, null).score.item() < 1e-7


def test_zero_base_makes_everything_new():
    result = judge(torch.zeros(6, 4, dtype=torch.float64), orthonormal(6, 2))
    assert result.score.tolist() == [0.0, 0.0]
    assert result.matched_index.tolist() == [-1, -1]


@given(seed=st.integers(0, 2**31), sign=st.sampled_from([-1.0, 1.0]), factor=st.floats(1e-6, 1e6))
def test_score_ignores_sign_scale_and_rotation_of_both(seed, sign, factor):
    W0, Y = gaussian(16, 12), orthonormal(16, 3, seed)
    Q = orthonormal(16, 16, seed + 1)
    expected = judge(W0, Y).score
    torch.testing.assert_close(judge(W0, sign * Y).score, expected)
    torch.testing.assert_close(judge(factor * W0, Y).score, expected)
    torch.testing.assert_close(judge(Q @ W0, Q @ Y).score, expected)


@given(seed=st.integers(0, 2**31))
def test_scores_are_cosines_and_no_larger_than_the_whole_overlap(seed):
    W0, Y = gaussian(16, 12), orthonormal(16, 3, seed)
    result = judge(W0, Y, subspace=12)
    assert ((result.score >= 0) & (result.score <= result.subspace_overlap + 1e-12)).all()


@pytest.mark.parametrize(
    ("score", "overlap", "error", "expected"),
    [
        (0.50, 0.5, 0.0, Verdict.ALIGNED),
        (0.51, 0.5, 0.0, Verdict.ALIGNED),
        (0.49, 0.71, 0.0, Verdict.ROTATED),
        (0.49, 0.70, 0.0, Verdict.INTRUDER),
        (0.10, 0.1, 0.3, Verdict.INTRUDER),
        (0.40, 0.9, 0.2, Verdict.UNDECIDED),
        (0.60, 0.9, 0.2, Verdict.UNDECIDED),
        (0.10, 0.70, 0.05, Verdict.UNDECIDED),  # √½ = 0.707 lies within the error of the overlap
        (0.10, 0.70, 0.005, Verdict.INTRUDER),
    ],
)
def test_verdict(score, overlap, error, expected):
    assert verdict(score, overlap, epsilon=0.5, vector_error=error) is expected


def test_vectors_and_values_must_match():
    with pytest.raises(InputError, match="expected as many vectors as values, got 4 and 3"):
        base_vectors(torch.eye(4), torch.ones(3), (4, 4))
