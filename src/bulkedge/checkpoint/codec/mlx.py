"""Weights in 2, 4 or 8 bits as MLX quantises them: ``w = scale · code + bias`` in groups of a row.

Beside ``x.weight``, 32-bit words with the first code in the lowest bits, lie ``x.scales`` and
``x.biases``, ``(out, in/group)``.  ``quantization`` in ``config.json`` has the size of a group and
the bits, for all layers or by their names (MLX, ``mlx.core.quantize``, mode ``affine``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkedge.checkpoint.elements import read_bytes, read_elements
from bulkedge.checkpoint.header import FLOATING, TensorInfo

from .base import Candidate, Packed, Shape, unpacked

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

SCALES, BIASES = ".scales", ".biases"
BITS = (2, 4, 8)
"""The numbers of bits whose codes do not cross a byte."""


@dataclass(frozen=True)
class MlxAffine(Packed):
    """A weight in groups.

    Attributes:
        info: The words, ``(out, in·bits/32)``.
        problem: Why it cannot be read; None if it can.
        scales: ``(out, in/group)``.
        biases: The same.
        code_bits: Bits of a code; 0 where they are not known.
    """

    scales: TensorInfo | None = None
    biases: TensorInfo | None = None
    code_bits: int = 0

    companion_endings = (BIASES,)

    @classmethod
    def claim(cls, stored: Candidate) -> MlxAffine | None:
        """Words with scales and biases beside them."""
        info = stored.info
        scales, biases = (stored.beside(end, of=".weight") for end in (SCALES, BIASES))
        if info.dtype != "U32" or scales is None or biases is None:
            return None
        bits, group = _settings(stored)
        problem = _why_unreadable(info, scales, biases, bits, group)
        return cls(info, problem, scales, biases, 0 if problem else bits)

    @property
    def shape(self) -> Shape:
        """The weight's, of which the words are no image."""
        if not self.code_bits:
            return self.info.shape
        return (*self.info.shape[:-1], self.info.shape[-1] * 32 // self.code_bits)

    @property
    def quantised(self) -> str:
        """The bits."""
        return f"MLX {self.code_bits or 'unknown'} bits"

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """Scales and biases."""
        return tuple(part for part in (self.scales, self.biases) if part is not None)

    @property
    def bits(self) -> int:
        """Those of a code."""
        return self.code_bits or super().bits

    def unpack(self, first: int, count: int, file: Path | None) -> Tensor:
        """See :meth:`Packed.unpack`; in float32."""
        width = self.shape[-1]
        row_bytes = width * self.code_bits // 8
        packed = read_bytes(self.info, first * row_bytes, count * row_bytes, file)
        scales, biases = (self._groups(part, first, count) for part in self.companions)
        grouped = unpacked(packed, self.code_bits).float().reshape(count, scales.shape[1], -1)
        return (grouped * scales[..., None] + biases[..., None]).reshape(count, width)

    def _groups(self, part: TensorInfo, first: int, count: int) -> Tensor:
        """The scales or the biases of some rows."""
        groups = part.shape[-1]
        return read_elements(part, first * groups, count * groups).float().reshape(count, groups)


def _settings(stored: Candidate) -> tuple[Any, Any]:
    """Bits of a code and size of a group, by the layer's own entry or that of all."""
    given = stored.config.get("quantization")
    given = given if isinstance(given, dict) else {}
    own = given.get(stored.name.removesuffix(".weight"))
    own = own if isinstance(own, dict) else {}
    if own.get("mode", given.get("mode", "affine")) != "affine":
        return None, None
    return own.get("bits", given.get("bits")), own.get("group_size", given.get("group_size"))


def _why_unreadable(
    info: TensorInfo, scales: TensorInfo, biases: TensorInfo, bits: Any, group: Any
) -> str | None:
    """What does not fit together, if anything."""
    if bits not in BITS or type(bits) is not int or type(group) is not int or group < 1:
        return (
            f"MLX: quantization in config.json says bits {bits!r:.20} in groups of {group!r:.20}, "
            f"expected bits of {BITS} in mode affine; dequantise it with mlx_lm.convert"
        )
    if len(info.shape) < 2 or scales.shape != biases.shape or scales.dtype not in FLOATING:
        return f"MLX: scales {scales.shape} and biases {biases.shape} do not fit"
    width = info.shape[-1] * 32 // bits
    expected = (*info.shape[:-1], width // group)
    if width % group or scales.shape != expected or biases.dtype not in FLOATING or info.empty:
        return f"MLX: scales of {scales.shape}, expected {expected} in groups of {group}"
    return None
