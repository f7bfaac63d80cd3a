"""Weights in int8 with one scale for each row, as bitsandbytes stores them.

Beside ``x.weight`` lies ``x.SCB``, the largest absolute value of each row:
``w = code · SCB[row] / 127`` (Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge.checkpoint.elements import read_bytes, read_elements
from bulkedge.checkpoint.header import FLOATING, TensorInfo

from .base import ANEW, Candidate, Rows, Upright, strips

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

SCALES, LAYOUT = ".SCB", ".weight_format"
ONE_127TH = 7.874015718698502e-3
"""1/127 as the library multiplies by it, in single precision."""


@dataclass(frozen=True)
class EightBits(Upright):
    """A weight in int8.

    Attributes:
        info: The codes, ``(out, in)``.
        problem: Why it cannot be read; None if it can.
        scales: The largest absolute value of each row.
        layout: One byte that says in which order the codes lie; None if nothing does.
    """

    scales: TensorInfo | None = None
    layout: TensorInfo | None = None

    companion_endings = (SCALES, LAYOUT)

    @classmethod
    def claim(cls, stored: Candidate) -> EightBits | None:
        """A tensor in int8 with scales beside it; the byte that gives the order is read."""
        info = stored.info
        scales, layout = (stored.beside(end, of=".weight") for end in (SCALES, LAYOUT))
        if info.dtype != "I8" or scales is None:
            return None
        return cls(info, _why_unreadable(info, scales, layout), scales, layout)

    @property
    def quantised(self) -> str:
        """The method."""
        return "bitsandbytes int8"

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The scales, and the byte that gives the order."""
        return tuple(info for info in (self.scales, self.layout) if info is not None)

    @property
    def read_only(self) -> str | None:
        """Always: a change of one number may need another scale for its row."""
        return f"{self.quantised}: its rows would have to be {ANEW}"

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; in float32, a strip of rows at a time."""
        import torch

        height, width = self.extent(expert)
        start, stop = rows or (0, height)
        result = torch.empty(stop - start, width)
        for at, size in strips(start, stop, width):
            content = read_bytes(self.info, at * width, size * width, file)
            codes = torch.frombuffer(content, dtype=torch.int8).reshape(size, width)
            strip = result[at - start : at - start + size].copy_(codes)
            if self.scales is not None:
                strip.mul_(read_elements(self.scales, at, size).float()[:, None]).mul_(ONE_127TH)
        return result


def _why_unreadable(info: TensorInfo, scales: TensorInfo, layout: TensorInfo | None) -> str | None:
    """What does not fit together, if anything."""
    again = "save the model again"
    if len(info.shape) != 2:
        return f"bitsandbytes int8: shape {info.shape}, expected a matrix; {again}"
    if scales.dtype not in FLOATING or scales.size != info.shape[0]:
        found = f"{scales.dtype} {scales.shape}"
        return f"bitsandbytes int8: SCB is {found}, expected {info.shape[0]} numbers; {again}"
    if layout is None:
        return None
    if layout.dtype != "U8" or layout.size != 1:
        found = f"{layout.dtype} {layout.shape}"
        return f"bitsandbytes int8: weight_format is {found}, expected one byte; {again}"
    if read_bytes(layout, 0, 1)[0]:
        return (
            "bitsandbytes int8: weight_format says that the codes lie in the order of one kind of "
            f"GPU; load the model with bitsandbytes 0.45 or later, and {again}"
        )
    return None
