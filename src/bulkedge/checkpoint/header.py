"""The safetensors header, read without torch and believed only after it adds up.

The safetensors format is eight bytes of header length, a JSON object,
and the tensors' bytes.  Checkpoints are shared between strangers, so everything is checked before
anything is used: sizes before reading, types, duplicate keys, and that the tensors tile the file.
A header that the safetensors library refuses is refused.  One that the library reads is read, but
not with duplicate keys, of which readers take different ones, and not beyond the limits below.
Parsed JSON takes up to some thirty times the memory of its text, so the text is capped: at 25 MB,
or as many as ``BULKEDGE_MAX_HEADER_MB`` says, up to the 100 MB that the safetensors library takes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bulkedge._errors import CheckpointError, InputError

MEGABYTE = 2**20
MAX_JSON_MEGABYTES, MAX_LIBRARY_MEGABYTES = 25, 100
CAP_VARIABLE = "BULKEDGE_MAX_HEADER_MB"
MAX_NAME_LENGTH, MAX_NAME_PARTS = 1024, 64
MAX_DIMENSIONS = 64
MAX_SIZE = 2**64
"""Sizes, offsets and a tensor's number of bits must be below this, as in the library."""

MAX_NESTING = 125
"""How deeply the further values of an entry may be nested, as in the library."""

FIELDS = ("dtype", "shape", "data_offsets")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits an element of each dtype, by its name in the header."""

FLOATING = ("BF16", "F16", "F32", "F64")
"""The dtypes of weights that can be read without scales."""

EMPTY = (
    "empty tensor: a damaged save, such as one by DeepSpeed's ZeRO-3 that did not gather the "
    "weights; save again with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py"
)
"""Why a stored tensor without elements, where there should be some, cannot be judged."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored, and what it is; the tensor itself stays on disk.

    Attributes:
        name: Its name in the file.
        dtype: Its dtype as the header spells it, such as ``BF16``.
        shape: Its shape.
        file: The file that holds it.
        start: The byte of its file where it begins.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def empty(self) -> bool:
        """Whether it has no elements."""
        return 0 in self.shape

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.size * BITS[self.dtype] // 8


class DamagedError(Exception):
    """What is wrong with a header; :func:`naming` adds where."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """CheckpointError that names the file, where its header cannot be read or is damaged.

    Args:
        path: The file.

    Raises:
        CheckpointError: In place of an OSError or a :class:`DamagedError`.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from None
    except DamagedError as error:
        raise CheckpointError(
            f"{path}: {error}; the file is damaged or hostile, fetch it again"
        ) from None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file.

    Args:
        path: The file.

    Returns:
        ``{name: info}`` in file order, and the ``__metadata__`` strings.

    Raises:
        CheckpointError: If it is not a regular file, or its header is damaged, hostile or larger
            than the cap.
    """
    with naming(path):
        text, data_size = _read_bytes(path)
        data = 8 + len(text)
        stored, metadata = _parse(text)
        entries = {name: _check_entry(name, entry) for name, entry in stored.items()}
        _check_tiling([span for _, _, span in entries.values()], data_size)
    infos = {
        name: TensorInfo(name, dtype, shape, path, data + span[0])
        for name, (dtype, shape, span) in entries.items()
    }
    return infos, metadata


def json_cap() -> int:
    """How many bytes of JSON are read from one file.

    Returns:
        25 MB, or what the environment allows.

    Raises:
        InputError: If the environment says no number of megabytes from 1 to 100.
    """
    text = os.environ.get(CAP_VARIABLE, str(MAX_JSON_MEGABYTES))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_LIBRARY_MEGABYTES):
        raise InputError(
            f"expected {CAP_VARIABLE} from 1 to {MAX_LIBRARY_MEGABYTES}, got {text!r:.40}; fix it"
        )
    return int(text) * MEGABYTE


def parse_json(text: bytes) -> Any:
    """JSON as UTF-8 without duplicate keys, of which readers would take different ones.

    Args:
        text: What a file holds.

    Returns:
        Its content; half of a character, which has no UTF-8 and could stand in no record, as its
        escape.

    Raises:
        ValueError: If it is anything else, or nested too deeply.
    """
    found = _load_json(text)
    if not SURROGATE.search(text):
        return found
    try:
        return _escaped(found)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _escaped(content: Any) -> Any:
    """The same with half characters as their escapes."""
    if isinstance(content, str):
        return content.encode(errors="backslashreplace").decode()
    if isinstance(content, list):
        return [_escaped(part) for part in content]
    if isinstance(content, dict):
        return {_escaped(name): _escaped(part) for name, part in content.items()}
    return content


def _load_json(text: bytes, **hooks: Any) -> Any:
    """The same, with other readers of numbers."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file, and nothing else: no pipe, no device, no terminal.

    Args:
        path: Where.

    Returns:
        The open file, and its size.

    Raises:
        OSError: If it cannot be opened, or is not a regular file.
    """
    # O_NONBLOCK, so that opening a FIFO reaches the check below instead of waiting for a writer;
    # O_NOCTTY, so that a terminal does not become that of this process
    quietly = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | quietly)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def read_regular(path: Path, cap: int) -> bytes:
    """What is in a small file.

    Args:
        path: Where.
        cap: How many bytes it may have.

    Returns:
        Its bytes.

    Raises:
        OSError: If it cannot be read, is not a regular file, or is larger.
    """
    file, size = open_regular(path)
    with file:
        # one more byte than the cap, to notice a file that grows meanwhile
        content = file.read(cap + 1) if size <= cap else b""
    if max(size, len(content)) > cap:
        raise OSError(errno.EFBIG, f"larger than {cap} bytes")
    return content


def _read_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON text, and how many bytes of tensors follow it."""
    file, size = open_regular(path)
    with file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise DamagedError("a Git LFS pointer, not the file itself (run `git lfs pull`)")
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= size - 8:
            raise DamagedError(f"{size} bytes, truncated or not safetensors")
        if length > (cap := json_cap()):
            raise DamagedError(
                f"header of {length} bytes exceeds {cap} ({CAP_VARIABLE} raises that)"
            )
        return file.read(length), size - 8 - length


