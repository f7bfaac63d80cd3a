from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bulkedge._errors import InputError
from bulkedge.rmt import WhiteBulk
from bulkedge.triplet import thin_svd
from bulkedge.update import (
    BaseSpectrum,
    Expectation,
    Prediction,
    Secular,
    budget,
    predict,
    predict_spikes,
    update_svd,
)
from helpers import MINILM, some, weights
from noise import unit


def spectrum(W0):
    return BaseSpectrum.of(W0)


def minilm(name):
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        return file.get_tensor(f"{name}.weight").double()


def simulated(W0, theta, draws, seed):
    """Location, overlaps and scores, left and right, of what isotropic spikes make: dense SVDs."""
    # in the base's own coordinates, where Haar vectors look the same and scores are entries
    values = np.linalg.svd(W0.numpy(), compute_uv=False)
    rng, (m, n), rows = np.random.default_rng(seed), W0.shape, []
    D = np.zeros((m, n))
    np.fill_diagonal(D, values)
    p = len(values)
    for _ in range(draws):
        u, v = unit(m, rng), unit(n, rng)
        U, S, Vh = np.linalg.svd(D + theta * np.outer(u, v), full_matrices=False)
        k = int(np.abs(u @ U).argmax())
        scores = np.abs(U[:p, k]).max(), np.abs(Vh[k, :p]).max()
        rows.append((S[k], (u @ U[:, k]) ** 2, (Vh[k] @ v) ** 2, *scores))
    return np.array(rows)


BASES = {
    "wide": lambda: weights(120, 200, dtype=torch.float64),
    "tall": lambda: weights(200, 100, dtype=torch.float64),
    "trained": lambda: minilm("encoder.layer.5.attention.output.dense"),
}
DRAWS = {"wide": 100, "tall": 100, "trained": 30}


@pytest.mark.parametrize("ratio", [1.6, 3.0])
@pytest.mark.parametrize("base", BASES)
def test_isotropic_spikes_do_what_is_predicted(base, ratio):
    W0, draws = BASES[base](), DRAWS[base]
    known = spectrum(W0)
    assert known.fit.white is (base != "trained")
    assert known.fit.spikes == 0
    theta = ratio * known.fit.threshold
    found = predict_spikes(known, torch.tensor([theta]))
    rows = simulated(W0, theta, draws, seed=1)
    location, left, right, *_ = rows.mean(0)
    error = float(found.sd) / math.sqrt(draws)
    # the base is one draw itself, and shifts the location by O(1/p) beside the error
    assert abs(location - float(found.location)) < 3 * error + 0.005 * location
    assert rows[:, 0].std(ddof=1) == pytest.approx(float(found.sd), rel=0.25)
    assert left == pytest.approx(float(found.left_overlap), abs=0.04)
    assert right == pytest.approx(float(found.right_overlap), abs=0.04)
    scores = np.median(rows[:, 3:], axis=0)
    assert scores[0] == pytest.approx(float(found.left_score), rel=0.15)
    assert scores[1] == pytest.approx(float(found.right_score), rel=0.15)
    for k, chance in ((3, found.left_new), (4, found.right_new)):
        spread = 3 * math.sqrt(0.05 * 0.95 / draws)
        assert abs((rows[:, k] < 0.5).mean() - float(chance)) < 0.05 + spread
    assert found.place.tolist() == [0]
    assert found.expected == (Expectation.INTRUDER,)


def test_the_chance_of_a_new_direction_follows_epsilon():
    W0 = BASES["wide"]()
    theta = 3 * spectrum(W0).fit.threshold
    rows = simulated(W0, theta, 300, seed=2)
    for epsilon in (0.25, 0.3, 0.4):
        found = predict_spikes(spectrum(W0), torch.tensor([theta]), epsilon=epsilon)
        # the chances swing over most of (0, 1) within these ε; they are up to 0.1 too high
        assert (rows[:, 3] < epsilon).mean() == pytest.approx(float(found.left_new), abs=0.12)
        assert (rows[:, 4] < epsilon).mean() == pytest.approx(float(found.right_new), abs=0.12)
    certain = predict_spikes(spectrum(W0), torch.tensor([theta]), epsilon=1.0)
    assert float(certain.left_new) == float(certain.right_new) == 1.0


