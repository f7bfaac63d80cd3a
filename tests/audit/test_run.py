"""Rows of the record against two full SVDs, and matrices with which something is wrong."""

import pytest
import torch

import bulkedge
from bulkedge import CheckpointError, InputError, Recipe
from cases import gaussian, orthonormal
from helpers import oracle_scores, save, save_adapter, some, weights

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def audit_pair(tmp_path, W0, W, **recipe):
    base = save(tmp_path / "base.safetensors", {"layer.weight": W0})
    tuned = save(tmp_path / "tuned.safetensors", {"layer.weight": W})
    return bulkedge.audit(base, tuned, recipe=Recipe(**recipe))


def planted(m=150, n=120, strength=50.0):
    """A base, and a fine-tune of it with one strong new direction."""
    W0 = gaussian(m, n)
    return W0, W0 + strength * orthonormal(m, 1, 5) @ orthonormal(n, 1, 6).mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(150, 120), (120, 150)], ids=str)
def test_a_planted_direction_is_found_and_nothing_else(dtype, shape, tmp_path):
    W0, W = (tensor.to(dtype) for tensor in planted(*shape))
    record = audit_pair(tmp_path, W0, W, side="both")
    (matrix,) = record.matrices
    assert (record.summary.new_directions, matrix.new_directions) == (2, 2)
    assert [(d.side, d.index, d.verdict.value) for d in matrix.directions if d.score < 0.5] == [
        ("left", 0, "intruder"),
        ("right", 0, "intruder"),
    ]
    for side in ("left", "right"):
        found = torch.tensor([d.score for d in matrix.directions if d.side == side])
        expected = oracle_scores(W0, W, 10, side).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    S0, S = torch.linalg.svdvals(W0.double()), torch.linalg.svdvals(W.double())
    assert matrix.spectral_norm_base == pytest.approx(float(S0[0]))
    norm = torch.linalg.matrix_norm(W.double() - W0.double(), 2)
    assert matrix.spectral_norm_update == pytest.approx(float(norm), rel=1e-9)
    assert [d.sigma for d in matrix.directions[:10]] == pytest.approx(S[:10].tolist())
    assert max(d.residual for d in matrix.directions) < 1e-11


def test_a_dense_update_that_keeps_the_spectrum_has_no_intruder(tmp_path):
    W0 = gaussian(60, 40)
    record = audit_pair(tmp_path, W0, W0 + 1e-3 * torch.roll(gaussian(60, 40), 1, 0))
    assert record.summary.new_directions == 0
    assert record.summary.verdicts["aligned"] == 10


def test_a_rotation_among_leading_vectors_is_told_from_an_intruder(tmp_path):
    U, V = orthonormal(60, 40, 1), orthonormal(40, 40, 2)
    S = torch.linspace(2, 1, 40, dtype=torch.float64)
    rotated = U.clone()
    rotated[:, :20] = U[:, :20] @ orthonormal(20, 20, 3)
    record = audit_pair(tmp_path, (U * S) @ V.mT, (rotated * S) @ V.mT)
    counts = record.summary.verdicts
    assert counts["intruder"] == 0
    assert counts["rotated"] == record.summary.new_directions > 0


def test_k_and_epsilon_and_side(tmp_path):
    W0, W = planted()
    record = audit_pair(tmp_path, W0, W, top_k=3, epsilon=0.01, side="right")
    assert [d.side for d in record.matrices[0].directions] == ["right"] * 3
    assert record.summary.new_directions == 0


def lora(tmp_path, W0, **changes):
    tensors = {
        "base_model.model.layer.lora_A.weight": orthonormal(W0.shape[1], 2, 6).mT,
        "base_model.model.layer.lora_B.weight": orthonormal(W0.shape[0], 2, 5),
    }
    base = save(tmp_path / "base.safetensors", {"layer.weight": W0})
    return base, save_adapter(tmp_path / "adapter", tensors, **({"lora_alpha": 60} | changes))


def test_factors_and_the_merged_matrix_give_the_same_row(tmp_path):
    W0 = gaussian(60, 40)
    base, adapter = lora(tmp_path, W0)
    (low_rank,) = bulkedge.audit(base, adapter).matrices
    W = W0 + 30 * orthonormal(60, 2, 5) @ orthonormal(40, 2, 6).mT
    (dense,) = audit_pair(tmp_path, W0, W).matrices
    assert (low_rank.update, low_rank.rank, dense.update, dense.rank) == ("lora", 2, "dense", None)
    assert low_rank.spectral_norm_update == pytest.approx(30)
    assert dense.spectral_norm_update == pytest.approx(30)
    for a, b in some(zip(low_rank.directions, dense.directions, strict=True)):
        assert (a.verdict, a.matched_index) == (b.verdict, b.matched_index)
        assert (a.score, a.sigma) == pytest.approx((b.score, b.sigma), abs=1e-8)


