"""Weights in 2, 4 or 8 bits with a scale for each group, as compressed-tensors packs integers.

Beside ``x.weight_packed``, 32-bit words with the first code of a row in the lowest bits, lie
``x.weight_shape``, ``x.weight_scale`` of shape ``(out, groups)`` and, where the codes are not
symmetric, ``x.weight_zero_point``, packed along the rows.  With codes from 0 to ``2^bits − 1``,
``w = (code − 2^(bits−1) − zero) · scale`` in the dtype of the scales (format ``pack-quantized``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkedge.checkpoint.elements import read_bytes, read_elements
from bulkedge.checkpoint.header import FLOATING, TensorInfo

from .base import Candidate, InWords, Packed, Shape, odd_groups, unpacked

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

PACKED = ".weight_packed"
SCALE, SHAPE, ZERO, ORDER = ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"
BITS = (2, 4, 8)
"""The numbers of bits whose codes do not cross a byte."""

ADVICE = "dequantise it with compressed-tensors, or give the checkpoint from before quantisation"


@dataclass(frozen=True)
class PackedInt(InWords, Packed):
    """A weight in integers of a few bits, in words of shape ``(out, ⌈in·bits/32⌉)``."""

    method = "compressed-tensors"

    @classmethod
    def claim(cls, stored: Candidate) -> PackedInt | None:
        """Words with a scale and a shape beside them."""
        info, parts = stored.info, stored.all_beside((SCALE, SHAPE, ZERO, ORDER), of=PACKED)
        if info.dtype != "I32" or not {SCALE, SHAPE} <= set(parts):
            return None
        shape = _read_shape(parts[SHAPE])
        bits = _bits(stored, shape)
        problem = _why_unreadable(info, parts, shape, bits) or _odd_groups(stored, parts, shape)
        known = (0, info.shape) if problem else (bits, shape)
        return cls(info, problem, tuple(parts.items()), *known)

    @property
    def name(self) -> str:
        """The layer's, with ``.weight``."""
        return self.info.name.removesuffix("_packed")

    def unpack(self, first: int, count: int, file: Path | None) -> Tensor:
        """See :meth:`Packed.unpack`; in the dtype of the scales."""
        parts, width, row = dict(self.parts), self.shape[1], 4 * self.info.shape[1]
        packed = read_bytes(self.info, first * row, count * row, file)
        codes = unpacked(packed, self.code_bits).reshape(count, -1)[:, :width]
        scales = _rows(parts[SCALE], first, count)
        values = codes.to(scales.dtype) - 2 ** (self.code_bits - 1)
        grouped = values.reshape(count, scales.shape[1], -1)
        if ZERO in parts:
            zeros = self._zeros(parts[ZERO])[first : first + count]
            grouped -= zeros.to(scales.dtype)[..., None]
        return grouped.mul_(scales[..., None]).reshape(count, width)

    def _zeros(self, info: TensorInfo) -> Tensor:
        """All zero points, ``(out, groups)``: few beside the weight."""
        import torch

        words = read_elements(info, 0, info.size).reshape(info.shape).mT.contiguous()
        content = bytearray(words.view(torch.uint8).numpy().tobytes())
        codes = unpacked(content, self.code_bits).reshape(info.shape[1], -1)
        return codes[:, : self.shape[0]].mT.int() - 2 ** (self.code_bits - 1)


def _rows(scales: TensorInfo, first: int, count: int) -> Tensor:
    """The scales of some rows; one is that of all."""
    if scales.size == 1:
        return read_elements(scales, 0, 1).expand(count, 1)
    groups = scales.shape[-1]
    return read_elements(scales, first * groups, count * groups).reshape(count, groups)


def _read_shape(info: TensorInfo) -> Shape:
    """The shape that a small tensor holds; empty if it holds none of a matrix."""
    if info.dtype not in ("I64", "I32") or info.shape != (2,):
        return ()
    return tuple(read_elements(info, 0, 2).tolist())


def _bits(stored: Candidate, shape: Shape) -> int:
    """Bits of a code, by the width of the words and what the configuration says; 0 if unknown."""
    words = stored.info.shape
    if len(shape) != 2 or len(words) != 2:
        return 0
    said = _said(stored) or set(BITS)
    found = [b for b in BITS if b in said and -(-shape[1] * b // 32) == words[1]]
    return found[0] if len(found) == 1 else 0


def _said(stored: Candidate) -> set[int]:
    """The bits of weights that a configuration names."""
    return {bits for w in _schemes(stored) if type(bits := w.get("num_bits")) is int}


def _schemes(stored: Candidate) -> list[dict[str, Any]]:
    """How weights are quantised by a configuration, which may differ by layers."""
    groups = stored.quantisation.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    weights = (group.get("weights") for group in found if isinstance(group, dict))
    return [scheme for scheme in weights if isinstance(scheme, dict)]


def _odd_groups(stored: Candidate, parts: Mapping[str, TensorInfo], shape: Shape) -> str | None:
    """What to say where the configuration contradicts the scales."""
    scale, schemes = parts[SCALE], _schemes(stored)
    if any(scheme.get("strategy", "group") != "group" for scheme in schemes):
        return None
    sizes = [scheme.get("group_size") for scheme in schemes]
    odd = odd_groups(sizes, shape[1], scale.shape[-1] if scale.shape else 1)
    return None if odd is None else f"compressed-tensors: {odd}; {ADVICE}"


def _why_unreadable(
    info: TensorInfo, parts: Mapping[str, TensorInfo], shape: Shape, bits: int
) -> str | None:
    """What does not fit together, if anything."""
    if not bits or info.empty or shape[0] != info.shape[0] or shape[1] < 1:
        return (
            f"compressed-tensors: words of shape {info.shape} for a weight of shape "
            f"{shape or 'unknown'}, expected bits of {BITS}; {ADVICE}"
        )
    if ORDER in parts:
        return f"compressed-tensors: groups in the order of {parts[ORDER].name}; {ADVICE}"
    scale, zero = parts[SCALE], parts.get(ZERO)
    groups = scale.shape[-1] if scale.shape else 1
    fits = scale.size == 1 or (scale.shape == (shape[0], groups) and groups > 0)
    if scale.dtype not in FLOATING or not fits or shape[1] % groups:
        return f"compressed-tensors: scales {scale.dtype} {scale.shape} for {shape}; {ADVICE}"
    expected = (-(-shape[0] * bits // 32), groups)
    if zero is not None and (zero.dtype != "I32" or zero.shape != expected):
        return f"compressed-tensors: zero points {zero.dtype} {zero.shape}, expected {expected}"
    return None
