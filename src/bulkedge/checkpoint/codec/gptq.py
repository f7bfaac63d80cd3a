"""Weights in 2, 4 or 8 bits as GPTQ packs them, along the inputs.

Beside ``x.qweight`` of shape ``(in·bits/32, out)``, 32-bit words with the code of the first input
in the lowest bits, lie ``x.scales`` ``(groups, out)``, ``x.qzeros`` ``(groups, out·bits/32)``
packed along the outputs, and ``x.g_idx`` ``(in,)``, the group of each input.  With the zero point
of the file z, ``w[o, i] = s[g, o] · (code − z[g, o] − 1)``, without the 1 where
``checkpoint_format`` is ``gptq_v2``; in the dtype of the scales (Frantar et al., arXiv:2210.17323).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkedge._errors import CheckpointError
from bulkedge.checkpoint.elements import read_elements
from bulkedge.checkpoint.header import FLOATING, TensorInfo

from .base import Candidate, InWords, Rows, Shape, odd_groups, strips

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

CODES, SCALES, ZEROS, GROUPS = ".qweight", ".scales", ".qzeros", ".g_idx"
WORD = 32
"""Bits of a word."""
SIZES = ("group_size", "q_group_size")
"""The names that a configuration has for the inputs of a group."""
BY_LAYER = ("dynamic", "extra_config")
"""Settings of single layers, by GPTQModel and AutoRound."""
ADVICE = "give the checkpoint from before quantisation, or a dequantised one"


@dataclass(frozen=True)
class AlongInputs(InWords):
    """A weight whose words hold a row of inputs for all outputs, with groups along the inputs.

    Attributes:
        shift: What is added to a stored zero point.
    """

    shift: int = 0

    @property
    def name(self) -> str:
        """The layer's, with ``.weight``."""
        return self.info.name.removesuffix(CODES) + ".weight"

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; a strip of inputs at a time, in the dtype of the scales."""
        self.refuse_unreadable()
        parts, (height, width) = dict(self.parts), self.stored_shape
        part = slice(*(rows or (0, height)))
        scales = _whole(parts[SCALES], file)[:, part]
        zeros = self.along_outputs(_whole(parts[ZEROS], file))[:, part] + self.shift
        groups = self._groups(parts.get(GROUPS), len(scales), file)
        words = _whole(self.info, file)
        result = scales.new_empty(scales.shape[1], width)
        step = width // len(words)
        for at, count in strips(0, len(words), height * step):
            codes = self.codes(words[at : at + count], part)
            inputs = slice(at * step, (at + count) * step)
            of = groups[inputs]
            result[:, inputs] = ((codes - zeros[of]).to(scales.dtype) * scales[of]).mT
        return result

    @abstractmethod
    def codes(self, words: Tensor, part: slice) -> Tensor:
        """The codes in some rows of words, for some outputs: shape ``(inputs, outputs)``."""

    def along_outputs(self, words: Tensor) -> Tensor:
        """The codes in words that are packed along the outputs: shape ``(rows, outputs)``."""
        import torch

        shifts = torch.tensor(self.order, dtype=torch.int32) * self.code_bits
        return ((words[..., None] >> shifts) & (2**self.code_bits - 1)).flatten(1)

    @property
    def order(self) -> tuple[int, ...]:
        """In which place of a word the code of each output is."""
        return tuple(range(WORD // self.code_bits))

    def _groups(self, info: TensorInfo | None, count: int, file: Path | None) -> Tensor:
        """The group of each input."""
        import torch

        width = self.stored_shape[1]
        if info is None:
            return torch.arange(width) // (width // count)
        found = read_elements(info, 0, info.size, file).long()
        if bool((found < 0).any()) or bool((found >= count).any()):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} names groups beyond the {count} that have a "
                f"scale: a damaged save; {ADVICE}"
            )
        return found


@dataclass(frozen=True)
class Gptq(AlongInputs):
    """A weight in GPTQ's words; see the head of this file."""

    method = "GPTQ"

    @classmethod
    def claim(cls, stored: Candidate) -> Gptq | None:
        """Words with scales and zero points beside them, where the configuration names GPTQ."""
        said, parts = stored.quantisation, parts_of(stored, "gptq", "auto_gptq")
        if parts is None:
            return None
        bits, layout = said.get("bits"), str(said.get("checkpoint_format", "gptq")).lower()
        if type(bits) is not int or bits not in (2, 4, 8):
            problem = f"GPTQ in {bits!r:.20} bits, expected 2, 4 or 8 in config.json; {ADVICE}"
        elif layout not in ("gptq", "gptq_v2"):
            problem = f"GPTQ packed for {layout!r:.20}: not handled; {ADVICE}"
        else:
            codes, info = WORD // bits, stored.info
            rows, out = info.shape if len(info.shape) == 2 else (0, 0)
            shape = (out, rows * codes)
            problem = unfit("GPTQ", stored, parts, shape, codes)
            if problem is None:
                shift = 0 if layout == "gptq_v2" else 1
                return cls(info, None, tuple(parts.items()), bits, shape, shift)
        return cls(stored.info, problem, tuple(parts.items()), 0, stored.info.shape)

    def codes(self, words: Tensor, part: slice) -> Tensor:
        """See :meth:`AlongInputs.codes`."""
        import torch

        shifts = torch.tensor(self.order, dtype=torch.int32)[:, None] * self.code_bits
        return ((words[:, None, part] >> shifts) & (2**self.code_bits - 1)).flatten(0, 1)


