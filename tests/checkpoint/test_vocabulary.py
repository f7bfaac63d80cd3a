"""A resized vocabulary: the rows that both sides have are judged, the others are named."""

import json

import pytest
import torch

import bulkedge
from bulkedge import CheckpointError, Recipe, Scale
from bulkedge.checkpoint import read_header, read_tensor
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from cases import orthonormal
from helpers import oracle_scores, save, save_adapter, some, weights

CPU = torch.device("cpu")
EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj.weight"
BEFORE, WIDTH = 40, 24


def model(path, rows, seed=0, names=(EMBED, HEAD), **config):
    tensors = {name: weights(rows, WIDTH, seed=seed + i) for i, name in enumerate(names)}
    tensors[Q] = weights(WIDTH, WIDTH, seed=seed + 7)
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return path, tensors


def resized(path, base, rows, names=(EMBED, HEAD), **config):
    """A fine-tune of the base with more rows, or fewer, and a new direction in each matrix."""
    tensors = {}
    for i, (name, W) in enumerate(base.items()):
        spike = orthonormal(len(W), 1, i) @ orthonormal(WIDTH, 1, i + 9).mT
        W = W + 30 * spike.float()
        if name in names:
            W = torch.cat([W, 5 + weights(max(rows - len(W), 0), WIDTH, seed=3)])[:rows]
        tensors[name] = W
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return path, tensors


@pytest.mark.parametrize("rows", [BEFORE + 3, BEFORE - 3], ids=["added", "cut"])
def test_the_common_rows_are_judged_and_the_others_named(rows, tmp_path):
    base, before = model(tmp_path / "b", BEFORE)
    tuned, after = resized(tmp_path / "t", before, rows)
    record = bulkedge.audit(base, tuned, recipe={"top_k": 3})
    common = min(rows, BEFORE)
    part = "" if rows > BEFORE else f"[0:{common}]"
    assert {row.name for row in record.matrices} == {Q, EMBED + part, HEAD + part}
    for row in some(record.matrices):
        name = row.name.removesuffix(part) if part else row.name
        exact = oracle_scores(before[name][:common], after[name][:common], 3)
        scores = torch.tensor([direction.score for direction in row.directions])
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-4)
        said = f"{common} of {max(rows, BEFORE)} rows compared: the vocabulary was resized"
        assert (row.note == said) == (name != Q)
    side, what = ("tuned", "added to") if rows > BEFORE else ("base", "cut off")
    left = {row.name: row.reason for row in record.skipped if row.side == side}
    assert set(left) == {EMBED, HEAD}
    assert all(reason.startswith(
        f"rows {common} to {max(rows, BEFORE) - 1} were {what} the vocabulary"
    ) for reason in left.values())  # fmt: skip
    assert record.summary.complete
    assert {row.fate for row in record.tensors} == {"judged"}


