import json
import os

import pytest
import safetensors
import torch

from bulkedge import CheckpointError
from bulkedge.checkpoint import is_adapter, open_checkpoint, read_tensor
from helpers import raw_safetensors, save, some, weights

TENSORS = {"a.weight": weights(4, 3), "b.weight": weights(5, 2, seed=1)}


def sharded(folder, weight_map=None, tensors=TENSORS):
    for i, (name, tensor) in enumerate(tensors.items()):
        save(folder / f"model-{i}.safetensors", {name: tensor})
    if weight_map is None:
        weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_file_folder_and_shards_hold_the_same(tmp_path):
    save(tmp_path / "one/model.safetensors", TENSORS)
    sharded(tmp_path / "many")
    opened = {
        "file": open_checkpoint(tmp_path / "one/model.safetensors"),
        "folder": open_checkpoint(str(tmp_path / "one")),
        "sharded": open_checkpoint(tmp_path / "many"),
    }
    named = open_checkpoint(tmp_path / "many/model.safetensors.index.json")
    for kind, checkpoint in [*opened.items(), ("sharded", named)]:
        assert checkpoint.kind == kind
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, info in some(checkpoint.tensors.items()):
            assert torch.equal(read_tensor(info), TENSORS[name])


def test_a_folder_with_one_file_of_another_name(tmp_path):
    save(tmp_path / "diffusion_pytorch_model.safetensors", TENSORS)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.config == {"model_type": "gpt2"}


def test_tensors_are_private_copies(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", TENSORS))
    read_tensor(checkpoint.tensors["a.weight"]).zero_()
    assert torch.equal(read_tensor(checkpoint.tensors["a.weight"]), TENSORS["a.weight"])


def test_truncation_after_opening_is_an_error_not_a_signal(tmp_path):
    path = save(tmp_path / "x.safetensors", TENSORS)
    info = open_checkpoint(path).tensors["b.weight"]
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'b\.weight' cannot be read"):
        read_tensor(info)


def test_a_file_swapped_after_opening_is_an_error(tmp_path):
    path = save(tmp_path / "x.safetensors", TENSORS)
    info = open_checkpoint(path).tensors["b.weight"]
    save(path, {"b.weight": weights(2, 2)})
    with pytest.raises(CheckpointError, match=r"was \(5, 2\), is now \(2, 2\)"):
        read_tensor(info)


def test_a_header_is_read_once_for_all_tensors_of_a_file(tmp_path, monkeypatch):
    opened, safe_open = [], safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda file, **how: opened.append(file) or safe_open(file, **how)
    )
    path = save(tmp_path / "x.safetensors", TENSORS)
    for _ in range(2):
        for name, info in some(open_checkpoint(path).tensors.items()):
            assert torch.equal(read_tensor(info), TENSORS[name])
    assert opened == [path]


def test_a_file_changed_between_two_reads_is_opened_anew(tmp_path):
    path = save(tmp_path / "x.safetensors", TENSORS)
    before = open_checkpoint(path).tensors["b.weight"]
    read_tensor(before)
    longer = {"a": weights(7, 3), "b.weight": weights(5, 2, seed=9)}
    save(path, longer)
    assert torch.equal(read_tensor(before), longer["b.weight"])
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'b\.weight' cannot be read"):
        read_tensor(before)


PATHS = {
    "missing": (lambda d: d / "nowhere", "no such file or folder"),
    "empty_folder": (lambda d: d, r"no \.safetensors file"),
    "text": (lambda d: touch(d / "notes.txt"), r"expected a \.safetensors file"),
    "pickle": (lambda d: touch(d / "pytorch_model.bin"), "is a pickle, which can run code"),
    "pickle_folder": (lambda d: touch(d / "model.pt").parent, "found only 'model.pt': it is a pi"),
    "two_files": (
        lambda d: [save(d / f"{i}.safetensors", TENSORS) for i in "ab"].pop().parent,
        r"several checkpoints, and nothing says which to read \(a.safetensors, b.safetensors\)",
    ),
    "adapters": (
        lambda d: touch(d / "default/adapter_config.json").parents[1],
        "in this folder itself, but below it: name one of 'default'",
    ),
    "cache": (
        lambda d: save(d / "snapshots/abc/model.safetensors", TENSORS).parents[2],
        "below it: name one of 'snapshots/abc'",
    ),
    "both": (
        lambda d: save(sharded(d / "m") / "model.safetensors", TENSORS).parent,
        "several checkpoints, and nothing says which to read",
    ),
    "unset": (lambda d: "", "expected a path, got an empty one"),
    "lfs": (lambda d: text(d / "x.safetensors", "version https://git-lfs"), "git lfs pull"),
}


