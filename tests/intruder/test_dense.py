"""Judged by factors from Gram matrices, where a side is longer than SVDs are cheap for."""

import pytest
import torch

from bulkedge._linmap import Dense, LowRank
from bulkedge.intruder import judge
from bulkedge.intruder._dense import SVD_UP_TO
from intruder.test_counts import basis

N = 2 * SVD_UP_TO


@pytest.fixture(scope="module", params=[(N, N), (N + 9, N), (N, N + 9)], ids=str)
def case(request):
    """Base, tuned matrix, and the left and right scores of its 3 leading directions."""
    (m, n), g = request.param, torch.Generator().manual_seed(0)
    W0 = torch.randn(m, n, generator=g, dtype=torch.float64) / (m**0.5 + n**0.5)
    W0 += basis(m, 1, g).double() @ basis(n, 1, g).double().mT * 4  # a direction that is not new
    u, v = (basis(size, 3, g).double() for size in (m, n))
    update = LowRank(u * torch.tensor([3.0, 2.0, 0.7], dtype=torch.float64), v.mT)
    U0, _, V0t = torch.linalg.svd(W0, full_matrices=False)
    U, _, Vt = torch.linalg.svd(W0 + update.to_dense(), full_matrices=False)
    left = (U0.mT @ U[:, :3]).abs().amax(0)
    return W0, update, {"left": left, "right": (V0t @ Vt[:3].mT).abs().amax(0)}


@pytest.mark.parametrize("sides", [("left",), ("right",), ("left", "right")], ids=str)
def test_scores_are_those_of_svds_for_either_side_alone(case, sides):
    W0, update, scores = case
    found = judge(Dense(W0), Dense(W0) + update, 3, sides=sides, method="dense")
    assert found.method == "dense"
    expected = torch.cat([scores[side] for side in sides])
    ours = torch.tensor([row.score for row in found.directions], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert float(expected.min()) < 0.5 < float(expected.max())


def test_the_leading_base_vectors_of_both_sides_are_given_whatever_side_is_judged(case):
    W0, update, _ = case
    found = judge(Dense(W0), Dense(W0) + update, 3, sides=("left",), method="dense")
    U, sigma, V = found.base
    assert U.shape[1] == len(sigma) == V.shape[1] >= 19
    torch.testing.assert_close(W0 @ V, U * sigma, rtol=0, atol=1e-9)