def _parse(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensor entries and metadata from the JSON text."""
    if text.lstrip(b" \t\n\r")[:1] not in (b"{", b"["):
        raise DamagedError("header is not valid JSON (it must begin with {)")
    numbers = {"parse_int": _integer, "parse_float": _finite, "parse_constant": _no_constant}
    try:
        header = _load_json(text, **numbers)
    except ValueError as error:
        raise DamagedError(f"header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise DamagedError("header is not a JSON object")
    if SURROGATE.search(text):
        _check_strings(header)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedError("__metadata__ is not an object of strings")
    return header, metadata


def _integer(text: str) -> int | float:
    """An integer as the library reads it: minus zero and more than 64 bits are not integers."""
    return int(text) if text != "-0" and len(text) <= 20 else _finite(text)


def _finite(text: str) -> float:
    """A number with a fraction, which double precision can hold."""
    if math.isinf(value := float(text)):
        raise ValueError(f"number out of range: {text:.20}")
    return value


def _no_constant(text: str) -> float:
    """Python reads NaN and Infinity, JSON does not have them."""
    raise ValueError(f"{text} is not a JSON number")


def _check_strings(header: Any) -> None:
    """Raise for a string that holds half of a character, which has no UTF-8."""
    for box in _levels(header):
        for string in (s for part in box for s in _parts(part) if isinstance(s, str)):
            if any("\ud800" <= c <= "\udfff" for c in string):
                raise DamagedError(f"a name or another string is no text: {string[:60]!r}")


def _levels(value: Any) -> Iterator[list[Any]]:
    """The lists and objects in a value, one level of nesting after the other."""
    level = [value]
    while boxes := [part for part in level if isinstance(part, dict | list)]:
        yield boxes
        level = [part for box in boxes for part in (box.values() if isinstance(box, dict) else box)]


def _parts(box: dict[str, Any] | list[Any]) -> Iterator[Any]:
    """What a list holds; the keys and values of an object."""
    yield from box
    if isinstance(box, dict):
        yield from box.values()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing what ``dict`` would silently overwrite."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:100]!r}")
        result[key] = value
    return result


def _check_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and byte span of one tensor, once its description holds together."""
    if len(name) > MAX_NAME_LENGTH:
        raise DamagedError(f"a tensor's name has {len(name)} characters: {name[:60]!r}…")
    if name.count(".") >= MAX_NAME_PARTS:
        raise DamagedError(f"a tensor's name has over {MAX_NAME_PARTS} parts: {name[:60]!r}…")
    dtype, shape, span = _fields(name, entry)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise DamagedError(f"tensor {name!r}: unknown dtype {dtype!r:.60}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise DamagedError(f"tensor {name!r}: bad shape {shape!r:.60}")
    if not _are_counts(span) or len(span) != 2:
        raise DamagedError(f"tensor {name!r}: bad data_offsets {span!r:.60}")
    if 8 * (span[1] - span[0]) != _product(name, shape) * BITS[dtype]:
        raise DamagedError(f"tensor {name!r}: {dtype} {shape} does not fill bytes {span}")
    return dtype, tuple(shape), (span[0], span[1])


def _fields(name: str, entry: Any) -> list[Any]:
    """What an entry says of its fields, in either form that the library reads."""
    if isinstance(entry, list) and len(entry) == len(FIELDS):
        found = entry
    elif isinstance(entry, dict) and all(field in entry for field in FIELDS):
        found = [entry[field] for field in FIELDS]
        others = [value for key, value in entry.items() if key not in FIELDS]
        if sum(1 for _ in _levels(others)) > 1 + MAX_NESTING:
            raise DamagedError(f"tensor {name!r}: nested too deeply")
    else:
        raise DamagedError(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype = found[0]
    if isinstance(dtype, dict) and list(dtype.values()) == [None]:
        dtype = next(iter(dtype))
    return [dtype, *found[1:]]


def _product(name: str, shape: list[int]) -> int:
    """The number of elements; no partial product may exceed the library's integers."""
    product = 1
    for size in shape:
        product *= size
        if product >= MAX_SIZE:
            raise DamagedError(f"tensor {name!r}: bad shape {shape!r:.60}")
    return product


def _are_counts(value: Any) -> bool:
    """Whether ``value`` is a list of non-negative integers (JSON's true is not one)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < MAX_SIZE for v in value)


def _check_tiling(spans: list[tuple[int, int]], data_size: int) -> None:
    """The tensors must cover the rest of the file, without overlap or hole."""
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise DamagedError(f"tensors overlap or leave a hole at byte {min(start, end)}")
        end = stop
    if end != data_size:
        raise DamagedError(f"header describes {end} bytes of tensors, the file has {data_size}")
