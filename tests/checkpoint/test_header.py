"""Headers that do not add up are refused by name, whoever wrote them."""

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bulkedge import CheckpointError, InputError
from bulkedge.checkpoint import read_header
from bulkedge.checkpoint.header import BITS
from helpers import raw_safetensors, save, weights

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"\0" * 8


def entry(**changes):
    return {"w": GOOD | changes}


HOSTILE = {
    "not_json": (b"{]", b"", "not valid JSON"),
    "not_utf8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "deep": (b'{"a":' * 100_000, b"", "not valid JSON"),
    "utf16": ('{"a":1}'.encode("utf-16"), b"", "must begin with {"),
    "byte_order_mark": (b"\xef\xbb\xbf{}", b"", "must begin with {"),
    "huge_number": (b'{"w": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "not_a_number": (b'{"w": NaN}', b"", "NaN is not a JSON number"),
    "list": ([], b"", "not a JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "entry": ({"w": 3}, EIGHT, "expected dtype, shape and data_offsets"),
    "dtype": (entry(dtype="F31"), EIGHT, "unknown dtype 'F31'"),
    "dtype_list": (entry(dtype=["F32"]), EIGHT, "unknown dtype"),
    "negative": (entry(shape=[-2]), EIGHT, r"tensor 'w': bad shape \[-2\]"),
    "negative_offset": (entry(data_offsets=[-8, 0]), EIGHT, "bad data_offsets"),
    "more_than_64_bits": (
        entry(shape=[2**64, 0]),
        b"",
        r"tensor 'w': bad shape \[18446744073709551616, 0\]",
    ),
    "float_shape": (entry(shape=[2.0]), EIGHT, r"tensor 'w': bad shape \[2\.0\]"),
    "bool_shape": (entry(shape=[True, 2]), EIGHT, r"tensor 'w': bad shape \[True, 2\]"),
    "many_dims": (entry(shape=[1] * 64 + [2]), EIGHT, "tensor 'w': bad shape"),
    "huge": (entry(shape=[2**62, 4]), EIGHT, "tensor 'w': bad shape"),
    "offsets": (entry(data_offsets=[8, 0]), EIGHT, "does not fill"),
    "three_offsets": (entry(data_offsets=[0, 8, 8]), EIGHT, "bad data_offsets"),
    "hole": (entry(data_offsets=[8, 16]), EIGHT * 2, "hole at byte 0"),
    "overlap": ({"a": GOOD, "b": GOOD}, EIGHT, "tensors overlap or leave a hole"),
    "part_overlap": (
        {"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}},
        EIGHT + b"\0" * 4,
        "tensors overlap .* byte 4",
    ),
    "empty_inside": (
        {"a": GOOD, "b": {"dtype": "U8", "shape": [0], "data_offsets": [5, 5]}},
        EIGHT,
        "tensors overlap or leave a hole",
    ),
    "trailing": (entry(), EIGHT * 2, "describes 8 bytes of tensors, the file has 16"),
    "truncated": (entry(), b"\0" * 4, "describes 8 bytes of tensors, the file has 4"),
    "long_name": ({"n" * 1025: GOOD}, EIGHT, "1025 characters"),
    "many_parts": ({".".join("a" * 65): GOOD}, EIGHT, "a tensor's name has over 64 parts"),
    "surrogate": (b'{"\\ud800": %s}' % json.dumps(GOOD).encode(), EIGHT, "is no text"),
    "half_byte": (
        {"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}},
        b"\0",
        "tensor 'w': F4 .* does not fill",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(case, tmp_path):
    header, data, message = HOSTILE[case]
    path = raw_safetensors(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_duplicate_fields(tmp_path):
    text = b'{"w": {"dtype": "U8", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    with pytest.raises(CheckpointError, match="duplicate key 'dtype'"):
        read_header(raw_safetensors(tmp_path / "x.safetensors", text, EIGHT))


def test_duplicate_keys_which_the_library_takes_silently(tmp_path):
    text = f'{{"w": {json.dumps(GOOD)}, "w": {json.dumps(GOOD)}}}'.encode()
    with pytest.raises(CheckpointError, match="duplicate key 'w'"):
        read_header(raw_safetensors(tmp_path / "x.safetensors", text, EIGHT))


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 2**60) + b"{}"])
def test_short_files(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        read_header(path)


def test_header_length_is_capped_before_reading(tmp_path, monkeypatch):
    """A file of 25 MB of zeros behind the length: refused for its size, so not parsed."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 25 * 2**20 + 1))
    os.truncate(path, 26 * 2**20 + 8)
    with pytest.raises(CheckpointError, match=r"exceeds 26214400 \(BULKEDGE_MAX_HEADER_MB raises"):
        read_header(path)
    monkeypatch.setenv("BULKEDGE_MAX_HEADER_MB", "26")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(path)


@pytest.mark.parametrize("value", ["", "0", "101", "-1", "2.5", "x", "9" * 5000, "²"])
def test_the_cap_is_a_number_of_megabytes(value, tmp_path, monkeypatch):
    monkeypatch.setenv("BULKEDGE_MAX_HEADER_MB", value)
    path = save(tmp_path / "x.safetensors", {"w": weights(2, 2)})
    with pytest.raises(InputError, match=r"expected BULKEDGE_MAX_HEADER_MB from 1 to 100, got '"):
        read_header(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"cannot be read \(not a regular file\); check the path"
    ):
        read_header(tmp_path / "x.safetensors")


def test_names_and_shapes_come_back_as_the_library_wrote_them(tmp_path):
    tensors = {
        "a.weight": torch.zeros(3, 4, dtype=torch.bfloat16),
        "b": torch.zeros(2, 0, 5),
        "c": torch.tensor(1.0, dtype=torch.float64),
        "d": torch.zeros(7, dtype=torch.uint8),
        "e": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert {name: info.shape for name, info in infos.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert all(info.nbytes == tensors[name].nbytes for name, info in infos.items())
    assert {info.dtype for info in infos.values()} <= set(BITS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_a_damaged_byte_is_a_clean_error_or_harmless(data, tmp_path):
    good = save(tmp_path / "good.safetensors", {"w": weights(2, 2), "b": weights(3)}).read_bytes()
    position = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255))
    path = tmp_path / "bad.safetensors"
    path.write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
    try:
        infos, _ = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in infos.values()) == 28