def test_the_median_score_is_where_the_chance_is_one_half():
    known = spectrum(BASES["tall"]())
    theta = torch.tensor([40.0, 30.0], dtype=torch.float64)
    found = predict_spikes(known, theta)
    for i, epsilon in some(enumerate(found.left_score.tolist())):
        again = predict_spikes(known, theta, epsilon=epsilon)
        assert float(again.left_new[i]) == pytest.approx(0.5, abs=1e-6)


def test_a_spike_beside_a_strong_direction_of_the_base_is_aligned():
    W0 = weights(150, 150, dtype=torch.float64)
    U, S, V = thin_svd(W0)
    S = torch.cat([torch.tensor([40.0, 30.0]), S[2:]])
    known = BaseSpectrum.from_values(S, (150, 150))
    assert known.fit.spikes == 2
    bulk = known.fit.bulk
    theta = [60.0, bulk.strength(40.02), bulk.strength(35.0), 20.0, 5.0]
    found = predict_spikes(known, torch.tensor(theta, dtype=torch.float64))
    assert found.place.tolist() == [0, 1, 3, 5, 6]
    assert found.supercritical.tolist() == [True] * 4 + [False]
    assert found.expected[1] is Expectation.ALIGNED
    assert found.expected[-1] is Expectation.ABSORBED
    assert found.expected[0] is found.expected[2] is Expectation.INTRUDER
    assert found.location[-1] == known.fit.edge
    assert found.location[1] == pytest.approx(40.02)
    for name in ("sd", "left_score", "right_score", "left_new", "right_new"):
        assert getattr(found, name).isnan().tolist() == [False] * 4 + [True]
    # where the two meet, they do mix
    rng, scores = np.random.default_rng(0), []
    for _ in range(20):
        u, v = (torch.from_numpy(unit(150, rng)) for _ in range(2))
        exact = Secular.from_svd(U, S, V, theta[1] * u[:, None], v[None]).triplets(2)
        scores.append(float(exact.left_score[(exact.u.mT @ u).abs().argmax()]))
    assert np.mean(np.array(scores) > 0.5) > 0.5


def test_an_outlier_on_top_of_a_base_value_is_that_value_s_own():
    bulk = torch.linalg.svdvals(weights(150, 150, dtype=torch.float64))[1:]
    exact = 0
    for top in some(np.random.default_rng(0).uniform(30, 60, 40)):
        known = BaseSpectrum.from_values(torch.cat([torch.tensor([top]), bulk]), (150, 150))
        leading = budget(known, rank=1, top_k=1).top_k_threshold
        found = predict_spikes(known, torch.tensor([leading], dtype=torch.float64))
        exact += float(found.location) == top
        assert found.expected == (Expectation.ALIGNED,)
        assert float(found.left_new) == pytest.approx(0, abs=1e-6)
        assert float(found.left_score) == pytest.approx(1, abs=1e-6)
        certain = predict_spikes(known, found.theta, epsilon=1.0)
        assert float(certain.left_new) == float(certain.right_new) == 1.0
    assert exact > 0  # some meet to the last bit


