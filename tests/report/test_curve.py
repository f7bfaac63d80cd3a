"""What scaling an update does, on the record and on the page."""

from __future__ import annotations

import pytest
import torch

import bulkedge
from bulkedge.auditing.curve import SCALES
from bulkedge.records.rows import ScalePoint
from bulkedge.report.curve import GRID, _judged, matrix_curve, whole_curve
from bulkedge.report.scale import told_weaker
from helpers import save, save_adapter, some

K, EPSILON = 4, 0.5
SHAPE = (90, 120)


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(seed):
    """A base with outliers of its own, as trained weights have."""
    U, V = (torch.linalg.qr(draw(size, 6, seed=seed + i)).Q for i, size in enumerate(SHAPE))
    return draw(*SHAPE, seed=seed) + (U * torch.linspace(60, 30, 6).double()) @ V.mT


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    bases = {name: trained(seed) for name, seed in (("one", 1), ("two", 2))}
    updates = {
        "one": (draw(90, 2, seed=3) / 90**0.5 * torch.tensor([70.0, 30.0]),
                draw(2, 120, seed=4) / 120**0.5),
        "two": (draw(90, 2, seed=5) / 90**0.5 * torch.tensor([50.0, 8.0]),
                draw(2, 120, seed=6) / 120**0.5),
    }  # fmt: skip
    factors = {
        f"{n}.lora_{x}.weight": f
        for n, fs in updates.items()
        for x, f in zip("BA", fs, strict=True)
    }
    paths = (
        save(folder / "base.safetensors", {f"{n}.weight": W for n, W in bases.items()}),
        save_adapter(folder / "lora", factors, r=2, lora_alpha=2, target_modules=list(bases)),
    )
    return bases, updates, paths


@pytest.fixture(scope="module")
def records(inputs):
    return {
        measured: bulkedge.audit(
            *inputs[2], recipe={"top_k": K, "critical_scale": measured, "side": "both"}
        )
        for measured in (False, True)
    }


def oracle(W0, update, scale):
    """New directions and lowest score of both sides, by dense SVDs."""
    base = torch.linalg.svd(W0)
    tuned = torch.linalg.svd(W0 + scale * update)
    scores = torch.cat([
        (base.U.mT @ tuned.U[:, :K]).abs().amax(0),
        (base.Vh @ tuned.Vh[:K].mT).abs().amax(0),
    ])  # fmt: skip
    return int((scores < EPSILON).sum()), float(scores.min())


def test_what_is_judged_at_a_scale_is_what_svds_find_there(inputs, records):
    bases, updates, _ = inputs
    for matrix in some(records[True].matrices):
        name = matrix.name.removesuffix(".weight")
        judged = matrix.scale_curve.judged
        assert len(judged) > 5
        assert 1.0 in [point.scale for point in judged]
        for point in some(judged):
            new, score = oracle(bases[name], updates[name][0] @ updates[name][1], point.scale)
            assert (point.new, point.score) == (new, pytest.approx(score, abs=1e-6))
    for matrix in some(records[False].matrices):
        (point,) = matrix.scale_curve.judged
        assert (point.scale, point.new) == (1.0, matrix.new_directions)


def test_the_expected_curve_is_near_what_svds_find(inputs, records):
    bases, updates, _ = inputs
    for matrix in some(records[False].matrices):
        name = matrix.name.removesuffix(".weight")
        points = matrix.scale_curve.expected
        assert [point.scale for point in points] == list(SCALES)
        found = [oracle(bases[name], updates[name][0] @ updates[name][1], s) for s in SCALES]
        assert points[0].new == found[0][0] == 0
        assert points[-1].new == found[-1][0] > 1
        for point, (new, score) in some(zip(points, found, strict=True)):
            assert abs(point.new - new) <= 1
            assert point.score == pytest.approx(score, abs=0.1)


def test_a_dense_update_has_what_was_judged_and_no_expected_curve(tmp_path):
    base = trained(1)
    paths = [save(tmp_path / f"{name}.safetensors", {"w.weight": W})
             for name, W in (("a", base), ("b", base + 0.1 * draw(*SHAPE, seed=8)))]  # fmt: skip
    (matrix,) = bulkedge.audit(*paths, recipe={"top_k": K}).matrices
    assert matrix.scale_curve.expected == []
    assert len(matrix.scale_curve.judged) == 1
    assert (matrix.effective_rank, matrix.stable_rank, matrix.in_use) == (None, None, None)


def test_the_page_has_the_curve_of_all_and_of_each(records):
    found = whole_curve(records[False])
    assert [scale for scale, _, _ in found["judged"]] == [1.0]
    assert found["judged"][0][1] == records[False].summary.new_directions > 0
    rows = [matrix.scale_curve.expected for matrix in records[False].matrices]
    expected = [sum(p.new for p in points) for points in zip(*rows, strict=True)]
    assert [new for _, new, _ in found["expected"]] == pytest.approx(expected, rel=6e-3, abs=1e-3)
    several = whole_curve(records[True])["judged"]
    least = min(m.scale_curve.judged[0].scale for m in records[True].matrices)
    assert [s for s, *_ in several] == [float(f"{s:.4g}") for s in GRID if least <= s <= 1]
    assert len(several) > 1
    assert several[0][1] == 0
    assert [p for p in several if p[0] == 1.0] == found["judged"]
    one = matrix_curve(records[True].matrices[0])
    assert len(one["judged"]) == len(records[True].matrices[0].scale_curve.judged)
    scale, text, words = told_weaker(records[True])
    lows = [matrix.critical_scale.low for matrix in records[True].matrices]
    assert scale == min(lows)
    assert text.startswith("≤ 0.")
    assert "none new" in words
    assert "expected" in told_weaker(records[False])[2]


def test_curves_with_scales_of_their_own_are_read_between():
    def curve(*points):
        return [ScalePoint(scale=s, new=n, score=x) for s, n, x in points]

    one = curve((0.25, 0, 0.9), (1.0, 2, 0.3), (2.0, 3, 0.2))
    two = curve((0.5, 0, 0.8), (1.0, 1, 0.4))
    found = {scale: rest for scale, *rest in _judged([one, two])}
    assert list(found) == [float(f"{s:.4g}") for s in GRID if 0.25 <= s <= 1]
    assert found[0.25] == [0, 0.8]
    assert found[1.0] == [3, 0.3]
    assert found[0.5] == [1, 0.6]  # half-way on a logarithmic scale
    late = curve((0.5, 1, 0.4), (1.0, 1, 0.4))  # nothing is known of it below
    assert min(scale for scale, *_ in _judged([one, late])) == 0.5