def test_a_large_step_count_falls_back_to_a_dense_svd(tmp_path, monkeypatch):
    W0, W = planted()
    monkeypatch.setattr("bulkedge.intruder._judge.SIDE_STEPS", 1)
    monkeypatch.setattr("bulkedge.intruder._judge.affordable_steps", lambda shape, k: None)
    monkeypatch.setattr("bulkedge.intruder._judge.DENSE_UP_TO", 0)
    record = audit_pair(tmp_path, W0, W)
    assert record.matrices[0].status == "audited"
    assert "directions open: decided by dense SVDs" in record.matrices[0].note
    assert {d.method for d in record.matrices[0].directions} == {"dense"}
    found = torch.tensor([d.score for d in record.matrices[0].directions], dtype=torch.float64)
    torch.testing.assert_close(found, oracle_scores(W0, W, 10))


def test_a_vector_that_is_not_defined_is_undecided_but_counted(tmp_path):
    """All tuned values coincide: each vector is any of the whole space, its score an accident."""
    W0 = gaussian(120, 120)
    record = audit_pair(tmp_path, W0, orthonormal(120, 120, 4))
    assert record.summary.verdicts["undecided"] == 10
    below = sum(d.score < 0.5 for d in record.matrices[0].directions)
    assert record.summary.new_directions == below == 10
    assert not record.summary.complete


@pytest.mark.parametrize("factor", [1e-290, 1e-200, 1e-30, 1e30, 1e150, 1e300])
def test_scores_do_not_depend_on_the_scale_of_the_weights(factor, tmp_path):
    W0, W = planted()
    record = audit_pair(tmp_path, W0 * factor, W * factor)
    (row,) = record.matrices
    found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
    torch.testing.assert_close(found, oracle_scores(W0, W, 10), rtol=0, atol=1e-8)
    assert row.spectral_norm_update == pytest.approx(50 * factor)
    assert bulkedge.Record.model_validate_json(record.to_json()) == record


def test_figures_of_the_record(tmp_path):
    W0, W = planted()
    (row,) = audit_pair(tmp_path, W0, W).matrices
    S = torch.linalg.svdvals(W)
    assert row.spectral_norm_base == pytest.approx(float(torch.linalg.svdvals(W0)[0]))
    assert [d.sigma for d in row.directions] == pytest.approx(S[:10].tolist())
    U0 = torch.linalg.svd(W0).U
    U = torch.linalg.svd(W).U[:, :10]
    cosines = (U0.mT @ U).abs()
    assert [d.matched_index for d in row.directions] == cosines.argmax(dim=0).tolist()
    overlaps = cosines[:20].norm(dim=0).tolist()
    assert [d.subspace_overlap for d in row.directions] == pytest.approx(overlaps, abs=1e-8)


def test_residuals_are_over_the_largest_singular_value(tmp_path, monkeypatch):
    monkeypatch.setattr("bulkedge.intruder._judge.VECTOR_TOL", 0.1)
    monkeypatch.setattr("bulkedge.comparison.pair.Pair.seed", lambda self, number: number)
    small, large = (
        audit_pair(tmp_path, *(matrix * factor for matrix in planted(600, 500)), method="certified")
        .matrices[0]
        .directions
        for factor in (1 / 1024, 1024)
    )
    assert max(d.residual for d in small) > 1e-6
    assert [d.residual for d in small] == pytest.approx([d.residual for d in large], rel=1e-6)


# ---- something is wrong with one matrix


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["base", "tuned", "A", "B"])
def test_not_finite_is_reported_and_the_others_go_on(value, where, tmp_path):
    W0, W = planted()
    good = {"good.weight": W0}
    bad = {"base": W0.clone(), "tuned": W.clone(), "A": weights(2, 120), "B": weights(150, 2)}
    bad[where][0, 1] = value
    base = save(tmp_path / "base.safetensors", good | {"bad.weight": bad["base"]})
    if where in ("A", "B"):
        prefix = "base_model.model.bad.lora_"
        tensors = {f"{prefix}A.weight": bad["A"], f"{prefix}B.weight": bad["B"]}
        tuned = save_adapter(tmp_path / "t", tensors | {"base_model.model.good.weight": W})
    else:
        tuned = save(tmp_path / "t.safetensors", {"good.weight": W, "bad.weight": bad["tuned"]})
    record = bulkedge.audit(base, tuned)
    rows = {matrix.name: matrix for matrix in record.matrices}
    assert rows["good.weight"].new_directions == 1
    assert rows["bad.weight"].status == "not_finite"
    counts = "1 NaN and 0 Inf" if value != value else "0 NaN and 1 Inf"
    assert rows["bad.weight"].note == f"{where} holds {counts}"
    assert (record.summary.audited, record.summary.not_audited) == (1, 1)


def test_unchanged_matrices(tmp_path):
    W0 = gaussian(20, 10)
    assert audit_pair(tmp_path, W0, W0).matrices[0].status == "unchanged"
    base, adapter = lora(tmp_path, W0, lora_alpha=0)
    assert bulkedge.audit(base, adapter).matrices[0].status == "unchanged"