@pytest.mark.parametrize("base", ["wide", "trained"])
def test_an_isotropic_update_of_rank_r_agrees_with_the_exact_equation(base):
    W0 = BASES[base]()
    m, n = W0.shape
    rng, r = np.random.default_rng(3), 4
    left, right = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    theta = spectrum(W0).fit.threshold * np.array([4.0, 3.0, 2.0, 0.4])
    mix = rng.standard_normal((r, r)) + 3 * np.eye(r)  # no factor shows the spikes
    B = torch.from_numpy(left * theta @ mix)
    A = torch.from_numpy(np.linalg.solve(mix, right.T))
    found = predict(W0, B / -8.0, A, scale=-8.0)
    assert found.theta.tolist() == pytest.approx(theta.tolist(), rel=1e-10)
    assert found.supercritical.tolist() == [True] * 3 + [False]
    exact = Secular.from_svd(*thin_svd(W0), B, A)
    assert int(exact.count(1.02 * found.edge)) == 3
    outliers = exact.triplets(3)
    assert ((outliers.sigma - found.location[:3]).abs() < 3.5 * found.sd[:3]).all()
    overlaps = (torch.from_numpy(left[:, :3]).mT @ outliers.u).square().diagonal()
    torch.testing.assert_close(overlaps, found.left_overlap[:3], rtol=0.0, atol=0.15)
    torch.testing.assert_close(outliers.left_score, found.left_score[:3], rtol=0.5, atol=0.0)


def test_the_sign_of_the_scale_and_the_split_of_the_factors_do_not_matter():
    W0, B, A = (weights(*shape, seed=9) for shape in ((40, 60), (40, 3), (3, 60)))
    one = predict(W0, B, A, scale=2.0)
    for other in (
        predict(W0, B, A, scale=-2.0),
        predict(W0, -4.0 * B, A, scale=0.5),
        predict(spectrum(W0), B, 2.0 * A),
        predict(W0.double(), B.double(), A.double(), 2.0),
        predict(W0, torch.cat([B, 0 * B], 1), torch.cat([A, A]), 2.0),
    ):
        for name in ("theta", "location", "left_overlap", "right_overlap", "left_score"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-6, atol=0)
        assert other.expected == one.expected


def test_transposition_swaps_the_sides():
    W0, B, A = (weights(*shape, seed=9) for shape in ((40, 60), (40, 3), (3, 60)))
    one, other = predict(W0, B, A), predict(W0.mT, A.mT, B.mT)
    for a, b in (
        ("location", "location"),
        ("left_overlap", "right_overlap"),
        ("left_score", "right_score"),
        ("left_new", "right_new"),
        ("sd", "sd"),
    ):
        torch.testing.assert_close(getattr(one, a), getattr(other, b), rtol=1e-9, atol=0)


