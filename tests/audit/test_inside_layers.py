"""A tuned tensor inside a layer of the base changes that layer: it is no new head beside it."""

import json

import pytest

import bulkedge
from bulkedge.comparison.leftover import IN_A_BLOCK, NO_COUNTERPART, OF_NO_USE, RENAMED
from bulkedge.report import Gate
from helpers import save, save_adapter, weights

CLEAN, FINDINGS, FAILURE = 0, 1, 2
BODY = {f"model.layers.{i}.q.weight": weights(12, 12, seed=i) for i in range(2)}
BODY |= {"model.embed_tokens.weight": weights(20, 12, seed=8)}
BODY |= {"model.norm.weight": weights(12), "lm_head.weight": weights(20, 12, seed=9)}
INSIDE = [
    "lm_head.modules_to_save.default.weight",
    "lm_head.weight_g",
    "lm_head.weight_v",
    "lm_head.delta.weight",
    "lm_head.parametrizations.weight.original1",
    "model.embed_tokens.new_embedding.weight",
    "model.embed_tokens.weight_orig",
    "model.norm.adapter.weight",
]
BESIDE = ["classifier.weight", "lm_head_2.weight", "model.classifier.dense.weight", "v_head.weight"]
LORA = {
    "base_model.model.model.layers.0.q.lora_A.weight": weights(2, 12),
    "base_model.model.model.layers.0.q.lora_B.weight": weights(12, 2) / 99,
}


def folder(path, tensors, config=None):
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config or {"tie_word_embeddings": False}))
    return path


def slightly(tensors):
    return {name: W * 1.01 for name, W in tensors.items()}


def audited(base, tuned):
    record = bulkedge.audit(base, tuned, recipe={"top_k": 3})
    return record, Gate().exit_code(record)


def lost(record):
    return {row.name: row.reason for row in record.skipped if row.lost}


@pytest.mark.parametrize("name", INSIDE)
def test_a_tensor_inside_a_layer_is_lost(name, tmp_path):
    base = folder(tmp_path / "b", BODY)
    tuned = folder(tmp_path / "t", slightly(BODY) | {name: weights(20, 12)})
    record, code = audited(base, tuned)
    assert (code, lost(record)) == (FAILURE, {name: IN_A_BLOCK})
    assert record.summary.tensors.apart == 0


@pytest.mark.parametrize("name", INSIDE)
def test_also_where_the_tuned_names_have_another_prefix(name, tmp_path):
    """One prefix for all of them, and wrappers that differ from side to side."""
    base = folder(tmp_path / "b", BODY)
    for wrapping in ("policy.", "model.language_model."):
        own = name.removeprefix("model.") if "language" in wrapping else name
        tuned = slightly(BODY) | {name: weights(20, 12)}
        tuned = {wrapping + n: W for n, W in tuned.items()}
        record, code = audited(base, folder(tmp_path / wrapping, tuned))
        assert code == FAILURE
        assert [n for n in lost(record) if n.endswith(own)]


@pytest.mark.parametrize("name", BESIDE)
def test_a_new_head_is_not(name, tmp_path):
    base = folder(tmp_path / "b", BODY)
    tuned = folder(tmp_path / "t", slightly(BODY) | {name: weights(3, 12)})
    record, code = audited(base, tuned)
    assert code == CLEAN
    assert {row.name: row.reason for row in record.skipped}[name] == NO_COUNTERPART


@pytest.mark.parametrize("between", ["", ".modules_to_save", ".modules_to_save.default"])
def test_a_layer_that_an_adapter_replaces_is_audited(between, tmp_path):
    """Versions of PEFT differ in how they name it."""
    base = folder(tmp_path / "b", BODY)
    W = BODY["lm_head.weight"] + 99 * weights(20, 1) @ weights(1, 12)
    keys = LORA | {f"base_model.model.lm_head{between}.weight": W}
    record, code = audited(base, save_adapter(tmp_path / "a", keys, modules_to_save=["lm_head"]))
    assert (code, lost(record)) == (FINDINGS, {})
    (head,) = [matrix for matrix in record.matrices if matrix.name == "lm_head.weight"]
    assert head.new_directions > 0


@pytest.mark.parametrize(
    "name", ["lm_head.modules_to_save.other.weight", "lm_head.delta", "model.embed_tokens.weight_v"]
)
def test_what_else_an_adapter_has_inside_a_layer_is_lost(name, tmp_path):
    base = folder(tmp_path / "b", BODY)
    keys = LORA | {f"base_model.model.{name}": weights(20, 12)}
    record, code = audited(base, save_adapter(tmp_path / "a", keys))
    assert (code, list(lost(record))) == (FAILURE, [f"base_model.model.{name}"])


CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False}


def classifier(path, name, W):
    """A fine-tune by whose class the output layer of the base is of no use, with another head."""
    body = {n: x * 1.01 for n, x in BODY.items() if n != "lm_head.weight"}
    return folder(path, body | {name: W}, CLASSIFIER)


@pytest.mark.parametrize("name", ["output.weight", "score.weight", "head.proj.weight"])
def test_a_renamed_output_layer_is_lost_whatever_the_class(name, tmp_path):
    W = BODY["lm_head.weight"] + 99 * weights(20, 1) @ weights(1, 12)
    tuned = classifier(tmp_path / "t", name, W)
    record, code = audited(folder(tmp_path / "b", BODY), tuned)
    assert (code, lost(record)) == (FAILURE, {name: RENAMED})


def test_a_classifier_is_not(tmp_path):
    base = folder(tmp_path / "b", BODY)
    record, code = audited(base, classifier(tmp_path / "t", "score.weight", weights(2, 12)))
    assert (code, lost(record)) == (CLEAN, {})
    assert {row.name: row.reason for row in record.skipped if "norm" not in row.name} == {
        "score.weight": NO_COUNTERPART,
        "lm_head.weight": OF_NO_USE,
    }


def test_a_dense_layer_of_a_classifier_has_the_shape_of_one_that_its_class_lacks(tmp_path):
    """RoBERTa: ``lm_head.dense`` of the base, ``classifier.dense`` of the fine-tune."""
    base = BODY | {"lm_head.dense.weight": weights(12, 12)}
    tuned = classifier(tmp_path / "t", "classifier.dense.weight", weights(12, 12, seed=3))
    record, code = audited(folder(tmp_path / "b", base), tuned)
    assert (code, lost(record)) == (CLEAN, {})
