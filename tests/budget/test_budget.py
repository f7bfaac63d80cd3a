"""The budget of a base, from files to a record."""

import json
import re

import pytest
import torch
from safetensors import safe_open

import bulkedge
from bulkedge import CheckpointError, InputError, NothingAuditedError, RecipeError
from bulkedge.budgeting import matrix as measuring
from bulkedge.budgeting import run as running
from bulkedge.records.budget import BudgetRecord
from bulkedge.tune import AdaptedMatrix, SpikeClip
from bulkedge.update import BaseSpectrum, measure, predict
from bulkedge.update import budget as budget_of
from helpers import MINILM, save, save_adapter, some, weights

PREFIX = "base_model.model."


def spiked(m, n, seed=0, strength=30.0):
    W = weights(m, n, seed=seed)
    W[:, 0] += strength * torch.nn.functional.normalize(weights(m, seed=seed + 9), dim=0)
    return W


@pytest.fixture(scope="module")
def tensors():
    return {
        "embed_tokens.weight": weights(50, 40, seed=5),
        "up.weight": spiked(60, 40),
        "up.bias": weights(60),
        "down.weight": 3 * weights(40, 60, seed=1),
        "gate.weight": weights(4, 40, seed=2),
        "lm_head.weight": weights(50, 40, seed=6),
    }


@pytest.fixture(scope="module")
def base(tensors, tmp_path_factory):
    return save(tmp_path_factory.mktemp("base") / "model.safetensors", tensors)


def factors(seed=0, size=1.0):
    """B and A of ‖B·A‖₂ = size."""
    B, A = weights(60, 3, seed=seed), weights(3, 40, seed=seed + 1)
    return B * size / torch.linalg.matrix_norm(B @ A, 2), A


def adapter(folder, size, **config):
    B, A = factors(size=size)
    tensors = {f"{PREFIX}up.lora_A.weight": A, f"{PREFIX}up.lora_B.weight": B}
    tensors |= {f"{PREFIX}down.lora_A.weight": B.mT / 1e3, f"{PREFIX}down.lora_B.weight": A.mT}
    return save_adapter(folder, tensors, **{"r": 3, "lora_alpha": 6} | config)


def by_name(record):
    return {row.name: row for row in record.matrices}


def test_the_limits_are_those_of_an_svd(base, tensors):
    record = bulkedge.budget(base, top_k=2)
    for row in some(record.matrices):
        W0 = tensors[row.name].double()
        values = torch.linalg.svdvals(W0)
        expected = budget_of(BaseSpectrum.of(W0), 1, top_k=2)
        assert row.threshold == pytest.approx(expected.threshold)
        assert row.top_k_threshold == pytest.approx(expected.top_k_threshold)
        assert (row.sigma_1, row.sigma_k) == pytest.approx((float(values[0]), float(values[1])))
        assert row.bulk.exact
        assert row.allowed is None
    assert by_name(record)["down.weight"].noise is True


@pytest.mark.slow
def test_the_limits_of_a_real_model_are_those_of_svds():
    """Measured without an SVD: within 2 % on every matrix of the encoder."""
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if re.search(r"layer.*(?<!Norm)\.weight$", name)]  # noqa: SIM118
        for name in some(names):
            W0 = file.get_tensor(name)
            found = budget_of(measure(W0, small=0).spectrum, 1)
            expected = budget_of(BaseSpectrum.of(W0), 1)
            assert found.top_k_threshold == pytest.approx(expected.top_k_threshold, rel=0.02), name
    assert len(names) == 36


def test_what_adapters_do_not_update_is_left_out_and_listed(base):
    record = bulkedge.budget(base)
    assert {row.name for row in record.matrices} == {"up.weight", "down.weight"}
    reasons = {row.name: row.reason for row in record.skipped}
    assert set(reasons) == {"embed_tokens.weight", "gate.weight", "lm_head.weight"}
    assert "fewer than 12" in reasons["gate.weight"]
    assert record.complete
    assert not record.unanswered


def test_what_is_asked_for_by_name_is_measured_or_said_to_have_no_limit(base):
    record = bulkedge.budget(base, target=["embed_tokens", "gate"])
    rows = by_name(record)
    assert rows["embed_tokens.weight"].top_k_threshold > 0
    assert rows["gate.weight"].status == "no_limit"
    assert "at least 12" in rows["gate.weight"].note
    assert not record.complete
    only = bulkedge.budget(base, target="*e*.weight", exclude=["gate*", "lm_*"])
    assert [row.name for row in only.matrices] == ["embed_tokens.weight"]


def test_the_largest_product_just_reaches_the_level(base):
    asked = {"target": ("up", "down"), "rank": 4, "alpha": 8, "level": 0.7}
    for rslora, scale in ((False, 2.0), (True, 4.0)):
        record = bulkedge.budget(base, rslora=rslora, **asked)
        for row in some(record.matrices):
            assert row.allowed.scale == scale
            assert row.allowed.max_ba_norm * scale == pytest.approx(0.7 * row.top_k_threshold)
    alphas = [row.allowed.alpha for row in record.matrices]
    limits = [row.top_k_threshold for row in record.matrices]
    assert sum(alphas) / len(alphas) == pytest.approx(8)
    assert alphas[0] / alphas[1] == pytest.approx(limits[0] / limits[1])