def test_prediction_scales_with_the_weights():
    W0, B, A = (weights(*shape, seed=9) for shape in ((40, 60), (40, 3), (3, 60)))
    one, other = predict(W0, B, A), predict(1e-4 * W0, B, A, scale=1e-4)
    for name in ("theta", "location", "sd"):
        torch.testing.assert_close(1e-4 * getattr(one, name), getattr(other, name))
    for name in ("left_overlap", "right_overlap", "left_score", "left_new"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("rank", [0, 2])
def test_no_update_predicts_nothing(rank):
    W0 = weights(40, 60)
    found = predict(W0, torch.zeros(40, rank), torch.ones(rank, 60))
    assert isinstance(found, Prediction)
    assert found.expected == ()
    assert found.threshold == spectrum(W0).fit.threshold
    for name in ("theta", "location", "left_overlap", "left_score", "left_new", "place"):
        assert getattr(found, name).shape == (0,)
    initial = predict_spikes(spectrum(W0), torch.zeros(3))
    assert initial.expected == (Expectation.ABSORBED,) * 3


def test_the_budget_of_noise():
    W0 = 0.05 * weights(300, 200, dtype=torch.float64)
    values = torch.linalg.svdvals(W0)
    found = budget(W0, rank=9, alpha=18.0)
    assert found.threshold == pytest.approx(0.05 * (300 * 200) ** 0.25, rel=0.01)
    assert found.concentrated == found.threshold
    assert found.spread == pytest.approx(3 * found.threshold)
    assert found.relative == pytest.approx(found.threshold / float(values[0]))
    assert found.lora == pytest.approx(found.threshold / (18 / 9))
    assert found.rslora == pytest.approx(found.threshold / (18 / 3))
    assert found.top_k_threshold == found.threshold
    assert found.rank == 9
    without = budget(spectrum(W0), rank=9)
    assert without.lora is without.rslora is None
    assert without.threshold == found.threshold


def test_within_the_budget_nothing_leaves_the_bulk():
    W0 = weights(300, 300, dtype=torch.float64)
    rng, r = np.random.default_rng(5), 6
    left, right = (np.linalg.qr(rng.standard_normal((300, r)))[0] for _ in range(2))
    update = torch.from_numpy(left @ right.T)
    found, edge = budget(W0, rank=r), spectrum(W0).fit.edge
    counts = {}
    for share in (0.7, 1.6):  # of ‖ΔW‖_F = θ_c√r, on r equal spikes
        W = W0 + share * found.spread / math.sqrt(r) * update
        # below the threshold spikes still press against the edge, by O(N^(-2/3))
        counts[share] = int((torch.linalg.svdvals(W) > 1.04 * edge).sum())
    assert counts == {0.7: 0, 1.6: r}


def test_leading_directions_have_a_higher_price():
    W0 = weights(150, 150, dtype=torch.float64)
    S = torch.linalg.svdvals(W0)
    S = torch.cat([torch.tensor([60.0, 50.0, 40.0]), S[3:]])
    known = BaseSpectrum.from_values(S, (150, 150))
    sigma = known.fit.sigma
    for top_k, reached in ((1, 60.0), (3, 40.0)):
        found = budget(known, rank=1, top_k=top_k)
        expected = WhiteBulk((150, 150), sigma).strength(reached)
        assert found.top_k_threshold == pytest.approx(expected)
        assert found.threshold < found.top_k_threshold < reached
    assert budget(known, rank=1).top_k_threshold == budget(known, rank=1).threshold
    # all directions are judged: the smallest value is the k-th
    assert budget(known, rank=1, top_k=10**6).top_k_threshold == float(known.values[-1])


def test_spectra_of_every_precision_are_measured_in_float64():
    W0 = weights(40, 60)
    exact = spectrum(W0)
    assert exact.values.dtype == torch.float64
    assert exact.shape == (40, 60)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = BaseSpectrum.of(W0.to(dtype).requires_grad_())
        assert low.values.dtype == torch.float64
        assert low.fit.threshold == pytest.approx(exact.fit.threshold, rel=0.01)
    same = BaseSpectrum.from_values(exact.values.float(), (40, 60))
    assert same.fit.threshold == pytest.approx(exact.fit.threshold, rel=1e-5)
    strict = BaseSpectrum.of(W0, significance=1e-9)
    assert strict.fit.spikes == 0


def test_bad_input():
    W0, B, A = weights(40, 60), weights(40, 2), weights(2, 60)
    for wrong in (B[:, 0], B[:39], B[:, :1]):
        with pytest.raises(InputError, match=r"expected factors B \(40, r\) and A \(r, 60\), got"):
            predict(W0, wrong, A)
    with pytest.raises(InputError, match=r"expected finite entries, got NaN or Inf in B"):
        predict(W0, math.nan * B, A)
    with pytest.raises(InputError, match=r"expected A to be a real torch tensor, got torch\.comp"):
        predict(W0, B, A.to(torch.complex64))
    with pytest.raises(InputError, match=r"expected a finite number as scale, got inf"):
        predict(W0, B, A, scale=math.inf)
    for epsilon in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(InputError, match=r"expected 0 < epsilon ≤ 1, got"):
            predict(W0, B, A, epsilon=epsilon)
    for theta in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"expected finite strengths ≥ 0, got"):
            predict_spikes(spectrum(W0), torch.tensor([theta]))
    for rank in (0, 41):
        with pytest.raises(InputError, match=rf"a rank between 1 and 40, got {rank}"):
            budget(W0, rank)
    for rank in (2.5, "2", None):
        with pytest.raises(InputError, match=r"a rank between 1 and 40, got .*; give a whole"):
            budget(W0, rank)
    with pytest.raises(InputError, match=r"expected top_k ≥ 1, got 2\.5; give a whole number"):
        budget(W0, 2, top_k=2.5)
    for alpha, top_k in ((0.0, 10), (-1.0, 10), (math.nan, 10), (None, 0)):
        with pytest.raises(InputError, match=r"expected positive alpha and top_k, got"):
            budget(W0, 2, alpha, top_k=top_k)
    with pytest.raises(InputError, match=r"expected a matrix, got shape \(60,\)"):
        BaseSpectrum.of(W0[0])
    with pytest.raises(InputError, match=r"expected finite entries, got NaN or Inf in W0"):
        BaseSpectrum.of(math.inf * W0)
    with pytest.raises(InputError, match=r"expected W0 to be a real torch tensor"):
        BaseSpectrum.of(W0.to(torch.complex64))
    with pytest.raises(InputError, match=r"at least 12 singular values, got 5"):
        budget(W0[:5], 2)
    with pytest.raises(InputError, match=r"the 40 singular values of a 40×60 matrix, got 39"):
        BaseSpectrum.from_values(torch.ones(39), (40, 60))


