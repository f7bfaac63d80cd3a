"""The bulk of a base in the record, and predictions beside measurements."""

import csv
import io
import json

import pytest
import torch
from rich.console import Console

import bulkedge
from bulkedge import CheckpointError, Recipe, Record
from bulkedge._linmap import LowRank
from bulkedge.comparison import Pair
from bulkedge.records.record import OF_SPIKES
from bulkedge.report import to_markdown
from bulkedge.report.several import print_several, several_csv
from bulkedge.rmt import WhiteBulk
from bulkedge.update import BaseSpectrum, Secular, measure_base
from bulkedge.update._products import measure_further
from cases import gaussian, generator, orthonormal
from helpers import save, save_adapter, some
from judging import certified


def noise(m, n, seed=7):
    return torch.randn(m, n, generator=generator(seed), dtype=torch.float64)


def audit_lora(tmp_path, W0, B, A, scale, *, transposed=False, **recipe):
    """One layer and a LoRA on it; ``transposed`` as GPT-2 stores its layers."""
    name = "h.0.attn.c_attn" if transposed else "layer"
    rank = A.shape[0]
    base = tmp_path / "base"
    save(base / "model.safetensors", {f"{name}.weight": W0.mT if transposed else W0})
    config = {"model_type": "gpt2"} if transposed else {"model_type": "bert"}
    (base / "config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{name}.lora_A.weight": A,
        f"base_model.model.{name}.lora_B.weight": B,
    }
    settings = {"r": rank, "lora_alpha": scale * rank, "fan_in_fan_out": transposed}
    adapter = save_adapter(tmp_path / "adapter", tensors, **settings)
    return bulkedge.audit(base, adapter, recipe=recipe)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (200, 200)], ids=str)
def test_a_generic_spike_lands_where_it_was_expected(shape, transposed, tmp_path):
    m, n = shape
    W0 = noise(m, n)
    threshold = WhiteBulk(shape).threshold
    strengths = torch.tensor([3.0, 2.0, 0.4], dtype=torch.float64) * threshold
    B, A = orthonormal(m, 3, 5) * strengths, orthonormal(n, 3, 6).mT
    record = audit_lora(tmp_path, W0, B, A, 2.0, transposed=transposed)
    (matrix,) = record.matrices
    assert matrix.bulk.white
    assert matrix.bulk.spikes == 0
    assert matrix.bulk.sigma == pytest.approx(1, abs=0.02)
    assert matrix.threshold == pytest.approx(threshold, rel=0.02)
    assert (matrix.spikes, matrix.supercritical) == (3, 2)
    assert (record.summary.spikes, record.summary.supercritical) == (3, 2)
    S = torch.linalg.svdvals(W0 + 2 * B @ A)
    for i, row in some(enumerate(matrix.predicted[:2])):
        assert row.theta == pytest.approx(float(2 * strengths[i]))
        assert (row.supercritical, row.expected.value, row.measured_index) == (True, "intruder", i)
        assert row.measured_location == pytest.approx(float(S[i]), rel=1e-9)
        assert abs(row.measured_location - row.location) < 4 * row.sd
        assert row.measured_left_overlap == pytest.approx(row.left_overlap, abs=0.06)
        assert row.measured_right_overlap == pytest.approx(row.right_overlap, abs=0.06)
        assert matrix.directions[i].score < 0.5
        # the longer side has the smaller overlap
        assert (row.left_overlap < row.right_overlap) == (m > n)
    assert matrix.predicted[2].location is None
    assert matrix.predicted[2].expected.value == "absorbed"


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_spike_below_the_threshold_is_expected_to_drown(strength, tmp_path):
    W0 = noise(200, 200)
    B, A = orthonormal(200, 1, 5), strength * 200**0.5 * orthonormal(200, 1, 6).mT
    (matrix,) = audit_lora(tmp_path, W0, B, A, 1.0).matrices
    (row,) = matrix.predicted
    assert (matrix.spikes, matrix.supercritical, row.supercritical) == (1, 0, False)
    assert row.expected.value == "absorbed"
    assert (row.location, row.sd, row.left_score, row.measured_index) == (None,) * 4


def test_an_outlier_of_the_base_does_not_carry_a_spike(tmp_path):
    """It has a little of every vector; the outlier of a spike not far above its threshold, much."""
    u, v = orthonormal(200, 3, 5), orthonormal(200, 3, 6)
    W0 = noise(200, 200) + 60 * u[:, :1] @ v[:, :1].mT
    strengths = torch.tensor([1.5, 0.8], dtype=torch.float64) * 200**0.5
    (matrix,) = audit_lora(tmp_path, W0, u[:, 1:] * strengths, v[:, 1:].mT, 1.0).matrices
    above, below = matrix.predicted
    assert (above.measured_index, below.measured_index) == (1, None)
    assert 0.5 < above.measured_left_overlap < 0.9