def text(path, content):
    path.write_text(content)
    return path


def touch(path):
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("case", PATHS)
def test_paths_that_hold_no_checkpoint(case, tmp_path):
    make, message = PATHS[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make(tmp_path))


INDEXES = {
    "absolute": ({"a.weight": "/etc/passwd.safetensors"}, "must be a .safetensors file beside"),
    "parent": ({"a.weight": "../model-0.safetensors"}, "must be a .safetensors file beside"),
    "windows": ({"a.weight": "C:\\model.safetensors"}, "must be a .safetensors file beside"),
    "nul": ({"a.weight": "a\0.safetensors"}, "must be a .safetensors file beside"),
    "long": ({"a.weight": "x" * 5000 + ".safetensors"}, "must be a .safetensors file beside"),
    "dots": ({"a.weight": ".."}, "must be a .safetensors file beside"),
    "newline": ({"a.weight": "a\n.safetensors"}, "must be a .safetensors file beside"),
    "surrogate": ({"a.weight": "\ud800.safetensors"}, "must be a .safetensors file beside"),
    "number": ({"a.weight": 3}, "must be a .safetensors file beside"),
    "pickle": ({"a.weight": "model.bin"}, "must be a .safetensors file beside"),
    "missing_shard": ({"a.weight": "model-9.safetensors"}, "1 of 1 shards missing, first 'model-9"),
    "unlisted": ({"a.weight": "model-1.safetensors"}, "mixes two checkpoints"),
    "absent": (
        {n: f"model-{i}.safetensors" for i, n in enumerate(TENSORS)} | {"c": "model-0.safetensors"},
        "tensor 'c' is not in 'model-0",
    ),
    "empty": ({}, "non-empty weight_map"),
    "list": ([1], "non-empty weight_map"),
}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (r'{"_name_or_path": "a\ud800"}', {"_name_or_path": r"a\ud800"}),
        (r'{"a": [{"\udfff": 1}]}', {"a": [{r"\udfff": 1}]}),
        (r'{"_name_or_path": "\ud83d\ude00"}', {"_name_or_path": "😀"}),  # a whole one
    ],
)
def test_half_of_a_character_in_a_configuration_is_its_escape(content, expected, tmp_path):
    """It has no UTF-8, so that no record could hold it."""
    folder = save(tmp_path / "m/model.safetensors", {"a.weight": torch.ones(2, 2)}).parent
    (folder / "config.json").write_text(content)
    assert open_checkpoint(folder).config == expected


def test_a_message_does_not_repeat_megabytes(tmp_path):
    folder = sharded(tmp_path / "m", {"n" * 10**6: "s" * 10**6})
    with pytest.raises(CheckpointError, match=r"must be a \.safetensors file") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 1000


def test_an_index_that_says_a_thing_twice(tmp_path):
    folder = sharded(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="duplicate key 'a'"):
        open_checkpoint(folder)