def test_an_update_below_the_limit_is_predicted_to_make_no_outlier(base, tensors):
    row = by_name(bulkedge.budget(base, rank=3, alpha=6))["down.weight"]
    for part, outliers in ((0.99, 0), (1.01, 1)):
        B, A = factors(size=part * row.allowed.max_ba_norm)
        found = predict(tensors["down.weight"], A.mT, B.mT, row.allowed.scale)
        assert int(found.supercritical.sum()) == outliers


@pytest.mark.parametrize("rslora", [False, True])
def test_like_an_adapter_the_alpha_keeps_its_spike_below_the_level(base, tmp_path, rslora):
    limit = by_name(bulkedge.budget(base, top_k=1))["up.weight"].top_k_threshold
    folder = adapter(tmp_path / "a", limit, use_rslora=rslora)
    record = bulkedge.budget(base, like=folder, level=0.5, top_k=1)
    rows = by_name(record)
    scale = 6 / 3**0.5 if rslora else 2.0
    assert rows["up.weight"].allowed.spectral_norm_update == pytest.approx(scale * limit, rel=1e-5)
    assert [row.name for row in record.above] == ["up.weight"]
    found = rows["up.weight"].allowed.alpha
    spike = found / (3**0.5 if rslora else 3) * limit
    assert 0.5 * limit * (1 - 1e-4) < spike < 0.5 * limit
    assert rows["down.weight"].allowed.alpha == pytest.approx(6)  # it has room


def test_an_update_that_no_alpha_holds_is_said_to_be_unanswered(base, tmp_path):
    B, A = factors()
    tensors = {f"{PREFIX}up.lora_A.weight": A, f"{PREFIX}up.lora_B.weight": B}
    dora = tensors | {f"{PREFIX}up.lora_magnitude_vector": torch.ones(60)}
    record = bulkedge.budget(base, like=save_adapter(tmp_path / "d", dora, r=3, use_dora=True))
    assert [row.name for row in record.unanswered] == ["up.weight"]
    assert not record.complete
    assert "DoRA" in record.matrices[0].note
    broken = tensors | {f"{PREFIX}up.lora_A.weight": A * float("nan")}
    record = bulkedge.budget(base, like=save_adapter(tmp_path / "n", broken, r=3))
    assert "NaN or Inf" in record.matrices[0].note
    none = save_adapter(tmp_path / "z", tensors, r=3, lora_alpha=0)
    assert "scale of zero" in bulkedge.budget(base, like=none).matrices[0].note


def test_one_bad_tensor_does_not_stop_the_others(tensors, tmp_path):
    bad = save(tmp_path / "m.safetensors", tensors | {"up.weight": weights(60, 40) / 0})
    record = bulkedge.budget(bad)
    rows = by_name(record)
    assert (rows["up.weight"].status, rows["down.weight"].status) == ("failed", "measured")
    assert "NaN or Inf" in rows["up.weight"].note
    assert not record.complete


def test_where_the_density_breaks_off_the_limit_is_that_of_random_updates(tmp_path):
    U, V = (torch.linalg.qr(weights(200, 200, seed=i)).Q for i in (0, 1))
    even = (U * torch.linspace(1, 0.1, 200)) @ V
    record = bulkedge.budget(save(tmp_path / "m.safetensors", {"up.weight": even}))
    (row,) = record.matrices
    assert (row.status, row.threshold) == ("measured", 0.0)
    assert "ends in a step" in row.note
    base, new = torch.linalg.svd(even.double()).U, []
    for factor in (0.5, 2.0):  # over what share of random updates makes a new direction
        found = 0
        for seed in range(8):
            u, v = (torch.linalg.qr(weights(200, 1, seed=90 + 2 * seed + i)).Q for i in (0, 1))
            W = even.double() + factor * row.top_k_threshold * (u @ v.mT).double()
            scores = (base.mT @ torch.linalg.svd(W).U[:, :10]).abs().amax(0)
            found += bool((scores < 0.5).any())
        new.append(found)
    assert new[0] <= 2
    assert new[1] >= 6


def test_it_goes_on_from_its_journal_whatever_is_asked(base, tmp_path, monkeypatch):
    journal, notes = tmp_path / "journal.jsonl", []
    first = bulkedge.budget(base, journal=journal)
    lines = journal.read_text().splitlines()
    journal.write_text(lines[0] + "\n" + lines[1][:40])  # killed in the second
    measured, real = [], measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda W, **x: measured.append(W) or real(W, **x))
    again = bulkedge.budget(
        base, rank=4, alpha=8, journal=journal, resume=True, notice=notes.append
    )
    assert len(measured) == 1
    assert again.run.resumed == 1
    assert any("1 of 2 matrices taken" in note for note in notes)
    assert [r.top_k_threshold for r in again.matrices] == [
        r.top_k_threshold for r in first.matrices
    ]
    bulkedge.budget(base, top_k=3, journal=journal, resume=True)  # another k is another limit
    assert len(measured) == 3


