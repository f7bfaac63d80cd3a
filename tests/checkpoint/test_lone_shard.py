"""A shard without the others is a part of a model, and no command takes it for the whole."""

import json

import pytest

import bulkedge
from bulkedge import CheckpointError
from bulkedge.checkpoint import open_checkpoint
from bulkedge.checkpoint.shard import shard_of
from commands import run
from helpers import save, some, weights

NAME = "model-00001-of-00002.safetensors"
W0, W = weights(40, 30), weights(40, 30) + 1e-4 * weights(40, 30, seed=1)
COMMANDS = {
    "audit": ["audit", "{base}", "{tuned}"],
    "budget": ["budget", "{base}", "-k", "3"],
    "inspect": ["inspect", "{base}"],
    "repair": ["repair", "{base}", "{tuned}", "--dry-run"],
}


@pytest.fixture
def shards(tmp_path):
    """The first of two shards of a base and of its fine-tune."""
    return {
        "base": save(tmp_path / "base" / NAME, {"a.weight": W0}),
        "tuned": save(tmp_path / "tuned" / NAME, {"a.weight": W}),
    }


def call(command, **places):
    return run(*(places.get(word[1:-1], word) for word in COMMANDS[command]))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (NAME, (1, 2)),
        ("pytorch_model-00012-of-00163.safetensors", (12, 163)),
        ("model-00001-of-00001.safetensors", None),
        ("model.safetensors", None),
        ("a-00001-of-00002.safetensors.safetensors", None),
        ("model-1-of-2.safetensors", None),
    ],
)
def test_the_part_by_the_name(name, part):
    assert shard_of(name) == part


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_one_shard_is_refused(command, shards):
    folders = {name: file.parent for name, file in shards.items()}
    result = call(command, **folders)
    assert result.returncode == 2
    assert "1 shard of 2, without the index; download model.safetensors.index.json" in result.stderr
    whole = {n: file.rename(file.with_name("model.safetensors")) for n, file in shards.items()}
    assert call(command, **{n: file.parent for n, file in whole.items()}).returncode == 0


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_either_side_is_refused(side, shards, tmp_path):
    whole = save(tmp_path / "whole.safetensors", {"a.weight": W0})
    pair = {"base": whole, "tuned": whole} | {side: shards[side].parent}
    with pytest.raises(CheckpointError, match="1 shard of 2, without the index"):
        bulkedge.audit(pair["base"], pair["tuned"])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("quiet", [True, False])
def test_a_shard_given_by_itself_is_a_part(command, quiet, shards):
    quietly = ["-q"] if quiet and command != "inspect" else []
    result = run(*(shards.get(word[1:-1], word) for word in COMMANDS[command]), *quietly)
    assert result.returncode == 0
    told = {
        "audit": "doubt: The base is file 1 of 2 and the fine-tune is file 1 of 2 of a model: ",
        "budget": "PART: the base is file 1 of 2 of a model",
        "inspect": "full model: 1 tensor in file 1 of 2, which is a part of the model",
        "repair": "doubt: The base is file 1 of 2 and the fine-tune is file 1 of 2 of a model: ",
    }
    assert told[command] in " ".join(result.stdout.split())


def test_a_part_can_fail_a_build(shards):
    result = run("audit", *shards.values(), "--fail-on-doubt")
    assert result.returncode == 1
    assert "file 1 of 2" in result.stderr


def test_shards_with_their_index_are_whole(shards):
    for file in some(shards.values()):
        save(file.with_name(NAME.replace("00001-", "00002-")), {"b.weight": weights(5, 4)})
        names = {"a.weight": NAME, "b.weight": NAME.replace("00001-", "00002-")}
        index = file.with_name("model.safetensors.index.json")
        index.write_text(json.dumps({"weight_map": names}))
        assert len(open_checkpoint(file.parent).tensors) == 2
    record = bulkedge.audit(*(file.parent for file in shards.values()))
    assert record.inputs.base.part is None
    assert "doubt" not in call("audit", **{n: f.parent for n, f in shards.items()}).stdout
