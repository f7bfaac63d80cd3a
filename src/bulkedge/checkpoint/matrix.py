"""A stored tensor, or a part of one, seen as the one matrix that acts as ``(out, in)``.

A convolution kernel ``(out, in, kh, kw)`` is the matrix ``(out, in·kh·kw)``; a Conv1D of GPT-2 is
stored as ``(in, out)``; a mixture of experts stacks one matrix an expert; a fused projection has
the rows of several.  Only the bytes of the part are read, and only when asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge._errors import CheckpointError

from .header import BITS, TensorInfo, open_regular
from .read import read_tensor

if TYPE_CHECKING:  # listing names needs no torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class BlockScales:
    """The factors of a quantised matrix, one for each block of it.

    Attributes:
        info: The scales, ``(⌈out/rows⌉, ⌈in/columns⌉)``, an expert axis in front of a stacked one.
        block: Rows and columns of a block.
    """

    info: TensorInfo
    block: tuple[int, int]


@dataclass(frozen=True)
class StoredMatrix:
    """A tensor of a file, or a part of one, as a matrix ``(out, in)``; it stays on disk.

    Attributes:
        info: The tensor.
        transposed: Whether it is stored as ``(in, out)``.
        expert: Which one of a stacked tensor ``(experts, …, …)``; None for a tensor of its own.
        rows: The part of the output rows, from and to; None for all.
        scales: What its elements are multiplied by when read, if it is quantised.
        alias: The layer that shares the tensor, where it is not the one of that name.
    """

    info: TensorInfo
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None
    scales: BlockScales | None = None
    alias: str | None = None

    @property
    def name(self) -> str:
        """The tensor's name, with a suffix for a part: ``w[3]``, ``w[0:384]``, ``w[3, 0:384]``."""
        return self.info.name + self.suffix

    @property
    def suffix(self) -> str:
        """What tells a part from the whole, in a name; empty for the whole."""
        parts = [] if self.expert is None else [str(self.expert)]
        if self.rows is not None:
            parts.append(f"{self.rows[0]}:{self.rows[1]}")
        if self.alias is not None:
            parts.append(f"as {self.alias}")
        return f"[{', '.join(parts)}]" if parts else ""

    @property
    def dtype(self) -> str:
        """The dtype as the header spells it."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the part as stored, before any transposition: kernels flattened, one expert."""
        rows, columns = self.stored_shape
        if self.rows is None:
            return rows, columns
        kept = self.rows[1] - self.rows[0]
        return (rows, kept) if self.transposed else (kept, columns)

    @property
    def acts_as(self) -> tuple[int, int]:
        """Shape of what :meth:`read` returns: ``(out, in)``."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def size(self) -> int:
        """Number of elements of the part."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of the part, without its scales."""
        return self.size * BITS[self.dtype] // 8

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape as stored of all rows, of one expert: kernels flattened."""
        shape = self.info.shape if self.expert is None else self.info.shape[1:]
        return math.prod(shape[:1]), math.prod(shape[1:])

    def read(self) -> Tensor:
        """The matrix, shape :attr:`acts_as`, dtype as stored; float32 where it has scales.

        Returns:
            A private copy in memory.

        Raises:
            CheckpointError: If the file has changed or cannot be read any more.
        """
        stored = self._read_stored()
        if self.scales is not None:
            stored = self._scaled(stored, self.scales)
        return stored.mT if self.transposed else stored

    def _read_stored(self) -> Tensor:
        """The part in the orientation of the file, its bytes alone."""
        if self.expert is None and self.rows is None:
            return read_tensor(self.info).reshape(self.shape)
        rows, columns = self.stored_shape
        first = (self.expert or 0) * rows * columns
        if self.rows is None:
            return read_elements(self.info, first, rows * columns).reshape(rows, columns)
        start, stop = self.rows
        if not self.transposed:
            count = (stop - start) * columns
            return read_elements(self.info, first + start * columns, count).reshape(-1, columns)
        whole = read_elements(self.info, first, rows * columns).reshape(rows, columns)
        return whole[:, start:stop].clone()

    def _scaled(self, stored: Tensor, scales: BlockScales) -> Tensor:
        """The elements times the scales of their blocks, in float32."""
        table = read_tensor(scales.info).float()
        if self.expert is not None and table.ndim > 2:
            table = table[self.expert]
        result = stored.float()
        if table.numel() == 1:
            return result.mul_(table.reshape(()))
        height, width = scales.block
        first = self.rows[0] if self.rows is not None and not self.transposed else 0
        for start in range(-(first % height), len(result), height):
            factors = table[(first + start) // height].repeat_interleave(width)
            shift = self.rows[0] if self.rows is not None and self.transposed else 0
            result[max(start, 0) : start + height] *= factors[shift : shift + result.shape[1]]
        return result


def read_elements(info: TensorInfo, first: int, count: int, file: Path | None = None) -> Tensor:
    """Read ``count`` elements of a tensor from the ``first`` on, in the order they are stored.

    The safetensors library reads a whole tensor for the sake of a slice; this reads the slice.

    Args:
        info: From the header of its file.
        first: The first element, of the flattened tensor.
        count: How many, at least one.
        file: A copy of its file to read from.

    Returns:
        A 1-D tensor, a private copy in memory, dtype as stored.

    Raises:
        CheckpointError: If the file has changed or cannot be read any more.
    """
    import torch

    width = BITS[info.dtype] // 8
    content = bytearray(count * width)  # torch wants memory that may be written to
    try:
        opened, _ = open_regular(file or info.file)
        with opened:
            opened.seek(info.start + first * width)
            read = opened.readinto(content)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} cannot be read ({error.strerror}); was the file "
            "changed meanwhile?"
        ) from None
    if read != len(content):
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} ends too early; the file was changed meanwhile, "
            "start again"
        )
    return torch.frombuffer(content, dtype=torch_dtypes()[info.dtype])


def torch_dtypes() -> dict[str, torch.dtype]:
    """The dtypes that are read and written element by element, by their names in a header."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
    }