def test_zero_base_zero_tuned_and_deficient_rank(tmp_path):
    W0, W = planted(20, 10)
    zero = torch.zeros_like(W0)
    (row,) = audit_pair(tmp_path, zero, W, top_k=4).matrices
    assert row.new_directions == 4
    assert {(d.score, d.matched_index) for d in row.directions} == {(0.0, -1)}
    (row,) = audit_pair(tmp_path, W0, zero).matrices
    assert (row.status, row.directions) == ("failed", [])
    assert "all entries of the tuned matrix are zero" in row.note
    few = "no bulk fitted: expected at least 12 singular values, got 10"
    rank3 = orthonormal(20, 3, 1) @ orthonormal(10, 3, 2).mT * 9
    (row,) = audit_pair(tmp_path, W0, rank3, side="both").matrices
    assert len(row.directions) == 6
    assert row.note == f"the tuned matrix has rank 3: 3 of 10 directions exist; {few}"


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)], ids=str)
def test_vectors_are_matrices_too(shape, tmp_path):
    W0 = gaussian(*shape)
    (row,) = audit_pair(tmp_path, W0, W0 + 1, side="both").matrices
    scores = {d.side: d.score for d in row.directions}
    if shape[0] == 1:
        assert scores["left"] == pytest.approx(1)
    if shape[1] == 1:
        assert scores["right"] == pytest.approx(1)


def test_a_failing_matrix_says_why(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("needs 9 GiB")

    monkeypatch.setattr("bulkedge.auditing.matrix.judge_pair", fail)
    (row,) = audit_pair(tmp_path, *planted()).matrices
    assert (row.status, row.note) == ("failed", "OutOfMemoryError: needs 9 GiB")


# ---- the run as a whole


def several(tmp_path):
    base = {f"l{i}.weight": gaussian(30 + i, 20) for i in range(4)}
    tuned = {
        name: W + 20 * orthonormal(W.shape[0], 1, 1) @ orthonormal(20, 1, 2).mT
        for name, W in base.items()
    }
    return save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)


def test_the_record_does_not_depend_on_the_number_of_workers(tmp_path):
    base, tuned = several(tmp_path)
    calls = []
    records = [
        bulkedge.audit(base, tuned, jobs=jobs, progress=lambda *call: calls.append(call))
        for jobs in (1, 2)
    ]
    one, two = (record.model_dump(exclude={"run"}) for record in records)
    assert one == two
    assert [call[1:] for call in calls] == [(i, 4) for i in (1, 2, 3, 4)] * 2


def test_a_dead_worker_is_told(tmp_path, monkeypatch):
    base, tuned = several(tmp_path)
    monkeypatch.setattr("bulkedge.auditing.engine.local.audit_matrix", die)
    with pytest.raises(
        bulkedge.BulkedgeError, match=r"a worker process died .exit code 9.*fewer than 2 jobs"
    ):
        bulkedge.audit(base, tuned, jobs=2)


def die(*_):
    import os

    os._exit(9)


def test_inputs_that_change_during_the_audit_are_noticed(tmp_path):
    base, tuned = several(tmp_path)

    def touch(*_):
        base.touch()

    with pytest.raises(CheckpointError, match="changed during the audit"):
        bulkedge.audit(base, tuned, progress=touch)


def test_jobs_and_device_are_checked_first(tmp_path, monkeypatch):
    base, tuned = several(tmp_path)
    monkeypatch.setattr("bulkedge.auditing.matrix.load", None)
    with pytest.raises(InputError, match="expected jobs ≥ 1, got 0"):
        bulkedge.audit(base, tuned, jobs=0)
    with pytest.raises(InputError, match=r"torch .* sees \d+ CUDA devices; use device 'cpu'"):
        bulkedge.audit(base, tuned, recipe=Recipe(device="cuda:99"))


def test_inputs_that_vanish_during_the_audit(tmp_path):
    base, tuned = several(tmp_path)
    with pytest.raises(CheckpointError, match="changed during the audit"):
        bulkedge.audit(base, tuned, progress=lambda *_: tuned.unlink(missing_ok=True))
    assert not tuned.exists()


def test_an_input_that_cannot_be_hashed(tmp_path, monkeypatch):
    base, tuned = several(tmp_path)
    plan = bulkedge.comparison.make_plan(base, tuned, Recipe())
    base.unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be read"):
        bulkedge.auditing.run_plan(plan, Recipe())


def test_adapters_that_differ_in_scale_alone_leave_different_records(tmp_path):
    W0 = gaussian(60, 40)
    records = [bulkedge.audit(*lora(tmp_path, W0, lora_alpha=a)) for a in (4, 60)]
    assert [record.matrices[0].scale for record in records] == [2.0, 30.0]
    digests = [record.inputs.tuned.files for record in records]
    assert [file.name for file in digests[0]] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]
    assert digests[0][0] == digests[1][0]
    assert digests[0][1] != digests[1][1]


def test_torch_state_is_left_alone(tmp_path):
    W0, W = planted()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    audit_pair(tmp_path, W0, W)
    assert torch.equal(torch.get_rng_state(), before)
