"""Shards of which an index chooses, states of training runs, and parameters that are no layers."""

import json

import pytest
import torch

import bulkedge
from bulkedge import CheckpointError
from bulkedge.checkpoint import open_checkpoint
from helpers import save, weights

NAME = "h.0.q.weight"


def overlay(folder):
    """Two shards with a tensor of one name, and an index that takes it from the second."""
    save(folder / "model-1.safetensors", {NAME: weights(9, 7), "h.1.q.weight": weights(9, 7)})
    save(folder / "model-2.safetensors", {NAME: weights(9, 7, seed=5)})
    index = {NAME: "model-2.safetensors", "h.1.q.weight": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_the_index_decides_and_the_other_copy_is_listed(tmp_path):
    folder = overlay(tmp_path / "m")
    opened = open_checkpoint(folder)
    assert torch.equal(opened.weights[NAME].read(None, None), weights(9, 7, seed=5))
    base = save(tmp_path / "b.safetensors", {NAME: weights(9, 7), "h.1.q.weight": weights(9, 7)})
    record = bulkedge.audit(base, folder, recipe={"top_k": 2})
    (row,) = (row for row in record.skipped if "superseded" in row.reason)
    assert (row.name, row.side, row.lost) == (f"{NAME} in model-1.safetensors", "tuned", False)
    assert row.reason == "superseded: the index takes 'model-2.safetensors'"
    assert [m.status for m in record.matrices] == ["audited", "unchanged"]


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


STATES = {
    "deepspeed": (
        ["zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"],
        r"ZeRO in pieces.*: python .*zero_to_fp32\.py .* OTHER --safe_serialization",
    ),
    "deepspeed alone": (["global_step10/x.pt"], r"python zero_to_fp32\.py of DeepSpeed"),
    "fsdp": (["__0_0.distcp"], r"FSDP in pieces .*: accelerate merge-weights .* OTHER"),
    "fsdp below": (
        ["pytorch_model_fsdp_0/__0_0.distcp"],
        "accelerate merge-weights .*fsdp_0 OTHER",
    ),
    "hub": (["models--org--a--b/refs/main"], "by its id, such as org/a--b"),
    "model of pickles": (
        ["config.json", "pytorch_model-00001-of-00002.bin"],
        r"AutoModel\.from_pretrained\('.*'\)\.save_pretrained\(OTHER\)",
    ),
    "pickle": (["model.pt"], r"save_file\(\{k: v\.clone\(\) for k, v in torch\.load\(FILE"),
}


@pytest.mark.parametrize("case", STATES)
def test_the_message_names_the_tool_that_converts(case, tmp_path):
    names, message = STATES[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(touched(tmp_path / "m", *names))


def test_the_advice_for_a_pickle_works_on_tied_weights(tmp_path):
    from safetensors.torch import save_file

    W = weights(4, 3)
    torch.save({"a.weight": W, "b.weight": W}, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"a.weight", "b.weight"}


def audit_of(tmp_path, name, before, after):
    both = {"h.0.q.weight": weights(9, 7)}
    base = save(tmp_path / "b.safetensors", both | {name: before})
    tuned = save(tmp_path / "t.safetensors", {NAME: weights(9, 7, seed=3), name: after})
    record = bulkedge.audit(base, tuned, recipe={"top_k": 2})
    (row,) = (row for row in record.skipped if row.name == name)
    return record, row


@pytest.mark.parametrize("name", ["embeddings.cls_token", "vit.pos_embed", "head.probe", "odd"])
def test_one_that_is_equal_is_no_update(name, tmp_path):
    record, row = audit_of(tmp_path, name, weights(1, 5, 7), weights(1, 5, 7))
    assert (row.reason, row.lost) == ("equal on both sides: a parameter that is no layer", False)
    assert record.summary.lost == 0


@pytest.mark.parametrize(
    "name", ["cls_token", "embeddings.position_embeddings", "head.probe", "a.query_tokens"]
)
def test_a_changed_one_that_says_what_it_is_is_told_of(name, tmp_path):
    record, row = audit_of(tmp_path, name, weights(1, 5, 7), weights(1, 5, 7, seed=2))
    assert row.reason.startswith("changed, and no layer")
    assert (row.lost, record.summary.lost) == (False, 0)


@pytest.mark.parametrize(("name", "shape"), [("odd", (1, 5, 7)), ("cls_token", (2, 5, 7))])
def test_a_changed_one_of_another_form_is_lost(name, shape, tmp_path):
    _, row = audit_of(tmp_path, name, weights(*shape), weights(*shape, seed=2))
    assert row.lost
    assert "neither a kernel nor a stack" in row.reason
