"""Weights in fp8 with one scale for each block of them, as DeepSeek-V3 is stored.

Beside a weight in fp8 lies one factor for each block of it, under the weight's name and
``_scale_inv``; weight times factor is the matrix (arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge.checkpoint.elements import read_tensor
from bulkedge.checkpoint.header import FLOATING, TensorInfo
from bulkedge.checkpoint.names import of_experts

from .base import ANEW, Candidate, Codec, Rows
from .plain import Plain

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = "_scale_inv"
DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class BlockFp8(Codec):
    """A weight in fp8.

    Attributes:
        info: The weight.
        scales: Its factors, ``(⌈out/rows⌉, ⌈in/columns⌉)``, an expert axis in front of a stacked
            one, or one for all; None if there are none that fit.
        block: Rows and columns of a block.
    """

    scales: TensorInfo | None = None
    block: tuple[int, int] = DEFAULT_BLOCK

    companion_endings = (SCALES,)

    @classmethod
    def claim(cls, stored: Candidate) -> BlockFp8 | None:
        """Any tensor in fp8; one whose scales do not fit is unreadable."""
        info, scales = stored.info, stored.beside(SCALES)
        if info.dtype not in FP8:
            return None
        block = _block(stored)
        if len(info.shape) < 2 or scales is None or scales.dtype not in FLOATING:
            return cls(info, block=block)
        *experts, height, width = info.shape
        # a block is at most as large as the weight, so that a hostile size allocates nothing
        rows, columns = min(block[0], max(height, 1)), min(block[1], max(width, 1))
        expected = (*experts, -(-height // rows), -(-width // columns))
        if scales.size != 1 and (
            scales.shape != expected or len(experts) != of_experts(stored.name)
        ):
            return cls(info, block=block)
        return cls(info, scales, (rows, columns))

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The scales."""
        return () if self.scales is None else (self.scales,)

    @property
    def quantised(self) -> str | None:
        """With scales."""
        return "fp8 with scales" if self.scales is not None else None

    @property
    def unreadable(self) -> str | None:
        """Without scales that fit."""
        if self.scales is not None:
            return None
        return (
            f"{self.info.dtype} tensor: no {self.name}{SCALES} beside it that fits blocks of "
            f"{self.block[0]}×{self.block[1]} (weight_block_size in config.json; default 128×128)"
        )

    @property
    def read_only(self) -> str | None:
        """Always: a change of one number may need another scale for its block."""
        return f"{self.info.dtype} with scales: its blocks would have to be {ANEW}"

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; in float32."""
        self.refuse_unreadable()
        result = Plain(self.info).read(expert, rows, file).float()
        if self.scales is None:
            return result
        table = read_tensor(self.scales).float()
        if expert is not None and table.ndim > 2:
            table = table[expert]
        if table.numel() == 1:
            return result.mul_(table.reshape(()))
        height, width = self.block
        first = rows[0] if rows else 0
        for start in range(-(first % height), len(result), height):
            factors = table[(first + start) // height].repeat_interleave(width)
            result[max(start, 0) : start + height] *= factors[: result.shape[1]]
        return result


def _block(stored: Candidate) -> tuple[int, int]:
    """Rows and columns of a block."""
    size = stored.quantisation.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return DEFAULT_BLOCK