def test_counted_spikes_are_those_of_the_rows_also_at_a_hard_edge(tmp_path):
    """Of threshold 0, where float64 cannot tell the outlier of a weak spike from the edge."""
    values = (torch.arange(40).flip(0).double() + 0.5) / 40
    W0 = orthonormal(60, 40, 1) * values @ orthonormal(40, 40, 2).mT
    strengths = torch.tensor([1.0, 0.3, 0.01, 0.001], dtype=torch.float64)
    B, A = orthonormal(60, 4, 5) * strengths, orthonormal(40, 4, 6).mT
    record = audit_lora(tmp_path, W0, B, A, 1.0)
    (matrix,) = record.matrices
    assert matrix.threshold == 0
    assert [row.supercritical for row in matrix.predicted] == [True, True, False, False]
    assert [row.expected.value for row in matrix.predicted[2:]] == ["absorbed"] * 2
    assert (matrix.spikes, matrix.supercritical) == (4, 2)
    assert (record.summary.spikes, record.summary.supercritical) == (4, 2)


def test_the_measured_outlier_is_the_exact_one(tmp_path):
    W0 = noise(150, 100)
    B, A = orthonormal(150, 2, 5) * 40, orthonormal(100, 2, 6).mT * torch.tensor([[1.0], [0.8]])
    (matrix,) = audit_lora(tmp_path, W0, B, A.double(), 1.0).matrices
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    exact = Secular.from_svd(U, S, Vh.mT, B, A).outliers(matrix.bulk.edge)
    assert [row.measured_location for row in matrix.predicted] == pytest.approx(
        exact.sigma.tolist(), rel=1e-9
    )


def test_only_as_many_spikes_are_listed_as_directions_are_judged(tmp_path):
    B, A = orthonormal(60, 8, 5), orthonormal(40, 8, 6).mT * 100
    (matrix,) = audit_lora(tmp_path, noise(60, 40), B, A, 1.0, top_k=3).matrices
    assert (matrix.spikes, matrix.supercritical, len(matrix.predicted)) == (8, 8, 3)


def test_the_rank_is_that_of_the_product(tmp_path):
    B = orthonormal(60, 1, 5).repeat(1, 4)
    (matrix,) = audit_lora(tmp_path, noise(60, 40), B, orthonormal(40, 4, 6).mT, 50.0).matrices
    assert (matrix.rank, matrix.spikes) == (4, 1)


def test_a_dense_update_has_a_bulk_and_a_threshold_but_no_spikes(tmp_path):
    W0 = noise(60, 40)
    base = save(tmp_path / "base.safetensors", {"layer.weight": W0})
    tuned = save(tmp_path / "tuned.safetensors", {"layer.weight": W0 + 0.01 * gaussian(60, 40)})
    record = bulkedge.audit(base, tuned)
    (matrix,) = record.matrices
    assert matrix.threshold == pytest.approx(WhiteBulk((60, 40)).threshold, rel=0.05)
    assert (matrix.spikes, matrix.supercritical, matrix.predicted) == (None, None, [])
    assert {record.summary[name] for name in OF_SPIKES} == {None}


@pytest.mark.parametrize(
    ("W0", "why"),
    [(noise(60, 8), "at least 12 singular values"), (torch.eye(60, 40), "they have no edge")],
    ids=["narrow", "equal"],
)
def test_a_base_without_a_bulk_says_so(W0, why, tmp_path):
    m, n = W0.shape
    B, A = orthonormal(m, 1, 5), 9 * orthonormal(n, 1, 6).mT
    record = audit_lora(tmp_path, W0.double(), B, A, 1.0)
    (matrix,) = record.matrices
    assert (matrix.status, matrix.bulk, matrix.threshold) == ("audited", None, None)
    assert "no bulk fitted: " in matrix.note
    assert why in matrix.note
    assert (matrix.spikes, matrix.supercritical, record.summary.spikes) == (1, None, None)


def test_a_record_written_before_these_fields_is_still_read(tmp_path):
    B, A = orthonormal(60, 1, 5), orthonormal(40, 1, 6).mT
    data = json.loads(audit_lora(tmp_path, noise(60, 40), B, A, 50.0).to_json())
    for field in ("spikes", "supercritical"):
        del data["summary"][field]
    fields = ("bulk", "threshold", "spikes", "supercritical", "predicted")
    for field in (*fields, "effective_rank", "stable_rank"):
        del data["matrices"][0][field]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert Record.from_json(tmp_path / "old.json").matrices[0].bulk is None


