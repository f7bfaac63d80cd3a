"""Weights in nf4 or fp4, as bitsandbytes packs them: the base of QLoRA.

The weight is laid out in one row and cut into blocks of (mostly) 64 numbers.  Of each block the
largest absolute value is stored, and for each number the nearest of sixteen fractions of it, two in
a byte, the first in the upper half: ``w = table[code] · absmax[block]``.  With double quantisation
the largest values are themselves stored in eight bits, in blocks of 256:
``absmax = nested_map[code] · nested_absmax[block] + offset`` (Dettmers et al., QLoRA,
arXiv:2305.14314, sections 2 and 3).

Beside ``x.weight`` lie ``x.weight.absmax``, ``x.weight.quant_map``, for double quantisation
``nested_absmax`` and ``nested_quant_map``, and the settings as the bytes of a JSON object,
``x.weight.quant_state.bitsandbytes__nf4``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from bulkedge._errors import CheckpointError
from bulkedge.checkpoint.elements import read_bytes, read_elements, torch_dtypes
from bulkedge.checkpoint.header import FLOATING, TensorInfo, parse_json

from .base import ANEW, Candidate, Rows, Shape, Upright

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
"""The sixteen fractions of nf4, from quantiles of the normal law (QLoRA, appendix E)."""
# fmt: on

FP4_TWELFTHS = (0, 1 / 16, 8, 12, 4, 6, 2, 3)
"""The eight of fp4 in twelfths; with the sign bit set they are negative."""

TABLES = {
    "nf4": NF4,
    "fp4": (*(x / 12 for x in FP4_TWELFTHS), *(-x / 12 for x in FP4_TWELFTHS)),
}
STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""The dtypes that the numbers are read back in, as the settings name them."""

MAX_STATE_BYTES = 2**16
MAX_BLOCK = 4096
"""The largest block that the library makes; one of any size would cost its size in memory."""

TABLE_TOLERANCE = 1e-4
"""The stored table may differ from the published one by no more: versions round fp4 otherwise."""

LARGE = 1e30
"""No offset of largest values comes near it."""

STRIP = 2**20
"""How many numbers are unpacked at once."""


class _UnfitError(Exception):
    """What does not fit together; :meth:`FourBits.claim` keeps it as the reason."""


