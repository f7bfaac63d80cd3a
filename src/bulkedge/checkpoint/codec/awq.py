"""Weights in 4 bits as AWQ packs them (version ``gemm``), along the outputs.

Beside ``x.qweight`` of shape ``(in, out/8)``, 32-bit words, lie ``x.qzeros`` ``(groups, out/8)``,
packed alike, and ``x.scales`` ``(groups, out)``.  A word holds eight outputs, the even ones first:
0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits.  ``w[o, i] = s[g, o] · (code − z[g, o])`` in the dtype
of the scales (Lin et al., arXiv:2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Candidate
from .gptq import ADVICE, GROUPS, AlongInputs, parts_of, unfit

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which place of a word the code of each of eight outputs is."""


@dataclass(frozen=True)
class Awq(AlongInputs):
    """A weight in AWQ's words; see the head of this file."""

    method = "AWQ"

    @classmethod
    def claim(cls, stored: Candidate) -> Awq | None:
        """Words with scales and zero points beside them, where the configuration names AWQ."""
        said, parts = stored.quantisation, parts_of(stored, "awq", "awq")
        if parts is None:
            return None
        parts.pop(GROUPS, None)
        bits, layout = said.get("bits", 4), str(said.get("version", "gemm")).lower()
        if bits != 4 or type(bits) is not int:
            problem = f"AWQ in {bits!r:.20} bits, expected 4 in config.json; {ADVICE}"
        elif layout != "gemm":
            problem = f"AWQ of version {layout!r:.20}, expected gemm; {ADVICE}"
        else:
            info = stored.info
            width, words = info.shape if len(info.shape) == 2 else (0, 0)
            shape = (words * len(PLACES), width)
            problem = unfit("AWQ", stored, parts, shape, len(PLACES))
            if problem is None:
                return cls(info, None, tuple(parts.items()), bits, shape)
        return cls(stored.info, problem, tuple(parts.items()), 0, stored.info.shape)

    @property
    def order(self) -> tuple[int, ...]:
        """See :attr:`AlongInputs.order`."""
        return PLACES

    def codes(self, words: Tensor, part: slice) -> Tensor:
        """See :meth:`AlongInputs.codes`."""
        return self.along_outputs(words)[:, part]