def test_a_zero_that_earlier_versions_wrote_for_no_spikes_is_read_as_none(tmp_path):
    W0 = noise(60, 40)
    base = save(tmp_path / "base.safetensors", {"layer.weight": W0})
    tuned = save(tmp_path / "tuned.safetensors", {"layer.weight": W0 + 0.01 * gaussian(60, 40)})
    data = json.loads(bulkedge.audit(base, tuned).to_json())
    for old in ({}, dict.fromkeys(OF_SPIKES, 0)):
        assert {Record.from_json(edited(data, old)).summary[name] for name in OF_SPIKES} == {None}
    with pytest.raises(CheckpointError, match="expected the counts of the rows listed"):
        Record.from_json(edited(data, {"spikes": 1}))


def edited(data, counts):
    """A record as text, with other counts of spikes, or none."""
    summary = {n: value for n, value in data["summary"].items() if n not in OF_SPIKES} | counts
    return json.dumps(data | {"summary": summary})


@pytest.mark.parametrize("kind", ["csv", "markdown", "terminal"])
def test_a_count_of_spikes_is_blank_where_none_was_made(kind, tmp_path):
    """Of a dense fine-tune alone the column is left out, beside a LoRA its cell is empty."""
    W0, B, A = noise(60, 40), orthonormal(60, 1, 5), orthonormal(40, 1, 6).mT
    lora = audit_lora(tmp_path, W0, B, A, 50.0)
    tuned = {"layer.weight": (W0 + 0.01 * gaussian(60, 40))}
    dense = bulkedge.audit(tmp_path / "base", save(tmp_path / "tuned.safetensors", tuned))
    cells = [table(kind, {"dense": dense})[-1], *table(kind, {"dense": dense, "lora": lora})]
    assert cells == ["", "", "1"]


def table(kind, records):
    """The cells of the column of spikes over θ_k, one for each fine-tune."""
    heading = "spikes > θ_k"
    if kind == "csv":
        rows = list(csv.DictReader(io.StringIO(several_csv(records))))
        return [row["beyond_top_k_threshold"] for row in rows]
    if kind == "markdown":
        lines = [line.split(" | ") for line in to_markdown(records).splitlines() if " | " in line]
        head, rows = lines[0], lines[1 : 1 + len(records)]
        head = [cell.strip("| ") for cell in head]
        at = head.index(heading) if heading in head else None
        return ["" if at is None else row[at].strip("| ") for row in rows]
    text = io.StringIO()
    print_several(records, Console(file=text, width=200))
    head, *rows = text.getvalue().splitlines()
    end = head.find(heading) + len(heading)
    return [
        "" if heading not in head else row[end - len(heading) : end].strip()
        for row in rows[: len(records)]
    ]


@pytest.mark.parametrize("shape", [(700, 700), (900, 600)], ids=str)
def test_a_bulk_from_a_quadrature_is_that_from_all_values(shape):
    """Outliers over uneven noise, where the certificate ends early and has few leading values."""
    m, n = shape
    uneven = gaussian(m, n) * torch.linspace(0.5, 1.5, m, dtype=torch.float64)[:, None] / m**0.5
    outliers = orthonormal(m, 6, 1) * torch.linspace(20, 8, 6, dtype=torch.float64)
    W0 = uneven + outliers @ orthonormal(n, 6, 2).mT
    pair = Pair(W0, None, LowRank(orthonormal(m, 1, 3), orthonormal(n, 1, 4).mT))
    found = certified(pair, Recipe())
    assert 8 <= found.computed_count < 60
    quadrature, problem = measure_base(found.spectrum, shape, found.computed_count)
    assert problem is None
    true = BaseSpectrum.of(W0)
    assert quadrature.fit.spikes == true.fit.spikes == 6
    assert quadrature.fit.edge == pytest.approx(true.fit.edge, rel=0.02)
    assert quadrature.fit.threshold == pytest.approx(true.fit.threshold, rel=0.1)


def test_what_is_neither_noise_nor_converged_has_no_bulk():
    values = torch.linspace(3.0, 0.0, 600, dtype=torch.float64).exp()
    spectrum, problem = measure_base(values, (600, 600), 0)
    assert spectrum is None
    assert "too few leading singular values of the base converged" in problem


def test_noise_is_not_told_by_its_moments_alone():
    """Neither these values nor their quadrature would have shown another bulk."""
    W0 = gaussian(900, 600)
    pair = Pair(W0, None, LowRank(orthonormal(900, 1, 3) * 200, orthonormal(600, 1, 4).mT))
    found = certified(pair, Recipe(top_k=1))
    assert found.computed_count < 8
    spectrum, problem = measure_base(found.spectrum, (900, 600), found.computed_count)
    assert spectrum is None
    assert "too few leading" in problem
    further = measure_further(W0, found.spectrum, found.computed_count)
    assert further.exact >= 16
    assert further.spectrum.fit.white
    assert further.spectrum.fit.threshold == pytest.approx(
        WhiteBulk((900, 600)).threshold, rel=2e-3
    )