def test_two_jobs_find_what_one_does(base):
    one, two = (bulkedge.budget(base, jobs=jobs) for jobs in (1, 2))
    assert one.matrices == two.matrices


def test_an_input_that_changes_is_noticed(base, tmp_path, monkeypatch):
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(base.read_bytes())
    real = running.measure_matrix
    monkeypatch.setattr(running, "measure_matrix", lambda *x: copy.touch() or real(*x))
    with pytest.raises(CheckpointError, match="changed meanwhile; start the budget again"):
        bulkedge.budget(copy)


def test_a_record_is_checked_when_it_is_read(base, tmp_path):
    record = bulkedge.budget(base, rank=4, alpha=8)
    path = tmp_path / "budget.json"
    path.write_text(record.to_json())
    assert BudgetRecord.from_json(path) == record
    (first, *_) = json.loads(record.to_json())["matrices"]
    for part, changed, words in (
        ("matrices", {"top_k_threshold": 1e-9}, "expected θ_c ≤ θ_k, or θ_k = σ_k"),
        ("matrices", {"sigma_1": 1e-9}, "expected σ_k ≤ σ_1 of 'down.weight'"),
        (
            "matrices",
            {"top_k_threshold": None},
            "expected a limit of 'down.weight' if it was measured",
        ),
        ("matrices", {"allowed": first["allowed"] | {"max_ba_norm": 1e9}}, "expected the largest"),
        ("settings", {"level": -1}, "greater than 0"),
    ):
        content = json.loads(record.to_json())
        found = content[part]
        (found[0] if isinstance(found, list) else found).update(changed)
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="not a budget of schema 1") as caught:
            BudgetRecord.from_json(path)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rank": 4}, InputError, "expected both rank and alpha, or neither"),
        ({"rank": 0, "alpha": 8}, InputError, "expected rank ≥ 1"),
        ({"rslora": True}, InputError, "expected rank and alpha for rslora"),
        ({"level": 0}, InputError, "expected level to be positive"),
        ({"target": "nobody"}, RecipeError, "matches no tensor of the base"),
        ({"target": "up.bias"}, NothingAuditedError, "no matrix to measure in"),
        ({"resume": True}, InputError, "expected the journal to resume from"),
        ({"like": "x", "rank": 4, "alpha": 8}, InputError, "or like, whose own they are"),
    ],
)
def test_what_makes_no_sense_is_refused(base, settings, error, words):
    with pytest.raises(error, match=words):
        bulkedge.budget(base, **settings)


def test_base_and_adapter_have_their_places(base, tmp_path):
    folder = adapter(tmp_path / "a", 1.0)
    with pytest.raises(InputError, match="give the base model, and the adapter as like"):
        bulkedge.budget(folder)
    with pytest.raises(InputError, match="give a LoRA adapter as like"):
        bulkedge.budget(base, like=base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_values_have_no_limit(tmp_path, dtype):
    Q = torch.linalg.qr(weights(60, 40).double()).Q.to(dtype)
    noise = weights(60, 40).to(dtype)
    base = save(
        tmp_path / "base.safetensors", {"a.weight": Q, "b.weight": 7 * Q, "c.weight": noise}
    )
    record = bulkedge.budget(base, rank=4, alpha=8)
    rows = by_name(record)
    assert {name: row.status for name, row in rows.items()} == {
        "a.weight": "no_limit", "b.weight": "no_limit", "c.weight": "measured",
    }  # fmt: skip
    assert list(bulkedge.lora_config(record)["alpha_pattern"].values()) == [8.0]
    with pytest.warns(
        UserWarning, match="left alone: 1 layer without a bulk that a spike could leave: a"
    ):
        held = SpikeClip([layer(Q, "a"), layer(noise, "c")])
    assert [x.name for x in held.matrices] == ["c"]


def layer(W0, name):
    return AdaptedMatrix(name, W0, torch.ones(1, 40), torch.ones(60, 1))


def test_embeddings_by_short_names_are_left_out(tmp_path):
    names = ("emb", "tok_emb", "net.emb", "member", "remember_gate")
    base = save(
        tmp_path / "base.safetensors", {f"{x}.weight": weights(60, 40, seed=i)
                                        for i, x in enumerate(names)}
    )  # fmt: skip
    assert set(by_name(bulkedge.budget(base))) == {"member.weight", "remember_gate.weight"}


def test_a_level_that_would_change_nothing_is_refused(base):
    with pytest.raises(InputError, match="expected rank and alpha, or like, for level"):
        bulkedge.budget(base, level=0.5)
    record = bulkedge.budget(base, rank=4, alpha=8, level=0.5, target="up")
    with pytest.raises(InputError, match="expected level 1 for settings of a planned rank"):
        bulkedge.lora_config(record)