def test_near_the_threshold_a_spike_is_not_announced_as_an_intruder():
    W0 = weights(120, 200, dtype=torch.float64)
    known = spectrum(W0)
    ratios = torch.tensor([1.02, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0], dtype=torch.float64)
    found = predict_spikes(known, known.fit.threshold * ratios)
    for chance in (found.left_new, found.right_new):
        assert (chance.diff() > 0).all()
        assert chance[0] < 0.5 < chance[-2]
    assert found.expected[0] is Expectation.ALIGNED
    for i in (1, 3):  # the score falls from nearly one as simulated, within the width of its law
        rows = simulated(W0, float(known.fit.threshold * ratios[i]), 60, seed=3)
        low, high = np.quantile(rows[:, 3], [0.25, 0.75])
        assert low - 0.05 < found.left_score[i] < high + 0.05


def test_arrays_of_numpy_are_taken():
    W0 = weights(40, 60, dtype=torch.float64)
    values, known = torch.linalg.svdvals(W0), spectrum(W0)
    for kind in (values.numpy(), values.tolist(), values):
        same = BaseSpectrum.from_values(kind, (40, 60))
        assert same.fit.sigma == known.fit.sigma
        assert same.values.dtype == torch.float64
        torch.testing.assert_close(same.values, known.values)
    expected = predict_spikes(known, torch.tensor([40.0, 3.0]))
    for theta in (np.array([40.0, 3.0]), [40, 3], np.array([40.0, 3.0], dtype=np.float32)):
        found = predict_spikes(known, theta)
        assert isinstance(found.theta, torch.Tensor)
        torch.testing.assert_close(found.location, expected.location)
        assert found.expected == expected.expected
    with pytest.raises(InputError, match=r"expected real numbers, got complex ones"):
        predict_spikes(known, np.array([40j]))
    assert budget(known, np.int64(2), np.float32(4)).lora == budget(known, 2, 4.0).lora


def test_strengths_come_in_any_order_and_in_one_row():
    known = spectrum(weights(40, 60, dtype=torch.float64))
    assert predict_spikes(known, torch.tensor([20.0, 40.0, 40.0])).place.tolist() == [2, 0, 1]
    with pytest.raises(InputError, match=r"one row of strengths, got shape \(\)"):
        predict_spikes(known, torch.tensor(20.0))


@pytest.mark.parametrize(("m", "copies", "rank"), [(768, 16, 4), (2048, 64, 1)])
def test_the_rank_of_repeated_columns_is_not_rounding(m, copies, rank):
    B = weights(m, rank, dtype=torch.float64).repeat(1, copies)
    A = weights(rank * copies, m, seed=1, dtype=torch.float64)
    assert update_svd(B, A, 1.0, (m, m)).rank == rank
    tiny = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))
    thin = torch.eye(2, m, dtype=torch.float64)
    assert update_svd(thin.mT @ tiny, thin, 1.0, (m, m)).rank == 2
