"""Weights of a GGUF file: llama.cpp's blocks, or plain numbers, with rows in its order.

What a block holds is for the library ``gguf`` to say; a strip of rows goes through it at a time.
llama.cpp rotates neighbouring pairs of a head where transformers rotates its halves, so its
converter writes the rows of q and k of some architectures in another order: row ``2i + j`` of a
head is row ``i + j·(size of the head)/2`` of the model.  They are read back in the model's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkedge._errors import CheckpointError
from bulkedge.checkpoint.elements import read_bytes, torch_dtypes
from bulkedge.checkpoint.gguf import GgufTensor
from bulkedge.checkpoint.header import FLOATING, TensorInfo

from .base import Candidate, Codec, Rows, Shape, strips

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

UNSUPPORTED = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64")
"""Types that hold no weights, or that the library does not read."""


@dataclass(frozen=True)
class GgufWeight(Codec):
    """A tensor of a GGUF file.

    Attributes:
        info: Its bytes: of a type in blocks as rows of bytes, else in its own dtype.
        type: The name of its type.
        weight_shape: The shape of the numbers.
        weight_name: What it is called in the model that the file was converted from.
        heads: How many heads' rows are in llama.cpp's order; 0 if none are, −1 if it is not known.
    """

    type: str = "F32"
    weight_shape: Shape = ()
    weight_name: str = ""
    heads: int = 0

    @classmethod
    def claim(cls, stored: Candidate) -> GgufWeight | None:
        """Nothing: the tensors of a GGUF file are known from the file, not from their names."""
        return None

    @property
    def name(self) -> str:
        """That in the model."""
        return self.weight_name or self.info.name

    @property
    def shape(self) -> Shape:
        """That of the numbers."""
        return self.weight_shape

    @property
    def plain(self) -> bool:
        """Whether the numbers are stored as they are."""
        return self.type in FLOATING

    @property
    def quantised(self) -> str | None:
        """The type, where it rounds more than a floating-point number does."""
        return None if self.plain else f"GGUF {self.type}"

    @property
    def upright(self) -> bool:
        """Always: the converter turns what a model stores as ``(in, out)``."""
        return True

    @property
    def bits(self) -> int:
        """Bits on disk for each number, rounded up."""
        return -(-8 * self.info.nbytes // max(1, _product(self.weight_shape)))

    @property
    def unreadable(self) -> str | None:
        """Of types that the library does not read, and of heads that do not fit."""
        if self.type in UNSUPPORTED:
            return f"GGUF {self.type}: a type of weight that is not supported"
        if self.heads < 0:
            return "GGUF: the file does not say how many heads its rows belong to"
        if self.heads and (len(self.shape) != 2 or self.shape[0] % (2 * self.heads)):
            return f"GGUF: {self.shape[0]} rows are not those of {self.heads} heads"
        return None

    @property
    def read_only(self) -> str | None:
        """Always."""
        return "GGUF: not written; repair the model or adapter that it was converted from"

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; blocks in float32, plain numbers in their dtype."""
        import torch

        if self.unreadable:
            raise CheckpointError(f"{self.info.file}: tensor {self.name!r}: {self.unreadable}")
        height, width = self.extent(expert)
        if self.heads and rows is not None:
            return self.read(expert, None, file)[slice(*rows)].clone()
        start, stop = rows or (0, height)
        dtype = torch_dtypes()[self.type] if self.plain else torch.float32
        result = torch.empty(stop - start, width, dtype=dtype)
        for at, size in strips(start, stop, width):
            strip = self._rows((expert or 0) * height + at, size, width, file)
            result[self._places(at - start, size, height)] = strip
        return result

    def _places(self, first: int, count: int, height: int) -> Any:
        """Where rows of the file lie in the matrix."""
        import torch

        if not self.heads:
            return slice(first, first + count)
        size = height // self.heads
        row = torch.arange(first, first + count)
        head, inside = row // size, row % size
        return head * size + inside // 2 + (inside % 2) * (size // 2)

    def _rows(self, first: int, count: int, width: int, file: Path | None) -> Tensor:
        """Some rows in the order of the file."""
        import torch

        height = _product(self.weight_shape) // width
        row_bytes = self.info.nbytes // height
        content = read_bytes(self.info, first * row_bytes, count * row_bytes, file)
        if self.plain:
            return torch.frombuffer(content, dtype=torch_dtypes()[self.type]).reshape(count, width)
        import numpy
        from gguf import (  # pyright: ignore[reportMissingImports]
            GGMLQuantizationType,
            dequantize,
        )

        packed = numpy.frombuffer(content, dtype=numpy.uint8).reshape(count, row_bytes)
        numbers = dequantize(packed, GGMLQuantizationType[self.type])
        return torch.from_numpy(numpy.ascontiguousarray(numbers, numpy.float32)).reshape(
            count, width
        )


def gguf_weight(tensor: GgufTensor, file: Path, name: str, heads: int) -> GgufWeight:
    """The codec of a tensor.

    Args:
        tensor: Where it lies.
        file: The file.
        name: What it is called in the model.
        heads: See :class:`GgufWeight`.

    Returns:
        The codec.
    """
    dtype, shape = tensor.type, tensor.shape
    if dtype not in FLOATING:
        dtype, shape = "U8", (*shape[:-1], tensor.row_bytes)
    info = TensorInfo(tensor.name, dtype, shape, file, tensor.start)
    return GgufWeight(info, tensor.type, tensor.shape, name, heads)


def _product(shape: Shape) -> int:
    """The number of elements."""
    count = 1
    for size in shape:
        count *= size
    return count
