"""Weights that are stored as the numbers that they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge.checkpoint.elements import (
    read_elements,
    read_tensor,
    rounding_of,
    torch_dtypes,
    write_elements,
)
from bulkedge.checkpoint.header import FLOATING

from .base import NO_WEIGHT, Candidate, Codec, Rows

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

INDEX_DTYPES = ("BOOL", "I64")


class Plain(Codec):
    """A tensor on its own."""

    @classmethod
    def claim(cls, stored: Candidate) -> Plain:
        """Any tensor."""
        return cls(stored.info)

    @property
    def no_weight(self) -> str | None:
        """Of indices and biases."""
        if self.info.dtype in INDEX_DTYPES:
            return f"{self.info.dtype} tensor: indices, not a weight"
        return super().no_weight

    @property
    def unreadable(self) -> str | None:
        """Of dtypes that are no real floating-point numbers."""
        if self.info.dtype in FLOATING:
            return None
        kind = "complex" if self.info.dtype.startswith("C") else "quantised"
        return f"{self.info.dtype} tensor: {kind}, not handled yet"

    @property
    def read_only(self) -> str | None:
        """None: the dtype only rounds."""
        return None

    @property
    def rounding(self) -> float:
        """The machine epsilon."""
        return rounding_of(self.info)

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; the dtype is that of the file."""
        height, width = self.extent(expert)
        if expert is None and rows is None and file is None:
            return read_tensor(self.info).reshape(height, width)
        start, stop = rows or (0, height)
        first = ((expert or 0) * height + start) * width
        return read_elements(self.info, first, (stop - start) * width, file).reshape(-1, width)

    def write(self, value: Tensor, expert: int | None, rows: Rows | None, file: Path) -> None:
        """See :meth:`Codec.write`."""
        height, width = self.extent(expert)
        first = ((expert or 0) * height + (rows[0] if rows else 0)) * width
        write_elements(self.info, first, value.to(torch_dtypes()[self.info.dtype]), file)


class Companion(Plain):
    """A tensor that belongs to the weight of a codec, and is no weight itself."""

    @property
    def no_weight(self) -> str | None:
        """Always."""
        return super().no_weight or NO_WEIGHT
