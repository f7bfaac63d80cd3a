"""A stored weight, or a part of one, seen as the one matrix that acts as ``(out, in)``.

A convolution kernel ``(out, in, kh, kw)`` is the matrix ``(out, in·kh·kw)``; a Conv1D of GPT-2 is
stored as ``(in, out)``; a mixture of experts stacks one matrix an expert; a fused projection has
the rows of several.  How its numbers are stored is the concern of its codec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .codec import Codec
from .header import TensorInfo

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor


@dataclass(frozen=True)
class StoredMatrix:
    """A weight of a file, or a part of one, as a matrix ``(out, in)``; it stays on disk.

    Attributes:
        codec: How the weight is stored.
        transposed: Whether it is stored as ``(in, out)``.
        expert: Which one of a stacked tensor ``(experts, …, …)``; None for a tensor of its own.
        rows: The part of the output rows, from and to; None for all.
        alias: The layer that shares the tensor, where it is not the one of that name.
    """

    codec: Codec
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None
    alias: str | None = None

    @property
    def info(self) -> TensorInfo:
        """The tensor that holds its numbers."""
        return self.codec.info

    @property
    def name(self) -> str:
        """The weight's name, with a suffix for a part: ``w[3]``, ``w[0:384]``, ``w[3, 0:384]``."""
        return self.codec.name + self.suffix

    @property
    def suffix(self) -> str:
        """The suffix of a part in a name; empty for the whole."""
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
        rows, columns = self.codec.extent(self.expert)
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
        """Bytes on disk of the part, without the companions of its tensor."""
        return self.size * self.codec.bits // 8

    def read(self) -> Tensor:
        """The matrix, shape :attr:`acts_as`, in the dtype that its codec reads.

        Returns:
            A private copy in memory.

        Raises:
            CheckpointError: If the file has changed or cannot be read any more.
        """
        if not self.transposed:
            return self.codec.read(self.expert, self.rows)
        stored = self.codec.read(self.expert, None)
        if self.rows is not None:  # these are columns of what is stored
            stored = stored[:, slice(*self.rows)].clone()
        return stored.mT

    def write(self, value: Tensor, file: Path) -> None:
        """Write the matrix over the one that a copy of its file holds.

        Args:
            value: The new matrix, shape :attr:`acts_as`, any dtype; stored in that of the file.
            file: The copy; it has the layout of ``info.file``.
        """
        if not self.transposed:
            return self.codec.write(value, self.expert, self.rows, file)
        stored = value.mT
        if self.rows is not None:  # these are columns of what is stored
            stored = self.codec.read(self.expert, None, file)
            stored[:, slice(*self.rows)] = value.mT
        return self.codec.write(stored, self.expert, None, file)
