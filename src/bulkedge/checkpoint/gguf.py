"""The header of a GGUF file, read without its library and believed only after it adds up.

GGUF is llama.cpp's format: magic, version, counts, settings as typed pairs, then name, shape, type
and offset of each tensor, and from the next multiple of the alignment on their bytes.  Shapes are
stored with the innermost axis first.  The files are shared between strangers.  So every length is
compared with what is left of the file before it is used, and nothing is allocated by a number in
it.  No more of the header is read than of a safetensors header.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .header import (
    CAP_VARIABLE,
    MAX_NAME_LENGTH,
    MAX_NAME_PARTS,
    DamagedError,
    json_cap,
    naming,
    open_regular,
)

MAGIC, VERSIONS = b"GGUF", (2, 3)
ENDING = ".gguf"
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
"""The types of settings that have one size: how each is packed."""
STRING, ARRAY = 8, 9
MAX_DIMENSIONS, MAX_NESTING = 4, 2
MAX_TEXT, MAX_LIST = 2**16, 4096
"""Longer strings and lists of settings are passed over: vocabularies, which nothing here asks."""
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 2**20
MAX_SIZE = 2**48

TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
"""The types of tensors by their number: name, numbers in a block, and bytes of a block."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor of a GGUF file lies.

    Attributes:
        name: As the file has it.
        type: The name of its type, such as ``Q4_K``.
        shape: Its shape, the outermost axis first.
        start: The byte of its file where it begins.
        block: How many numbers, of one row, share a block.
        block_bytes: The bytes of a block.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    block: int
    block_bytes: int

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The settings and the tensors of a GGUF file.

    Args:
        path: The file.

    Returns:
        The settings without long strings and lists, and the tensors by name.

    Raises:
        CheckpointError: If it is not a regular file, or its header is damaged, hostile or larger
            than is read.
    """
    with naming(path):
        file, size = open_regular(path)
        with file:
            return _Reader(file, size).read()


class _Reader:
    """A header that is read from front to back."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0
        self.cap = min(size, json_cap())

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """The whole of it."""
        if self.take(4) != MAGIC:
            raise DamagedError(f"{self.size} bytes that do not begin with GGUF")
        version = self.number("<I")
        if version not in VERSIONS:
            raise DamagedError(f"GGUF version {version}, expected 2 or 3 in little endian")
        tensors, pairs = self.number("<Q"), self.number("<Q")
        settings: dict[str, Any] = {}
        for _ in range(self.count(pairs, 13)):
            key = self.text()
            if key is None or key in settings:
                raise DamagedError(f"the setting {key!r:.80} is there twice, or has a huge name")
            settings[key] = self.value(self.number("<I"))
        entries = [self.entry() for _ in range(self.count(tensors, 24))]
        alignment = settings.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
            raise DamagedError(f"general.alignment {alignment!r:.40}")
        data = -(-self.at // alignment) * alignment
        return settings, self.placed(entries, data)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.skip(count)
        content = self.file.read(count)
        if len(content) != count:
            raise DamagedError("the header ends too early")
        return content

    def skip(self, count: int) -> None:
        """Count some bytes as read; the caller reads them, or moves over them."""
        self.at += count
        if self.at > self.cap:
            raise DamagedError(
                "the header ends too early" if self.at > self.size else self.too_large
            )

    @property
    def too_large(self) -> str:
        """What is wrong with a header beyond the cap."""
        return f"the header exceeds {self.cap} bytes ({CAP_VARIABLE} raises that)"

    def count(self, claimed: int, each: int) -> int:
        """A number of things, of which each takes some bytes of what is left."""
        if claimed > (self.size - self.at) // each:
            raise DamagedError(f"{claimed} entries in {self.size - self.at} bytes")
        if claimed > (self.cap - self.at) // each:
            raise DamagedError(self.too_large)
        return claimed

    def number(self, form: str) -> Any:
        """A number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str | None:
        """A string; None of one that is too long to be asked for."""
        length = self.count(self.number("<Q"), 1)
        if length > MAX_TEXT:
            self.skip(length)
            self.file.seek(length, 1)
            return None
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            return None

    def value(self, kind: int, depth: int = 0) -> Any:
        """A setting; None of what is passed over."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > MAX_NESTING:
            raise DamagedError(f"a setting of type {kind}")
        inner, length = self.number("<I"), self.number("<Q")
        if inner in SCALARS:
            width = struct.calcsize(SCALARS[inner])
            content = self.take(self.count(length, width) * width)
            short = length <= MAX_LIST
            return [x for (x,) in struct.iter_unpack(SCALARS[inner], content)] if short else None
        for _ in range(self.count(length, 8)):
            self.value(inner, depth + 1)
        return None

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.text()
        if name is None or len(name) > MAX_NAME_LENGTH or name.count(".") >= MAX_NAME_PARTS:
            raise DamagedError(f"a tensor's name is no text or too long: {name!r:.80}")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise DamagedError(f"tensor {name!r}: {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))[::-1]
        return name, shape, self.number("<I"), self.number("<Q")

    def placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], data: int
    ) -> dict[str, GgufTensor]:
        """The tensors, once each is known to lie in the file and in no other."""
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in found:
                raise DamagedError(f"tensor {name!r} is there twice")
            found[name] = _tensor(name, shape, kind, data + offset)
        end = data
        for tensor in sorted(found.values(), key=lambda t: t.start):
            if tensor.start < end or tensor.start + tensor.nbytes > self.size:
                raise DamagedError(f"tensor {tensor.name!r} overlaps another, or leaves the file")
            end = tensor.start + tensor.nbytes
        return found


def _tensor(name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    """A tensor whose shape and type fit together."""
    if kind not in TYPES:
        raise DamagedError(f"tensor {name!r}: type number {kind}, which is unknown")
    spelled, block, size = TYPES[kind]
    if 0 in shape or math.prod(shape) >= MAX_SIZE or shape[-1] % block:
        raise DamagedError(f"tensor {name!r}: bad shape {shape!r:.60} of {spelled}")
    return GgufTensor(name, spelled, shape, start, block, size)
