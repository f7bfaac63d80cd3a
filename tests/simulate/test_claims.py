"""What each experiment says, on matrices small enough for a test; every claim can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bulkedge.simulate import run
from bulkedge.simulate._model import (
    Base,
    dense_update,
    gaussian_factors,
    noise,
    noise_quantile,
    noise_with_signals,
    spiked_update,
    white_bulk,
)
from helpers import some

SIZE = 100


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_base_and_its_updates_are_as_strong_as_they_say():
    """In units of the threshold, by LAPACK and by the definition θ_c = τ(mn)^¼."""
    shape = (150, 60)
    W = noise(shape, generator())
    assert float(W.std()) * (150 * 60) ** 0.25 == pytest.approx(1.0, abs=0.03)
    assert white_bulk(shape).threshold == pytest.approx(1.0)
    B, A = spiked_update(shape, torch.tensor([3.0, 0.5]), generator())
    values = torch.linalg.svdvals(B @ A)[:3]
    torch.testing.assert_close(values, torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64))
    B, A = gaussian_factors(shape, 4, 2.5, generator())
    assert float((B @ A).norm()) == pytest.approx(2.5, rel=1e-12)
    assert int(torch.linalg.matrix_rank(B @ A)) == 4
    assert float(dense_update(shape, 2.5, generator()).norm()) == pytest.approx(2.5, rel=1e-12)
    signals = Base.of(noise_with_signals((100, 100), 3, 8.0, generator())).S[:4]
    assert signals[0] == pytest.approx(8 + 1 / 8, abs=0.3)  # θ + 1/θ for a square base
    assert signals[2] > 2.2 > signals[3]


def test_noise_crosses_the_line_once_in_20_times():
    line, draws = noise_quantile((40, 40), white_bulk((40, 40)).sigma), generator(1)
    beyond = sum(
        float(torch.linalg.matrix_norm(noise((40, 40), draws), 2)) > line for _ in range(1000)
    )
    assert 50 - 21 <= beyond <= 50 + 21  # three standard deviations


def test_laws_fit_their_own_spectrum_and_no_other():
    table = run("laws", size=150, repeats=2, bins=12)
    for ensemble in ("symmetric", "square", "wide", "tall"):
        found = table.where(ensemble=ensemble)
        assert found.numbers("distance_right")[0] < 0.02, ensemble
        assert found.numbers("distance_wrong")[0] > 0.15, ensemble
    square = table.where(ensemble="square")
    assert np.abs(square.numbers("density") - square.numbers("right"))[1:-1].max() < 0.1


@pytest.fixture(scope="module")
def transition():
    return run("transition", size=SIZE, aspect=3, strengths=[0.4, 1.5, 2.0, 3.0], repeats=12)


def test_an_outlier_lies_and_points_where_theory_says(transition):
    """Three standard errors, and O(1/N) for the finite size."""
    for shape in ("square", "wide", "tall"):
        for strength in (1.5, 2.0, 3.0):
            row = transition.where(shape=shape, strength=strength)
            for name in ("location", "left_overlap", "right_overlap"):
                error = row.numbers(name)[0] - row.numbers(f"theory_{name}")[0]
                spread = row.numbers(f"{name}_sd")[0]
                assert abs(error) < 3 * spread / math.sqrt(12) + 3 / SIZE, (shape, strength, name)
        below = transition.where(shape=shape, strength=0.4)
        assert below.numbers("location")[0] < white_bulk((1, 9)).edge * 1.1
        assert below.numbers("left_overlap")[0] < 0.1
        assert below.numbers("score")[0] > 0.8


def test_the_longer_side_is_recovered_worse(transition):
    wide, tall = (transition.where(shape=shape, strength=2.0) for shape in ("wide", "tall"))
    assert wide.numbers("left_overlap")[0] > wide.numbers("right_overlap")[0] + 0.1
    assert tall.numbers("right_overlap")[0] > tall.numbers("left_overlap")[0] + 0.1


def test_a_score_is_what_the_spectrum_predicts(transition):
    strong = [transition.where(shape=s, strength=3.0) for s in ("square", "wide", "tall")]
    for row in strong:
        error = row.numbers("score")[0] - row.numbers("predicted_score")[0]
        assert abs(error) < 3 * row.numbers("score_sd")[0] / math.sqrt(12) + 0.02
        assert row.numbers("new")[0] == 1.0
        assert row.numbers("predicted_new")[0] > 0.97


def test_only_the_low_rank_update_of_a_norm_makes_outliers():
    table = run("full_vs_lora", size=SIZE, norms=[0.5, 6.0], rank=2, signals=4, top_k=4, repeats=5)
    for base in ("noise", "signals"):
        strong = {
            update: table.where(base=base, update=update, norm=6.0)
            for update in ("dense", "low rank")
        }
        assert strong["low rank"].numbers("above")[0] == 2
        assert strong["low rank"].numbers("outliers")[0] == pytest.approx(2, abs=0.5)
        assert strong["dense"].numbers("outliers")[0] < 0.5
        norms = [strong[update].numbers("update_norm")[0] for update in strong]
        # 2·6/√N for independent entries; at least 6/√2 for rank 2
        assert norms[0] == pytest.approx(1.2, abs=0.1)
        assert norms[1] > 6 / math.sqrt(2)
    weak = table.where(base="signals", norm=0.5)
    assert weak.column("counted") == [0, 0]
    strong = table.where(base="signals", norm=6.0)
    assert strong.where(update="dense").column("counted") == [0]
    assert strong.where(update="low rank").numbers("counted")[0] > 0.5


def test_equal_spikes_sink_at_rank_f_squared():
    """F = 3: all of them are outliers up to rank 4, none is a new direction from rank 16 on."""
    table = run("rank", size=200, norm=3.0, ranks=[1, 2, 4, 16, 24], repeats=4)
    equal = table.where(spikes="equal")
    for name in ("strongest", "participation_ratio"):
        expected = 3 / np.sqrt([1, 2, 4, 16, 24]) if name == "strongest" else [1, 2, 4, 16, 24]
        np.testing.assert_allclose(equal.numbers(name), expected, rtol=1e-10)
    assert equal.column("above") == equal.column("theory_outliers") == [1, 2, 4, 0, 0]
    # in one draw of 20 noise adds one of its own
    np.testing.assert_allclose(equal.numbers("outliers")[:3], [1, 2, 4], atol=0.5)
    np.testing.assert_allclose(equal.numbers("intruders")[:2], [1, 2])
    assert (equal.numbers("intruders")[3:] <= 0.5).all()
    rough = table.where(spikes="uneven")
    assert (rough.numbers("strongest")[1:] > equal.numbers("strongest")[1:]).all()
    uneven, alike = (found.numbers("participation_ratio")[1:] for found in (rough, equal))
    assert (uneven < alike).all()


def test_root_scaling_keeps_spikes_above_to_larger_ranks():
    table = run("scaling", size=150, alpha=4.0, ranks=[2, 8, 24], repeats=3)
    exact = table.where(factors="orthonormal")
    np.testing.assert_allclose(
        exact.where(scale="α/r").numbers("strongest"), [2, 1 / 2, 1 / 6], rtol=1e-12
    )
    np.testing.assert_allclose(
        exact.where(scale="α/√r").numbers("strongest"), 4 / np.sqrt([2, 8, 24]), rtol=1e-12
    )
    assert exact.where(scale="α/r").column("above") == [2, 0, 0]
    assert exact.where(scale="α/√r").column("above") == [2, 8, 0]
    rough = table.where(factors="gaussian")
    ratio = rough.where(scale="α/√r").numbers("strongest") / rough.where(scale="α/r").numbers(
        "strongest"
    )
    np.testing.assert_allclose(ratio, np.sqrt([2, 8, 24]), rtol=1e-10)


def test_a_rotation_keeps_values_and_subspace_but_not_scores():
    table = run("adapters", size=SIZE, rank=6, signals=6, strengths=[0.2, 2.0], repeats=4)
    turned = table.where(method="rotational")
    assert (turned.numbers("value_change") < 1e-12).all()
    np.testing.assert_allclose(turned.numbers("overlap"), 1.0, atol=1e-9)
    assert turned.column("intruders") == [0, 0]
    assert turned.numbers("score")[1] < 0.85
    added = table.where(method="additive", strength=2.0)
    assert added.numbers("value_change")[0] > 0.1
    assert added.numbers("overlap")[0] < 0.9
    other = table.where(method="low rank as rotational", strength=2.0)
    assert other.numbers("intruders")[0] > 0.5
    assert other.numbers("norm") == pytest.approx(table.where(
        method="rotational", strength=2.0
    ).numbers("norm"))  # fmt: skip


def test_intruders_shift_the_diagonal_by_their_number():
    table = run("similarity", size=200, signals=8, strongest=10.0, rank=2, norm=20.0, tracked=10)
    dense, low = (
        table.where(update=update).numbers("cosine").reshape(10, 10)
        for update in ("dense", "low rank")
    )
    assert dense.diagonal()[:6].min() > 0.9
    assert low.diagonal(2)[:6].min() > 0.9  # both intruders lie above every signal
    assert low[:, :2].max() < 0.5
    for cosines in (dense, low):
        assert (np.square(cosines).sum(0) <= 1 + 1e-12).all()
        assert (np.square(cosines).sum(1) <= 1 + 1e-12).all()


def test_tasks_forget_unless_their_spikes_are_clipped():
    table = run("sequential", size=SIZE, tasks=3, rank=2, norm=6.0, signals=5, top_k=5, repeats=4)
    rows = {
        method: table.where(method=method) for method in ("dense", "low rank", "low rank, clipped")
    }
    for found in some(rows.values()):
        assert found.column("counted")[0] == 0
        assert found.numbers("subspace")[0] == pytest.approx(1.0)
        assert found.numbers("norm")[0] == 0.0
    np.testing.assert_allclose(
        [rows[name].numbers("norm")[1] for name in ("dense", "low rank")], 6.0, rtol=1e-12
    )
    # rank 2, both spikes cut to 0.9
    assert rows["low rank, clipped"].numbers("norm")[1] == pytest.approx(0.9 * 2**0.5)
    last = {name: found.numbers("subspace")[-1] for name, found in rows.items()}
    assert last["low rank"] < 0.75 < 0.85 < last["dense"] < last["low rank, clipped"]
    assert rows["low rank"].numbers("counted")[-1] > 1
    assert rows["low rank, clipped"].numbers("counted")[-1] == 0


def test_universality_holds_to_the_fourth_moment_and_no_further():
    table = run("universality", size=60, repeats=200, entries=["gaussian", "rademacher", "t3"])
    gaussian, rademacher, t3 = (table.where(entries=e) for e in ("gaussian", "rademacher", "t3"))
    for name in ("false_alarm", "false_alarm_known"):
        assert 0.02 <= gaussian.numbers(name)[0] <= 0.08
        assert rademacher.numbers(name)[0] <= 0.08
        assert t3.numbers(name)[0] > 0.2
    for light in (gaussian, rademacher):
        for name in ("location", "left_overlap"):
            error = light.numbers(name)[0] - light.numbers(f"theory_{name}")[0]
            assert abs(error) < 3 * light.numbers(f"{name}_sd")[0] / 200**0.5 + 1 / 60
        assert light.numbers("distance")[0] < 0.05 < t3.numbers("distance")[0]
    assert t3.numbers("left_overlap")[0] < gaussian.numbers("left_overlap")[0] - 0.15


def test_correlated_rows_are_not_taken_for_white():
    table = run("universality", size=120, repeats=5, entries=["gaussian", "correlated"])
    assert table.column("white") == [1.0, 0.0]


def test_an_empirical_bulk_predicts_where_a_white_fit_fails():
    table = run("heavy_tailed", size=150, strengths=[0.3, 1.5], repeats=4)
    np.testing.assert_allclose(table.numbers("exact"), table.numbers("location"), rtol=1e-9)
    for spectrum in ("product", "rows", "power law"):
        row = table.where(spectrum=spectrum, strength=1.5)
        tolerance = 3 * row.numbers("left_overlap_sd")[0] / 2 + 0.02
        assert abs(row.numbers("empirical")[0] - row.numbers("location")[0]) < 0.04
        miss = row.numbers("empirical_overlap") - row.numbers("left_overlap")
        assert abs(miss[0]) < tolerance
    product = table.where(spectrum="product", strength=1.5)
    assert product.numbers("white")[0] < product.numbers("location")[0] - 0.03
    # far below the true threshold the white fit promises an overlap that is not there
    assert table.where(spectrum="product", strength=0.3).numbers("left_overlap")[0] < 0.05
    assert (table.numbers("white_threshold") < table.numbers("empirical_threshold"))[:2].all()
