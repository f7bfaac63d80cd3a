"""Empty tensors, such as ZeRO-3 leaves in a save that gathers nothing: lost, in every format."""

import json

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge.cli import cli
from helpers import save, save_adapter, weights

EMPTY = torch.zeros(0)
BASE = {
    "model.q.weight": weights(6, 6),
    "model.q.bias": weights(6),
    "model.k.weight": weights(6, 6, seed=1),
    "model.experts.down_proj": weights(2, 6, 6),
    "model.embed_tokens.weight": weights(9, 6),
    "lm_head.weight": weights(9, 6, seed=2),
}
FACTORS = {
    "base_model.model.model.q.lora_A.weight": weights(2, 6),
    "base_model.model.model.q.lora_B.weight": weights(6, 2),
    "base_model.model.model.k.lora_A.weight": weights(2, 6),
    "base_model.model.model.k.lora_B.weight": weights(6, 2),
}
KOHYA = {
    "lora_unet_model_q.lora_down.weight": weights(2, 6),
    "lora_unet_model_q.lora_up.weight": weights(6, 2),
    "lora_unet_model_q.alpha": torch.tensor(2.0),
    "lora_unet_model_k.lora_down.weight": weights(2, 6),
    "lora_unet_model_k.lora_up.weight": weights(6, 2),
}
DIFFUSERS = {
    f"unet.model.{layer}.lora_{side}.weight": W
    for layer in "qk"
    for side, W in (("A", weights(2, 6)), ("B", weights(6, 2)))
}


def checkpoint(folder, tensors):
    return save(folder / "model.safetensors", tensors)


def sharded(folder, tensors):
    place = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(place.values()):
        save(folder / shard, {n: t for n, t in tensors.items() if place[n] == shard})
    index = {"weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def adapter(folder, tensors, **config):
    return save_adapter(folder, tensors, **config)


def one_file(folder, tensors):
    return save(folder / "lora.safetensors", tensors)


def dora(folder, tensors):
    norms = {
        f"base_model.model.model.{layer}.lora_magnitude_vector": weights(6).abs() for layer in "qk"
    }
    return save_adapter(folder, norms | tensors, use_dora=True)


def experts(folder, tensors):
    return save_adapter(folder, tensors, target_parameters=["experts.down_proj"])


def changed(names):
    return {name: BASE[name] + 1 for name in names}


STACKED = FACTORS | {
    "base_model.model.model.experts.lora_A.weight": weights(4, 6),
    "base_model.model.model.experts.lora_B.weight": weights(6, 4),
}
SAVES = {
    "file": (checkpoint, changed(BASE)),
    "shards": (sharded, changed(BASE)),
    "adapter": (adapter, FACTORS),
    "kohya": (one_file, KOHYA),
    "diffusers": (one_file, DIFFUSERS),
    "dora": (dora, FACTORS),
    "experts": (experts, STACKED),
}
TENSORS = [(kind, name) for kind, (_, tensors) in SAVES.items() for name in tensors] + [
    ("dora", "base_model.model.model.q.lora_magnitude_vector"),
    ("adapter", "base_model.model.model.embed_tokens.weight"),
    ("adapter", "base_model.model.lm_head.weight"),
    ("adapter", "base_model.model.new_head.weight"),
    ("adapter", "base_model.model.model.q.bias"),
    ("adapter", "base_model.model.model.q.lora_B.bias"),
    ("adapter", "base_model.model.model.embed_tokens.base_layer.weight"),
    ("file", "new_head.weight"),
]


@pytest.mark.parametrize("shape", [(0,), (0, 6)], ids=str)
@pytest.mark.parametrize(("kind", "name"), TENSORS)
def test_an_empty_tensor_is_lost_whatever_it_was(kind, name, shape, tmp_path):
    make, tensors = SAVES[kind]
    base = save(tmp_path / "base.safetensors", BASE)
    tuned = make(tmp_path / "tuned", tensors | {name: torch.zeros(*shape)})
    record = bulkedge.audit(base, tuned, recipe={"top_k": 2})
    (row,) = (row for row in record.skipped if row.name == name)
    assert row.lost
    assert "stage3_gather_16bit_weights_on_model_save" in row.reason
    assert "zero_to_fp32" in row.reason
    assert not record.summary.complete
    assert record.matrices


@pytest.mark.parametrize("kind", SAVES)
def test_none_is_lost_of_a_whole_save(kind, tmp_path):
    make, tensors = SAVES[kind]
    base = save(tmp_path / "base.safetensors", BASE)
    tuned = make(tmp_path / "tuned", tensors)
    record = bulkedge.audit(base, tuned, recipe={"top_k": 2})
    assert not any(row.lost for row in record.skipped)


def test_the_command_fails_and_says_how_to_save(tmp_path):
    base = save(tmp_path / "base.safetensors", BASE)
    tuned = save(tmp_path / "tuned.safetensors", changed(BASE) | {"lm_head.weight": EMPTY})
    command = ["audit", str(base), str(tuned), "--fail-on", "never"]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 2
    assert "stage3_gather_16bit_weights_on_model_save" in found.output.replace("\n", "")
    assert CliRunner().invoke(cli, [*command, "--exclude", "lm_head.*"]).exit_code == 0


def test_all_weights_empty(tmp_path):
    base = save(tmp_path / "base.safetensors", BASE)
    nothing = {name: W if W.ndim < 2 else EMPTY for name, W in BASE.items()}
    tuned = save(tmp_path / "tuned.safetensors", nothing)
    with pytest.raises(bulkedge.NothingAuditedError, match="zero_to_fp32"):
        bulkedge.audit(base, tuned)


@pytest.mark.parametrize("name", ["model.k.weight", "model.experts.down_proj", "model.q.bias"])
def test_an_empty_tensor_of_the_base(name, tmp_path):
    base = save(tmp_path / "base.safetensors", BASE | {name: EMPTY})
    record = bulkedge.audit(base, save(tmp_path / "tuned.safetensors", BASE))
    (row,) = (row for row in record.skipped if row.name == name)
    assert row.lost
    assert "zero_to_fp32" in row.reason


@pytest.mark.parametrize("shape", [(0,), (0, 6)], ids=str)
def test_tensors_that_are_empty_on_both_sides_are_equal(shape, tmp_path):
    both = BASE | {"none.weight": torch.zeros(*shape)}
    base = save(tmp_path / "base.safetensors", both)
    record = bulkedge.audit(base, save(tmp_path / "tuned.safetensors", both))
    assert not any(row.lost for row in record.skipped)