def test_a_head_that_shares_the_embedding(tmp_path):
    base, before = model(tmp_path / "b", BEFORE, names=(EMBED,), tie_word_embeddings=True)
    tuned, after = resized(tmp_path / "t", before, BEFORE + 2, tie_word_embeddings=False)
    save(tmp_path / "t" / "model.safetensors", after | {HEAD: after[EMBED] + 1})
    plan = make_plan(base, tuned, Recipe())
    assert [c.base.name for c in plan.comparisons] == [EMBED, f"{EMBED}[as lm_head]", Q]
    assert not any(row.lost for row in plan.skipped)
    own, before = model(tmp_path / "own", BEFORE)
    together, _ = resized(
        tmp_path / "together", {EMBED: before[EMBED], Q: before[Q]}, BEFORE + 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    plan = make_plan(own, together, Recipe())
    assert {c.base.name for c in plan.comparisons} == {EMBED, HEAD, Q}
    assert not any(row.lost for row in plan.skipped)
    for comparison in some(plan.comparisons):
        pair = load(comparison, CPU)
        assert pair.replaced is not None
        assert pair.replaced.shape == pair.base.shape


def test_an_adapter_on_a_resized_model(tmp_path):
    """PEFT stores the resized embedding whole, beside the updates of both layers."""
    base, before = model(tmp_path / "b", BEFORE)
    after = torch.cat([before[EMBED] + 0.1, weights(3, WIDTH)])
    factors = {
        EMBED: after,
        "model.embed_tokens.lora_embedding_A": weights(2, BEFORE + 3),
        "model.embed_tokens.lora_embedding_B": weights(WIDTH, 2),
        "lm_head.lora_A.weight": weights(2, WIDTH),
        "lm_head.lora_B.weight": weights(BEFORE + 3, 2),
        "model.layers.0.q_proj.lora_A.weight": weights(2, WIDTH),
        "model.layers.0.q_proj.lora_B.weight": weights(WIDTH, 2),
    }
    adapter = save_adapter(tmp_path / "a", factors)
    plan = make_plan(base, adapter, Recipe())
    found = {
        c.base.name: load(c, CPU).tuned_map(torch.float64).to_dense() for c in plan.comparisons
    }
    A, B = (factors[f"model.embed_tokens.lora_embedding_{part}"].double() for part in "AB")
    torch.testing.assert_close(found[EMBED], (after.double() + 2 * (B @ A).mT)[:BEFORE])
    A, B = (factors[f"lm_head.lora_{part}.weight"].double() for part in "AB")
    torch.testing.assert_close(found[HEAD], before[HEAD].double() + 2 * (B @ A)[:BEFORE])
    assert set(found) == {EMBED, HEAD, Q}
    assert [row.lost for row in plan.skipped] == [False, False]
    record = bulkedge.repair(
        base, adapter, tmp_path / "out", method=Scale(0.0), recipe={"top_k": 3}
    )
    refused = {row.name for row in record.matrices if row.status == "refused"}
    assert refused <= {EMBED, HEAD}
    for row in some(row for row in record.matrices if row.name in refused):
        assert "more rows than the base has" in row.note


def test_a_repair_keeps_the_rows_that_were_added(tmp_path):
    base, before = model(tmp_path / "b", BEFORE)
    tuned, after = resized(tmp_path / "t", before, BEFORE + 3)
    record = bulkedge.repair(base, tuned, tmp_path / "out", method=Scale(0.0), recipe={"top_k": 3})
    assert {row.status for row in record.matrices} == {"repaired"}
    stored, _ = read_header(tmp_path / "out" / "model.safetensors")
    for name in (EMBED, HEAD):
        found = read_tensor(stored[name])
        assert torch.equal(found[BEFORE:], after[name][BEFORE:])
        left = torch.linalg.matrix_norm((found[:BEFORE] - before[name]).double(), 2)
        assert left < 15 < torch.linalg.matrix_norm((after[name][:BEFORE] - before[name]), 2)


def test_norms_over_rows_that_the_base_lacks(tmp_path):
    base, _ = model(tmp_path / "b", BEFORE)
    factors = {
        "model.embed_tokens.lora_embedding_A": weights(2, BEFORE + 3),
        "model.embed_tokens.lora_embedding_B": weights(WIDTH, 2),
        "model.embed_tokens.lora_magnitude_vector": weights(WIDTH),
        "model.layers.0.q_proj.lora_A.weight": weights(2, WIDTH),
        "model.layers.0.q_proj.lora_B.weight": weights(WIDTH, 2),
        "model.layers.0.q_proj.lora_magnitude_vector": weights(WIDTH),
    }
    plan = make_plan(base, save_adapter(tmp_path / "a", factors, use_dora=True), Recipe())
    assert [c.base.name for c in plan.comparisons] == [Q]
    lost = [row for row in plan.skipped if row.lost]
    assert {"DoRA of an embedding that was resized" in row.reason for row in some(lost)} == {True}


@pytest.mark.parametrize("rows", [BEFORE // 2 - 1, 2 * BEFORE + 1])
def test_another_size_altogether_is_another_base(rows, tmp_path):
    base, before = model(tmp_path / "b", BEFORE)
    tuned, _ = resized(tmp_path / "t", before, rows)
    with pytest.raises(CheckpointError, match=rf"has shape \({rows}, 24\), expected \(40, 24\)"):
        make_plan(base, tuned, Recipe())
