"""The study of forgetting: its estimates against plain ones, interventions, stored lines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "studies/forgetting"
sys.path.insert(0, str(STUDY))

import answers  # noqa: E402
import estimates  # noqa: E402
import interventions  # noqa: E402
import weights  # noqa: E402
from store import Store  # noqa: E402

from bulkedge.intruder import COUNTED, judge  # noqa: E402
from helpers import some  # noqa: E402


@pytest.fixture(scope="module")
def stored():
    return answers.Data.read(STUDY / "results")


def test_resampled_ranks_are_those_of_the_rows_written_out():
    draw = np.random.default_rng(1)
    names = [f"c{i}" for i in draw.integers(7, size=30)]
    x, y = draw.integers(9, size=30).astype(float), draw.normal(size=30)
    drawn = estimates.Resampled(names)
    found = drawn.spearman(x, y)
    assert found[0] == pytest.approx(estimates.spearman(x, y))
    for i in (1, 77, 4000):
        rows = np.repeat(np.arange(30), drawn.times[i, drawn.of].astype(int))
        assert found[i] == pytest.approx(estimates.spearman(x[rows], y[rows]))
        assert drawn.means(y)[i] == pytest.approx(y[rows].mean())


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(2)
    inside, drawn = 0, estimates.Resampled([f"{c}" for c in range(25) for _ in range(3)])
    for _ in range(100):
        values = np.repeat(draw.normal(size=25), 3) + draw.normal(size=75)
        found = drawn.estimate(drawn.means(values))
        inside += found.low < 0 < found.high
    assert 87 <= inside <= 100


def test_few_clusters_have_no_interval():
    found = estimates.mean([1.0, 2.0, 3.0], ["a", "b", "c"])
    assert (found.value, found.low, found.sign, found.clear) == (2.0, None, 0, False)


def test_a_curve_is_read_at_equal_norm_task_and_forgetting():
    scale = np.array([0.0, 0.5, 1.0, 1.2])
    curve = estimates.Curve(scale, scale**2, np.array([0.1, 0.6, 0.8, 0.7]), norm=4.0)
    assert curve.at_norm(2.0) == (0.25, 0.6)
    assert curve.at_task(0.7) == pytest.approx(0.625)
    assert curve.at_forgetting(0.625) == pytest.approx(0.7)
    assert np.isnan(curve.at_task(0.9))
    assert np.isnan(curve.at_forgetting(1.44))
    assert len(estimates.inner_errors(curve)) == 1


def test_a_smooth_curve_goes_through_its_points_and_not_beyond():
    scale = np.array([0.0, 0.3, 0.5, 1.0, 1.2])
    curve = estimates.Curve(scale, scale**2, np.sin(1.5 * scale), norm=1.0)
    fine = estimates.smooth(curve)
    assert np.interp(scale, fine.scale, fine.f) == pytest.approx(curve.f)
    assert fine.task.max() <= curve.task.max() + 1e-12
    assert (np.diff(fine.f) >= 0).all()
    lines = np.interp(fine.scale, scale, curve.f)
    truth = fine.scale**2
    assert np.abs(fine.f - truth).max() < 0.5 * np.abs(lines - truth).max()


@pytest.fixture(scope="module")
def matrices():
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    found = {}
    for i, (m, n) in enumerate([(60, 40), (40, 60), (50, 50), (60, 40), (40, 60), (50, 50)]):
        C = [(X := random(n, 2 * n)) @ X.mT for _ in range(2)]
        layer = weights.Layer(random(m, n) + torch.linspace(0, 4, n), C[0])
        D = random(m, 3) @ random(3, n) * (0.1 + 0.2 * i)
        found[f"{i}"] = interventions.Matrix(layer, D, C[1], low=True)
    return found


def test_new_directions_are_those_of_an_audit(matrices):
    counts = []
    for matrix in some(matrices.values()):
        judged = judge(matrix.layer.W0, matrix.layer.W0 + matrix.D, 10)
        expected = [row.index for row in judged.directions if row.verdict in COUNTED]
        assert matrix.new == expected
        assert matrix.layer.new_directions(matrix.layer.leading_of(matrix.D)[1]) == expected
        assert len(matrix.alike) == len(expected)
        assert not set(matrix.alike) & set(expected)
        counts.append(len(expected))
    assert sum(counts) > 0


@pytest.fixture
def treated(matrices):
    found = object.__new__(interventions.Treated)
    found.matrices = matrices
    return found


def test_protect_is_the_minimum_of_its_loss(treated, matrices):
    from protect_arms import mean, with_ridge

    found = treated.protected(0.5)
    for name, matrix in some(matrices.items()):
        C_b, C_t = with_ridge(matrix.layer.C), with_ridge(matrix.C_t)
        strength = 0.5 * mean(matrix.layer.C) / mean(matrix.C_t)
        gradient = (found[name] - matrix.D) @ C_t + strength * found[name] @ C_b
        assert gradient.abs().max() < 1e-9 * (matrix.D @ C_t).abs().max()


def test_both_groups_lose_the_same_norm(treated, matrices):
    whole = sum(float(m.D.square().sum()) for m in matrices.values())
    left = [
        sum(float(D.square().sum()) for D in treated.grouped(high=high).values())
        for high in (True, False)
    ]
    assert left[0] == pytest.approx(left[1])
    assert left[0] < whole


def test_deleting_a_direction_takes_its_triplet(treated, matrices):
    (_, _, compute) = next(x for x in treated.all() if x[:2] == ("λ", 0.0))
    for name, D in some(compute().items()):
        U, S, V = matrices[name].triplets
        W = matrices[name].layer.W0 + D
        for i in range(10):
            kept = float(U[:, i] @ W @ V[:, i])
            assert kept == pytest.approx(0 if i in matrices[name].new else float(S[i]), abs=1e-9)


def test_lines_are_whole_and_jobs_have_one_process(tmp_path):
    store = Store(tmp_path, tmp_path / "claims")
    store.append("x", {"a": 1})
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"a": 2, "cut')
    assert [line["a"] for line in store.lines("x")] == [1]
    store.append("x", {"a": 3})
    assert [line["a"] for line in store.lines("x")] == [1, 3]
    with store.claim("m/A/0") as first, store.claim("m/A/0") as second:
        assert first
        assert not second
    with store.claim("m/A/0") as again:
        assert again


def test_enough_is_stored_and_no_text_is_in_two_places(stored):
    assert len(stored.cells) >= 60
    assert len(stored.interventions) >= 600
    assert len({line["cell"] for line in stored.cells}) == len(stored.cells)
    keys = [(line["cell"], line["what"], line["setting"]) for line in stored.interventions]
    assert len(set(keys)) == len(keys)
    import material

    tested = {text for _, *both in material.pairs("test") for text in both}
    kept = set(material.kept())
    assert tested & kept == {"without payment"}  # the definition of two synsets
    for name in "ABC":
        its = material.task(name)
        trained = {gloss for _, gloss in its.train}
        assert not trained & (tested | kept)
        assert not trained & {gloss for _, gloss in its.test if name != "A"}


@pytest.mark.slow
def test_a_toy_of_the_study_runs(tmp_path):
    for _ in range(2):  # the second finds everything done
        subprocess.run(
            [sys.executable, STUDY / "run.py", "--quick", tmp_path / "toy"],
            check=True, cwd=ROOT,
        )  # fmt: skip
    lines = (tmp_path / "toy/cells.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["cell"] for line in lines) == sorted(
        ["full/A/0", "lora-r8/A/0", "lora-r8/AB/0", "lora-r8/ABC/0"]
    )


def test_the_page_shows_every_figure():
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    drawn = sorted(path.name for path in (ROOT / "docs/figures").glob("study_*.svg"))
    assert sorted(re.findall(r"\(figures/(study_\w+\.svg)\)", page)) == drawn != []