@dataclass(frozen=True)
class _State:
    """The settings of one weight, checked against the sizes of its tensors.

    Attributes:
        shape: The weight's.
        block: How many numbers share a largest value.
        dtype: What the numbers are read back in, as headers spell it.
        nested_block: How many largest values share one of their own; 0 without.
        offset: What is added to the largest values that are themselves quantised.
    """

    shape: Shape
    block: int
    dtype: str
    nested_block: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class FourBits(Upright):
    """A weight in nf4 or fp4.

    Attributes:
        info: The packed numbers; of any dtype, since FSDP wants them to look like others.
        problem: Why it cannot be read; None if it can.
        method: ``nf4`` or ``fp4``.
        state: The settings; None where they are damaged.
        parts: The tensors beside it, by the last part of their names.
    """

    method: str = "nf4"
    state: _State | None = None
    parts: Mapping[str, TensorInfo] = field(default_factory=dict, hash=False)

    companion_endings = tuple(f".weight.{part}" for part in PARTS) + tuple(
        STATE + method for method in TABLES
    )

    @classmethod
    def claim(cls, stored: Candidate) -> FourBits | None:
        """A tensor with settings of this form beside it, which are read."""
        methods = [method for method in TABLES if stored.beside(STATE + method) is not None]
        if not methods:
            return None
        method = methods[0]
        beside = stored.all_beside(f".{part}" for part in PARTS)
        parts = {end.removeprefix("."): part for end, part in beside.items()}
        parts |= stored.all_beside(STATE + m for m in methods)
        info = stored.info
        try:
            if len(methods) > 1:
                raise _UnfitError("settings of both nf4 and fp4")
            state = _checked(info, method, parts)
        except _UnfitError as error:
            reason = f"bitsandbytes {method}: {error}; save the model again"
            return cls(info, reason, method, None, parts)
        return cls(info, None, method, state, parts)

    @property
    def shape(self) -> Shape:
        """The weight's, of which the packed tensor is no image."""
        return self.info.shape if self.state is None else self.state.shape

    @property
    def quantised(self) -> str:
        """The method."""
        nested = self.state is not None and self.state.nested_block
        return f"bitsandbytes {self.method}{' with double quantisation' if nested else ''}"

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """Largest values, tables and settings."""
        return tuple(self.parts.values())

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    @property
    def read_only(self) -> str | None:
        """Always: a change of one number may need another largest value for its block."""
        return f"{self.quantised}: its blocks would have to be {ANEW}"

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; in the dtype that the library reads back, a strip at a time."""
        import torch

        if self.state is None:
            raise CheckpointError(f"{self.info.file}: tensor {self.info.name!r}: {self.problem}")
        height, width = self.extent(expert)
        start, stop = rows or (0, height)
        first, count = ((expert or 0) * height + start) * width, (stop - start) * width
        result = torch.empty(count, dtype=torch_dtypes()[self.state.dtype])
        for at in range(0, count, STRIP):
            size = min(STRIP, count - at)
            result[at : at + size] = self._numbers(self.state, first + at, size, file)
        return result.reshape(-1, width)

    def _numbers(self, state: _State, first: int, count: int, file: Path | None) -> Tensor:
        """Some numbers of the flattened weight, in float32."""
        import torch

        start, stop = first // 2, (first + count + 1) // 2
        packed = _as_uint8(read_bytes(self.info, start, stop - start, file))
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[first % 2 :][:count]
        values = torch.tensor(TABLES[self.method], dtype=torch.float32)[codes.int()]
        block, last = first // state.block, (first + count - 1) // state.block
        largest = self._absmax(state, block, last + 1).repeat_interleave(state.block)
        return values.mul_(largest[first - block * state.block :][:count])

    def _absmax(self, state: _State, start: int, stop: int) -> Tensor:
        """The largest values of some blocks, in float32."""
        import torch

        if not state.nested_block:
            return read_elements(self.parts["absmax"], start, stop - start).float()
        codes = _as_uint8(read_bytes(self.parts["absmax"], start, stop - start))
        table = read_elements(self.parts["nested_quant_map"], 0, 256)
        first, last = start // state.nested_block, (stop - 1) // state.nested_block
        largest = read_elements(self.parts["nested_absmax"], first, last + 1 - first)
        blocks = torch.arange(start, stop) // state.nested_block - first
        return table[codes.int()] * largest[blocks] + state.offset


def _as_uint8(content: bytearray) -> Tensor:
    """Bytes as numbers from 0 to 255."""
    import torch

    return torch.frombuffer(content, dtype=torch.uint8)


def _checked(info: TensorInfo, method: str, parts: Mapping[str, TensorInfo]) -> _State:
    """The settings, once they fit the tensors beside them."""
    state = _settings(parts[STATE + method], method)
    count = math.prod(state.shape)
    if info.nbytes != -(-count // 2):
        raise _UnfitError(f"{info.nbytes} bytes for {count} numbers {state.shape} of four bits")
    blocks = -(-count // state.block)
    _check_table(_part(parts, "quant_map", ("F32",), 16), method)
    if not state.nested_block:
        _part(parts, "absmax", FLOATING, blocks)
    else:
        _part(parts, "absmax", ("U8",), blocks)
        _part(parts, "nested_absmax", ("F32",), -(-blocks // state.nested_block))
        _part(parts, "nested_quant_map", ("F32",), 256)
    return state


def _settings(info: TensorInfo, method: str) -> _State:
    """What the JSON object in a tensor says, each field checked on its own."""
    if info.dtype != "U8" or not 2 <= info.nbytes <= MAX_STATE_BYTES:
        raise _UnfitError(f"settings of {info.nbytes} bytes in {info.dtype}")
    try:
        content = parse_json(bytes(read_bytes(info, 0, info.nbytes)))
    except ValueError as error:
        raise _UnfitError(f"settings that are no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("quant_type") != method:
        raise _UnfitError(f"settings that do not say quant_type {method!r}")
    shape, dtype = content.get("shape"), content.get("dtype")
    if not isinstance(shape, list) or not 2 <= len(shape) <= 5 or not all(map(_is_size, shape)):
        raise _UnfitError(f"settings with shape {shape!r:.60}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _UnfitError(f"settings with dtype {dtype!r:.60}, expected one of {', '.join(DTYPES)}")
    found = tuple(shape), _block(content, "blocksize"), DTYPES[dtype]
    if not any(key.startswith("nested_") for key in content):
        return _State(*found)
    offset = content.get("nested_offset")
    # bounded before it is a float: JSON has integers that none can hold
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < LARGE:
        raise _UnfitError(f"settings with nested_offset {offset!r:.60}")
    return _State(*found, _block(content, "nested_blocksize"), float(offset))


def _block(content: Mapping[str, Any], key: str) -> int:
    """The size of a block."""
    size = content.get(key)
    if not _is_size(size) or size > MAX_BLOCK:
        raise _UnfitError(f"settings with {key} {size!r:.60}, expected 1 to {MAX_BLOCK}")
    return size


def _is_size(value: Any) -> TypeGuard[int]:
    """Whether a value is a positive integer; JSON's true is not."""
    return type(value) is int and 0 < value < 2**48


def _part(
    parts: Mapping[str, TensorInfo], name: str, dtypes: tuple[str, ...], size: int
) -> TensorInfo:
    """A tensor beside the weight, once it has the size that the settings call for."""
    info = parts.get(name)
    if info is None:
        raise _UnfitError(f"no {name} beside it")
    if info.dtype not in dtypes or info.size != size:
        wanted = f"{size} numbers in {' or '.join(dtypes)}"
        raise _UnfitError(f"{name} is {info.dtype} {info.shape}, expected {wanted}")
    return info


def _check_table(info: TensorInfo, method: str) -> None:
    """Raise where another table is stored: kernels take that of the method, whatever it says."""
    stored = struct.unpack("<16f", read_bytes(info, 0, 64))
    # negated, because a comparison with NaN is false
    if not all(abs(a - b) <= TABLE_TOLERANCE for a, b in zip(stored, TABLES[method], strict=True)):
        raise _UnfitError(f"a quant_map that is not the table of {method}")
