"""What lies at a path is read by the first format that claims it."""

import pytest

from bulkedge import AdapterError, CheckpointError
from bulkedge.checkpoint import Adapter, AdapterFormat, formats, open_adapter, open_base, open_path
from helpers import save, save_adapter, weights

PAIR = {"q.lora_A.weight": weights(2, 6), "q.lora_B.weight": weights(6, 2)}


def claim(monkeypatch, claims):
    """A format before all others, of adapters without updates."""
    own = AdapterFormat(claims, lambda place: place.adapter(method="Own", factors={}))
    monkeypatch.setattr(formats, "FORMATS", (own, *formats.FORMATS))


def test_a_full_model_is_no_adapter(tmp_path):
    path = save(tmp_path / "m.safetensors", {"q.weight": weights(3, 2)})
    with pytest.raises(AdapterError, match=r"m\.safetensors: a full model, expected an adapter"):
        open_adapter(path)


def test_a_format_is_asked_before_those_that_claim_the_rest(tmp_path, monkeypatch):
    folder = save_adapter(tmp_path / "a", PAIR, peft_type="OWN")
    with pytest.raises(AdapterError, match="a 'OWN' adapter; it is not handled"):
        open_path(folder)
    claim(monkeypatch, lambda place: place.settings.get("peft_type") == "OWN")
    for path in (folder, folder / "adapter_model.safetensors"):
        found = open_path(path)
        assert isinstance(found, Adapter)
        assert (found.kind, found.path) == ("own", folder)
        assert [file.name for file in found.files] == [
            "adapter_model.safetensors", "adapter_config.json"
        ]  # fmt: skip
        assert open_base(path) is None


def test_a_format_may_ask_for_names_of_any_place(tmp_path, monkeypatch):
    claim(monkeypatch, lambda place: any(name.endswith(".own") for name in place.tensors))
    file = save(tmp_path / "f.safetensors", {"q.own": weights(3, 2)})
    assert open_adapter(file).files == (file,)
    assert open_adapter(save_adapter(tmp_path / "a", PAIR)).kind == "lora"
    assert open_base(save(tmp_path / "m.safetensors", {"q.weight": weights(3, 2)})) is not None


@pytest.mark.parametrize("damage", ["config", "weights", "no_weights"])
def test_a_damaged_adapter_is_left_to_the_format_that_says_so(damage, tmp_path, monkeypatch):
    claim(monkeypatch, lambda place: bool(place.settings.get("own") or not place.tensors))
    folder = save_adapter(tmp_path / "a", PAIR)
    file = folder / "adapter_model.safetensors"
    match damage:
        case "config":
            (folder / "adapter_config.json").write_text("{")
        case "weights":
            file.write_bytes(b"\0" * 4)
        case _:
            file.unlink()
    assert open_base(folder) is None
    with pytest.raises(CheckpointError, match=r"not valid JSON|adapter_model\.safetensors: "):
        open_path(folder)


def test_a_place_without_anything_is_an_error_of_the_path(tmp_path, monkeypatch):
    claim(monkeypatch, lambda place: not place.tensors)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_path(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="got an empty one"):
        open_path("")
