"""Weights in fp8 or int8 with one scale for all of them or for each row, or in fp8 without any.

Beside ``x.weight`` lies ``x.weight_scale`` (compressed-tensors, ModelOpt, newer files of ComfyUI)
or ``x.scale_weight`` (older ones): one number, or one for each output row, and
``w = (code − zero point) · scale`` in the dtype of the scale, as compressed-tensors computes it.
Diffusion models are often only cast to fp8: nothing lies beside, and the codes are the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge.checkpoint.elements import read_bytes, read_tensor, torch_dtypes
from bulkedge.checkpoint.header import FLOATING, TensorInfo

from .base import ANEW, Candidate, Checked, Codec, Rows, strips
from .block_fp8 import FP8
from .block_fp8 import SCALES as BLOCK_SCALES

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

SCALES = (".weight_scale", ".scale_weight")
ZERO = ".weight_zero_point"
OTHERS = (".input_scale", ".scale_input", ".output_scale", ".comfy_quant", ".weight_g_idx")
"""Ends of names of what lies beside such weights and does not change them."""

MARK = "scaled_fp8"
"""An empty tensor of this name says that ComfyUI's scales lie beside the weights."""


@dataclass(frozen=True)
class Scaled(Checked):
    """A weight in fp8 or int8.

    Attributes:
        info: The codes.
        problem: Why it cannot be read; None if it can.
        scales: One number, or one for each row; None where the codes are the numbers.
        zero: What is subtracted from the codes, in their dtype; None for nothing.
    """

    scales: TensorInfo | None = None
    zero: TensorInfo | None = None

    companion_endings = (*OTHERS, ".scale_weight", ZERO)

    @classmethod
    def claim(cls, stored: Candidate) -> Codec | None:
        """Codes with such scales beside them; fp8 where nothing in the file has scales."""
        info = stored.info
        if info.dtype not in (*FP8, "I8") or len(info.shape) < 2:
            return None
        scales = stored.all_beside(SCALES, of=".weight")
        if scales:
            found, zero = next(iter(scales.values())), stored.beside(ZERO, of=".weight")
            return cls(info, _why_unreadable(info, found, zero), found, zero)
        return cls(info) if info.dtype in FP8 and _is_cast(stored) else None

    @property
    def quantised(self) -> str:
        """The dtype, and whether there are scales."""
        kind = "int8" if self.info.dtype == "I8" else "fp8"
        if self.scales is None:
            return f"{kind} without scales"
        return f"{kind}, a scale for each {'weight' if self.scales.size == 1 else 'row'}"

    @property
    def upright(self) -> bool:
        """Where there are scales: those are of output rows."""
        return self.scales is not None and self.scales.size > 1

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """Scales and zero points."""
        return tuple(part for part in (self.scales, self.zero) if part is not None)

    @property
    def read_only(self) -> str | None:
        """Always: a change of one number may need another scale."""
        return f"{self.quantised}: would have to be {ANEW}"

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; in the dtype of the scales, float32 without."""
        import torch

        self.refuse_unreadable()
        height, width = self.extent(expert)
        start, stop = rows or (0, height)
        scales = None if self.scales is None else read_tensor(self.scales).reshape(-1, 1)
        result = torch.empty(
            stop - start, width, dtype=torch.float32 if scales is None else scales.dtype
        )
        for at, size in strips(start, stop, width):
            first = ((expert or 0) * height + at) * width
            content = read_bytes(self.info, first, size * width, file)
            codes = torch.frombuffer(content, dtype=torch_dtypes()[self.info.dtype])
            strip = result[at - start : at - start + size].copy_(codes.reshape(size, width))
            if self.zero is not None:
                strip -= _part(read_tensor(self.zero).reshape(-1, 1), at, size).to(strip.dtype)
            if scales is not None:
                strip *= _part(scales, at, size)
        return result


def _part(values: Tensor, first: int, count: int) -> Tensor:
    """The values of some rows; one value is that of all."""
    return values if len(values) == 1 else values[first : first + count]


def _is_cast(stored: Candidate) -> bool:
    """Whether fp8 in a file has no scales at all: none beside a weight, and none announced."""
    if stored.config.get("quantization_config") is not None or MARK in stored.tensors:
        return False
    ends = (*SCALES, BLOCK_SCALES, ".input_scale", ".scale_input")
    return not any(name.endswith(ends) for name in stored.tensors)


def _why_unreadable(info: TensorInfo, scales: TensorInfo, zero: TensorInfo | None) -> str | None:
    """What does not fit together, if anything."""
    rows = info.shape[0]
    if scales.dtype not in FLOATING or scales.size not in (1, rows):
        found = f"{scales.dtype} {scales.shape}"
        return (
            f"{info.dtype} tensor: its scales are {found}, expected one number, or {rows}, one "
            "for each row; scales of groups are not handled, dequantise it with what wrote it"
        )
    if scales.size == rows > 1 and scales.shape[0] != rows:
        return f"{info.dtype} tensor: scales of shape {scales.shape} are not those of its rows"
    if zero is not None and (zero.size != scales.size or zero.dtype not in (*FP8, "I8")):
        return f"{info.dtype} tensor: zero points {zero.dtype} {zero.shape} do not fit its scales"
    return None