def test_what_torch_cannot_hold_is_an_error_of_ours(tmp_path):
    path = tmp_path / "x.safetensors"
    header = {"w": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}
    info = open_checkpoint(raw_safetensors(path, header, b"\0" * 8)).tensors["w"]
    with pytest.raises(CheckpointError, match=r"is F4 \(16,\) too much for torch"):
        read_tensor(info)


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_index(case, tmp_path):
    weight_map, message = INDEXES[case]
    folder = sharded(tmp_path / "m", weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "not valid JSON .duplicate key 'a'"),
        ('{"a": {"b": 1, "b": 1}}', "not valid JSON .duplicate key 'b'"),
        ('{"a": ' * 100_000, "not valid JSON .nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
    ids=["list", "cut", "duplicate", "duplicate_below", "deep", "long_number"],
)
def test_config_that_is_not_an_object(text, message, tmp_path):
    save(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        open_checkpoint(tmp_path)


def test_config_of_absurd_size(tmp_path, monkeypatch):
    save(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "config.json").write_text('{"a": "' + "x" * 2**20 + '"}')
    assert len(open_checkpoint(tmp_path).config["a"]) == 2**20
    monkeypatch.setenv("BULKEDGE_MAX_HEADER_MB", "1")
    with pytest.raises(
        CheckpointError, match=r"than 1048576 bytes\); is it a config. .BULKEDGE_MAX_HEADER"
    ):
        open_checkpoint(tmp_path)


LINKED = {
    "weights": ("model.safetensors", {}),
    "config": ("config.json", {"model.safetensors": TENSORS}),
    "index": ("model.safetensors.index.json", {"model-0.safetensors": TENSORS}),
    "shard": ("model-0.safetensors", {}),
}


@pytest.mark.parametrize("case", LINKED)
def test_links_that_leave_the_folder_are_refused(case, tmp_path):
    name, others = LINKED[case]
    outside, folder = tmp_path / "outside", tmp_path / "model"
    folder.mkdir()
    for other, tensors in others.items():
        save(folder / other, tensors)
    index = json.dumps({"weight_map": dict.fromkeys(TENSORS, "model-0.safetensors")})
    if name.endswith(".json"):
        outside.write_text(index if "index" in name else "{}")
    else:
        save(outside, TENSORS)
    if case == "shard":
        (folder / "model.safetensors.index.json").write_text(index)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{name}: is a link that leaves"):
        open_checkpoint(folder)


def cached(tmp_path, sub="", store="blobs"):
    """A file of a hub cache, linked from a snapshot as the hub's client does."""
    repository = tmp_path / "models--org--name"
    blob = save(repository / store / "0123", TENSORS)
    folder = repository / "snapshots/abc" / sub
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(os.path.relpath(blob, folder))
    return folder


@pytest.mark.parametrize("sub", ["", "unet"])
def test_the_hub_cache_layout_is_read(sub, tmp_path):
    assert set(open_checkpoint(cached(tmp_path, sub)).tensors) == set(TENSORS)


def test_links_to_elsewhere_in_the_hub_cache_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a link that leaves"):
        open_checkpoint(cached(tmp_path, store="elsewhere"))


def test_a_store_that_is_itself_a_link_is_no_store(tmp_path):
    folder = cached(tmp_path)
    store = tmp_path / "models--org--name/blobs"
    store.rename(tmp_path / "outside")
    store.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link that leaves"):
        open_checkpoint(folder)


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is a broken link"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_an_index_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"], ids=["long", "nul"])
def test_impossible_paths(path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(path)
    assert not is_adapter(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
def test_a_shard_that_is_no_file_is_not_called_missing(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    os.mkfifo(tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: cannot be read .not a regul"):
        open_checkpoint(tmp_path)


def test_a_link_to_nowhere_beside_shards_is_not_passed_over(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(
        CheckpointError, match="several checkpoints, and nothing says which to read"
    ):
        open_checkpoint(tmp_path)


def test_other_weights_of_a_folder_are_told(tmp_path):
    save(tmp_path / "model.safetensors", TENSORS)
    assert open_checkpoint(tmp_path).beside == ()
    save(tmp_path / "other.safetensors", TENSORS)
    assert open_checkpoint(tmp_path).beside == ("other.safetensors",)


def test_an_index_is_beside_shards_only_if_it_is_another(tmp_path):
    sharded(tmp_path)
    assert open_checkpoint(tmp_path).beside == ()
    save(tmp_path / "other.safetensors", TENSORS)
    assert open_checkpoint(tmp_path).beside == ("other.safetensors",)
    assert open_checkpoint(tmp_path / "model.safetensors.index.json").beside == ()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("kind", ["fifo", "dangling"])
def test_a_config_that_is_no_file_is_not_taken_for_none(tmp_path, kind):
    save(tmp_path / "model.safetensors", TENSORS)
    config = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(config)
    else:
        config.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        open_checkpoint(tmp_path)
