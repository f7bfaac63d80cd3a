"""A base is doubted where it is named as another model than the one that the adapter names."""

import json

import pytest

import bulkedge
from bulkedge.checkpoint.identity import own_name
from bulkedge.report import render
from bulkedge.report.base_name import compare_names
from bulkedge.report.doubts import doubts
from commands import run
from helpers import save, save_adapter, weights

CLEAN, FOUND = 0, 1
BASE = {"layers.0.q.weight": weights(12, 10)}
FACTORS = {f"base_model.model.layers.0.q.lora_{x}.weight": 0.01 * W
           for x, W in {"A": weights(2, 10), "B": weights(12, 2)}.items()}  # fmt: skip
ID, CACHED = "org/Mini_LM-v2", "models--org--Mini_LM-v2/snapshots/0123456789abcdef"
CARD = "---\nbase_model: x/other\nname: 3\n---\n\n# {}\n\nIt is like other-7b.\n"


def folder(place, config=None, card=None):
    save(place / "model.safetensors", BASE)
    if config is not None:
        (place / "config.json").write_text(json.dumps(config))
    if card is not None:
        (place / "README.md").write_text(CARD.format(card))
    return place


def adapter(tmp_path, named=ID):
    return save_adapter(tmp_path / "adapter", FACTORS, base_model_name_or_path=named)


# the folder of the base, what the adapter names, config.json, the title of the card, what follows
NAMES = {
    "ci.md": ("base", ID, None, None, "unknown"),
    "a model": ("model", ID, None, None, "unknown"),
    "a commit": ("0123456789abcdef0123", ID, None, None, "unknown"),
    "a checkpoint": ("run/checkpoint-500", ID, None, None, "unknown"),
    "the name": ("mini-lm-v2", ID, None, None, "same"),
    "with more": ("gt_mini_lm_v2/model", ID, None, None, "same"),
    "the cache": (CACHED, ID, None, None, "same"),
    "a path into the cache": ("mini-lm-v2", f"/root/hub/{CACHED}", None, None, "same"),
    "another": ("llama-7b", ID, None, None, "other"),
    "another of the cache": ("models--org--Mini_LM-v2-chat/snapshots/0123456789ab", ID, None,
                             None, "other"),
    "its configuration": ("acme", ID, {"_name_or_path": ID}, None, "same"),
    "a path in it": ("acme", ID, {"_name_or_path": "/models/Mini_LM-v2/"}, None, "same"),
    "its parent": ("base", ID, {"_name_or_path": "x/parent-3b"}, None, "unknown"),
    "another, and a parent": ("acme", ID, {"_name_or_path": "x/parent-3b"}, None, "other"),
    "its card": ("acme", ID, None, "Mini-LM v2: Mini_LM-v2", "same"),
    "the card of another": ("acme", ID, None, "other-7b", "other"),
    "no word in it": ("acme", ID, {"_name_or_path": 3}, "", "other"),
    "a path that says nothing": ("llama-7b", "/home/me/base", None, None, "unknown"),
    "the same path": ("work/base", "work/base/", None, None, "same"),
    "no name": ("llama-7b", None, None, None, None),
}  # fmt: skip


@pytest.mark.parametrize(("place", "named", "config", "card", "found"), NAMES.values(), ids=NAMES)
def test_names_are_compared(place, named, config, card, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / place, config, card)
    record = bulkedge.audit(place, adapter(tmp_path, named), recipe={"top_k": 2})
    assert compare_names(record) == found
    assert ("adapter" in doubts(record)) is (found == "other")
    page = render(record, "html")
    assert ("the base given has another name" in page) is (found == "other")
    assert ("the base given has no name to compare" in page) is (found == "unknown")
    ended = run("audit", place, tmp_path / "adapter", "--fail-on", "never", "--fail-on-doubt")
    assert ended.returncode == (FOUND if found == "other" else CLEAN)
    note = f"base: the adapter names {named}; the shapes fit, and {place} has no name"
    assert (note in ended.stdout) is (found == "unknown")


def test_the_message_has_both_names_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "llama-7b")
    command = ["audit", "llama-7b", adapter(tmp_path), "-q", "--fail-on", "never"]
    told = f"doubt: The adapter names {ID} as its base, you gave llama-7b: are they the same model?"
    ended = run(*command)
    assert told in ended.stdout
    for remedy in ("give the folder that name", "`_name_or_path`", "the base that it was trained"):
        assert remedy in ended.stdout
    (tmp_path / "llama-7b/config.json").write_text(json.dumps({"_name_or_path": ID}))
    assert run(*command, "--fail-on-doubt").returncode == CLEAN  # as the message says
    (tmp_path / "llama-7b").rename(tmp_path / "Mini_LM-v2")
    (tmp_path / "Mini_LM-v2/config.json").unlink()
    command[1] = "Mini_LM-v2"
    assert run(*command, "--fail-on-doubt").returncode == CLEAN


def test_a_link_into_the_cache_has_its_id(tmp_path):
    (tmp_path / "acme").symlink_to(folder(tmp_path / CACHED))
    record = bulkedge.audit(tmp_path / "acme", adapter(tmp_path), recipe={"top_k": 2})
    assert record.inputs.base.known_as == [ID]
    assert compare_names(record) == "same"


def test_a_card_that_leads_elsewhere_or_is_no_file_is_not_read(tmp_path):
    place = folder(tmp_path / "acme")
    (tmp_path / "secret").write_text("# Mini_LM-v2\n")
    (place / "README.md").symlink_to(tmp_path / "secret")
    record = bulkedge.audit(place, adapter(tmp_path), recipe={"top_k": 2})
    assert (record.inputs.base.known_as, compare_names(record)) == ([], "other")
    (place / "README.md").unlink()
    (place / "README.md").mkdir()
    assert bulkedge.audit(place, adapter(tmp_path)).inputs.base.known_as == []
    (place / "README.md").rmdir()
    (place / "README.md").write_bytes(b"\xff\xfe# \x1b[31mred\n# Mini_LM-v2")
    assert bulkedge.audit(place, adapter(tmp_path)).inputs.base.known_as == ["Mini_LM-v2"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/bert-base", "bert-base"), ("bert/model.safetensors", "bert"), ("base", None),
        ("bert-base.safetensors", "bert-base"), ("base.safetensors", None), (".", None),
        ("bert/model-00001-of-00002.safetensors", "bert"), ("..", None), ("my_base_model", None),
        ("bert/model.safetensors.index.json", "bert"), ("C:\\models\\gpt2\\", "gpt2"),
        ("qwen.gguf", "qwen"), ("pretrained-model", None), ("base/" * 2000, None),
        ("1" * 3000 + "x", "1" * 3000 + "x"), ("models--a--b-c/blobs", "b-c"),
    ],
)  # fmt: skip
def test_what_a_path_calls_a_model(path, name):
    assert own_name(path) == name
