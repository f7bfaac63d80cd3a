"""Weights in four bits of floating point, with a scale for each group of a row: MXFP4 and NVFP4.

A code is a sign and one of 0, ½, 1, 1½, 2, 3, 4, 6, two in a byte, the first in the lower half.
MXFP4 has groups of 32 and scales ``2^(code − 127)`` (OCP Microscaling Formats 1.0, section 5);
NVFP4 has groups of 16, scales in fp8, and one number for the whole weight that they are divided by.

gpt-oss stores MXFP4 as ``x_blocks``, ``(experts, out, groups, 16)``, with ``x_scales``;
compressed-tensors stores both as ``x.weight_packed`` with ``x.weight_scale`` and, of NVFP4,
``x.weight_global_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge.checkpoint.elements import read_bytes, read_elements, read_tensor
from bulkedge.checkpoint.header import TensorInfo

from .base import Candidate, Packed, Shape, unpacked

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
PACKED, SCALE, DIVISOR = ".weight_packed", ".weight_scale", ".weight_global_scale"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What a code stands for; with the highest bit set it is negative."""

GROUPS = {"U8": 32, "F8_E4M3": 16}
"""How many numbers share a scale, by the dtype of the scales."""


@dataclass(frozen=True)
class Fp4(Packed):
    """A weight in MXFP4 or NVFP4.

    Attributes:
        info: The codes, two in a byte.
        problem: Why it cannot be read; None if it can.
        scales: One for each group.
        divisor: What the scales are divided by; None for nothing.
    """

    scales: TensorInfo | None = None
    divisor: TensorInfo | None = None

    companion_endings = (DIVISOR, ".input_global_scale")

    @classmethod
    def claim(cls, stored: Candidate) -> Fp4 | None:
        """Bytes with scales beside them, under the names of gpt-oss or of compressed-tensors."""
        for end, scale in ((BLOCKS, SCALES), (PACKED, SCALE)):
            info, scales = stored.info, stored.beside(scale, of=end)
            if info.dtype == "U8" and scales is not None:
                divisor = stored.beside(DIVISOR, of=end)
                return cls(info, _why_unreadable(info, scales, divisor), scales, divisor)
        return None

    @property
    def name(self) -> str:
        """The parameter's, or the layer's with ``.weight``."""
        return self.info.name.removesuffix(BLOCKS).removesuffix("_packed")

    @property
    def shape(self) -> Shape:
        """The weight's, each expert as ``(out, in)``."""
        return _shape(self.info)

    @property
    def quantised(self) -> str:
        """Which of the two."""
        return "NVFP4" if self.scales is not None and self.scales.dtype != "U8" else "MXFP4"

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The scales, and what they are divided by."""
        return tuple(part for part in (self.scales, self.divisor) if part is not None)

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    def unpack(self, first: int, count: int, file: Path | None) -> Tensor:
        """See :meth:`Packed.unpack`; in float32."""
        import torch

        width = self.shape[-1]
        packed = read_bytes(self.info, first * width // 2, count * width // 2, file)
        table = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)])
        values = table[unpacked(packed, 4).int()]
        if self.scales is not None:
            groups = values.reshape(-1, GROUPS[self.scales.dtype])
            groups *= self._factors(self.scales, first, count)
        return values.reshape(-1, width)

    def _factors(self, scales: TensorInfo, first: int, count: int) -> Tensor:
        """The scales of some rows, in float32, one below the other."""
        import torch

        groups = scales.shape[-1]
        stored = read_elements(scales, first * groups, count * groups)[:, None]
        if scales.dtype == "U8":
            # the last code is the NaN of such scales
            powers = [2.0 ** (code - 127) for code in range(255)]
            return torch.tensor([*powers, torch.nan])[stored.int()]
        divisor = 1.0 if self.divisor is None else read_tensor(self.divisor).float().reshape(())
        return stored.float() / divisor


def _shape(info: TensorInfo) -> Shape:
    """The shape of the weight that these bytes hold."""
    *rows, last = info.shape
    if info.name.endswith(BLOCKS) and rows:
        last *= rows.pop()
    return (*rows, 2 * last)


def _why_unreadable(info: TensorInfo, scales: TensorInfo, divisor: TensorInfo | None) -> str | None:
    """What does not fit together, if anything."""
    shape, group = _shape(info), GROUPS.get(scales.dtype, 0)
    expected = (*shape[:-1], shape[-1] // group) if group else None
    if scales.shape != expected or len(shape) < 2 or info.empty or shape[-1] % group:
        return (
            f"weight in fp4 of shape {shape}: its scales are {scales.dtype} {scales.shape}, "
            "expected U8 for each 32 numbers of a row (MXFP4) or F8_E4M3 for each 16 (NVFP4); "
            "dequantise it with the library that wrote it"
        )
    if divisor is not None and (divisor.dtype != "F32" or divisor.size != 1):
        return f"NVFP4: {divisor.name} is {divisor.dtype} {divisor.shape}, expected one in F32"
    if (divisor is None) == (scales.dtype != "U8"):
        return "fp4: NVFP4 has a weight_global_scale beside it, MXFP4 has none; save it again"
    return None