def parts_of(stored: Candidate, method: str, exported: str) -> dict[str, TensorInfo] | None:
    """The tensors beside words that a method has packed.

    Args:
        stored: The words.
        method: As a configuration names it.
        exported: What the packing format has in it where AutoRound, which exports to several,
            has packed them that way.

    Returns:
        The tensors that are there, by the ends of their names; None where it is another method, or
        scales or zero points are not there.
    """
    said = stored.quantisation
    by = said.get("quant_method")
    if by == "auto-round":
        by = method if exported in str(said.get("packing_format")) else None
    parts = stored.all_beside((SCALES, ZEROS, GROUPS), of=CODES)
    return parts if by == method and {SCALES, ZEROS} <= set(parts) else None


def unfit(
    method: str, stored: Candidate, parts: Mapping[str, TensorInfo], shape: Shape, codes: int
) -> str | None:
    """What of a weight's tensors does not fit together, if anything.

    Args:
        method: What to call it.
        stored: The words.
        parts: The tensors beside it.
        shape: ``(out, in)``.
        codes: How many codes are in a word.

    Returns:
        The reason; None if all fit.
    """
    scales, zeros, groups = parts[SCALES], parts[ZEROS], parts.get(GROUPS)
    info, (out, width) = stored.info, shape
    count = scales.shape[0] if scales.shape else 0
    words = all(part.dtype == "I32" for part in (info, zeros, *([groups] if groups else [])))
    if (
        info.empty
        or not words
        or scales.dtype not in FLOATING
        or scales.shape != (count, out)
        or zeros.shape != (count, out // codes)
        or out % codes
        or count == 0
        or (width % count if groups is None else groups.shape != (width,))
    ):
        shapes = {end: (part.dtype, part.shape) for end, part in parts.items()}
        return f"{method}: words {info.dtype} {info.shape} with {shapes} do not fit; {ADVICE}"
    odd = odd_groups(_said_sizes(stored.quantisation), width, count)
    return None if odd is None else f"{method}: {odd}; {ADVICE}"


def _said_sizes(said: Mapping[str, Any]) -> list[object]:
    """The inputs of a group, as a configuration names them; none where layers may differ."""
    if any(said.get(name) for name in BY_LAYER):
        return []
    return [said[name] for name in SIZES if name in said][:1]


def _whole(info: TensorInfo, file: Path | None) -> Tensor:
    """A small tensor, or the words of a weight: an eighth of its numbers."""
    return read_elements(info, 0, info.size, file).reshape(info.shape)
