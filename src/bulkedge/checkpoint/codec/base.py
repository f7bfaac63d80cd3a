"""What a codec is: how the numbers of one weight lie in the tensors of a file."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bulkedge._errors import CheckpointError
from bulkedge.checkpoint.header import BITS, TensorInfo

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

Shape = tuple[int, ...]
Rows = tuple[int, int]

STRIP = 2**20
"""About how many numbers of a packed weight are unpacked at once."""

ANEW = (
    "quantised anew, which a repair does not do; repair a dequantised copy of the model, or the "
    "adapter that was merged into it"
)
"""Why numbers that share a scale cannot be written, and what to do."""

NO_WEIGHT = "a bias or scales: not a weight"


@dataclass(frozen=True)
class Candidate:
    """A tensor that may hold the numbers of a weight, and all that lies beside it.

    Attributes:
        name: Its name without the wrappers of training libraries.
        info: The tensor.
        tensors: All tensors of the checkpoint, by such names.
        config: The content of its ``config.json``.
    """

    name: str
    info: TensorInfo
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    def beside(self, end: str, of: str = "") -> TensorInfo | None:
        """The tensor whose name has another end.

        Args:
            end: Its end.
            of: The end of this one's name that it has in place of.

        Returns:
            The tensor; None if there is none, or this one's name ends otherwise.
        """
        if not self.name.endswith(of):
            return None
        return self.tensors.get(self.name.removesuffix(of) + end)

    def all_beside(self, ends: Iterable[str], of: str = "") -> dict[str, TensorInfo]:
        """Those that :meth:`beside` finds, by their ends.

        Args:
            ends: Their ends.
            of: The end of this one's name.

        Returns:
            The tensors that are there.
        """
        found = {end: self.beside(end, of) for end in ends}
        return {end: info for end, info in found.items() if info is not None}

    @property
    def quantisation(self) -> Mapping[str, Any]:
        """What ``config.json`` says of it; empty where it says nothing."""
        settings = self.config.get("quantization_config")
        return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class Codec(ABC):
    """One weight as it is stored: in one tensor, or in one tensor and its companions.

    A codec is made for every tensor of a file and travels to worker processes: it holds headers and
    settings, no weights.

    Attributes:
        info: The tensor that holds the numbers.
    """

    info: TensorInfo

    companion_endings: ClassVar[tuple[str, ...]] = ()
    """Ends of names that only companions have: such a tensor is no weight, whatever lies beside."""

    @classmethod
    @abstractmethod
    def claim(cls, stored: Candidate) -> Codec | None:
        """The codec of a tensor, if it holds the numbers of a weight that is stored this way.

        Settings in a small tensor may be read here.

        Args:
            stored: The tensor and its neighbours in the file.

        Returns:
            The codec; None if the tensor is stored in another way, or is a companion.
        """

    @property
    def name(self) -> str:
        """The weight's name, if it is another than that of the tensor with its numbers."""
        return self.info.name

    @property
    def shape(self) -> Shape:
        """The weight's shape, if it is another than that of the tensor with its numbers."""
        return self.info.shape

    @property
    def quantised(self) -> str | None:
        """How the numbers were rounded when they were stored; None of floating-point numbers."""
        return None

    @property
    def upright(self) -> bool:
        """Whether it lies as ``(out, in)`` even in models that store ``(in, out)``."""
        return False

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The other tensors that make up the weight: scales, zero points, tables."""
        return ()

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """All tensors that make up the weight."""
        return self.info, *self.companions

    @property
    def bits(self) -> int:
        """Bits on disk for each number of the weight, without the companions."""
        return BITS[self.info.dtype]

    @property
    def no_weight(self) -> str | None:
        """Why the tensor is not a weight matrix at all; None if it is one."""
        return NO_WEIGHT if self.name.endswith("bias") else None

    @property
    def unreadable(self) -> str | None:
        """Why the weight cannot be read as numbers; None if it can."""
        return None

    @property
    def read_only(self) -> str | None:
        """Why other numbers cannot be written in its place; None if they can."""
        return f"{self.info.dtype}: quantised, and would have to be {ANEW}"

    @property
    def rounding(self) -> float:
        """The relative rounding of numbers that are written; 0 if it is not known."""
        return 0.0

    def refuse_unreadable(self) -> None:
        """Raise if it cannot be read.

        Raises:
            CheckpointError: If it cannot.
        """
        if self.unreadable:
            raise CheckpointError(f"{self.info.file}: tensor {self.info.name!r}: {self.unreadable}")

    def extent(self, expert: int | None) -> tuple[int, int]:
        """The weight as one matrix, kernels flattened, or that of one expert: rows and columns."""
        shape = self.shape if expert is None else self.shape[1:]
        return math.prod(shape[:1]), math.prod(shape[1:])

    @abstractmethod
    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """Some rows as numbers, in the order that they are stored in.

        Args:
            expert: The expert, of a stacked weight ``(experts, …, …)``; None for a weight of its
                own.
            rows: From and to; None for all.
            file: A copy of the file to read from; None for the file itself.

        Returns:
            Shape ``(rows, columns)`` as of :meth:`extent`, a floating-point dtype, a private copy.

        Raises:
            CheckpointError: If the file has changed or cannot be read any more.
        """

    def write(self, value: Tensor, expert: int | None, rows: Rows | None, file: Path) -> None:
        """Replace the numbers that :meth:`read` reads.

        Args:
            value: Shape ``(rows, columns)``, any dtype.
            expert: See :meth:`read`.
            rows: See :meth:`read`.
            file: A copy of the file, to be changed.
        """
        raise NotImplementedError(f"{type(self).__name__}: {self.read_only}")


@dataclass(frozen=True)
class Checked(Codec):
    """A weight in several tensors, which were compared when it was claimed.

    Attributes:
        info: The tensor that holds the numbers.
        problem: Why it cannot be read; None if it can.
    """

    problem: str | None = None

    @property
    def unreadable(self) -> str | None:
        """Where settings or tensors do not fit together."""
        return self.problem


class Upright(Checked):
    """One that lies as ``(out, in)`` always: it was turned before it was packed."""

    @property
    def upright(self) -> bool:
        """Always."""
        return True


class Grouped(Upright):
    """One whose numbers share a scale in groups."""

    @property
    def read_only(self) -> str | None:
        """Always: a change of one number may need another scale for its group."""
        return f"{self.quantised}: its groups would have to be {ANEW}"


@dataclass(frozen=True)
class InWords(Grouped):
    """One in words that hold several codes, with other tensors beside them.

    Attributes:
        info: The words.
        problem: Why it cannot be read; None if it can.
        parts: The tensors beside it, by the ends of their names.
        code_bits: Bits of a code; 0 where they are not known.
        stored_shape: ``(out, in)``.
    """

    parts: tuple[tuple[str, TensorInfo], ...] = ()
    code_bits: int = 0
    stored_shape: Shape = ()

    method: ClassVar[str]

    @property
    def shape(self) -> Shape:
        """The weight's, of which the words are no image."""
        return self.stored_shape

    @property
    def quantised(self) -> str:
        """Method and bits."""
        return f"{self.method} int{self.code_bits or ' of unknown bits'}"

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The tensors beside the words."""
        return tuple(info for _, info in self.parts)

    @property
    def bits(self) -> int:
        """Those of a code."""
        return self.code_bits or super().bits


class Packed(Grouped):
    """One whose rows are packed in groups, several numbers in a byte or a word."""

    def read(self, expert: int | None, rows: Rows | None, file: Path | None = None) -> Tensor:
        """See :meth:`Codec.read`; a strip of rows at a time."""
        self.refuse_unreadable()
        height, width = self.extent(expert)
        start, stop = rows or (0, height)
        offset = (expert or 0) * height
        result = None
        for at, size in strips(start, stop, width):
            strip = self.unpack(offset + at, size, file)
            if result is None:  # the first strip decides the dtype
                result = strip.new_empty(stop - start, width)
            result[at - start : at - start + size] = strip
        return self.unpack(offset + start, 0, file) if result is None else result

    @abstractmethod
    def unpack(self, first: int, count: int, file: Path | None) -> Tensor:
        """Some rows as numbers.

        Args:
            first: The first one, counted through all experts.
            count: How many.
            file: A copy of the file to read from; None for the file itself.

        Returns:
            Shape ``(count, columns)``.
        """


def odd_groups(sizes: Collection[object], width: int, count: int) -> str | None:
    """What to say where a configuration contradicts the scales of a weight.

    Args:
        sizes: The inputs of a group, as configurations name them; -1 stands for all.
        width: The inputs of the weight.
        count: How many groups have scales.

    Returns:
        The reason; None if a size fits the scales, or if any is missing or no whole number.
    """
    known = [size for size in sizes if type(size) is int]
    expected = {-(-width // size) if size > 0 else 1 for size in known}
    if not known or len(known) < len(sizes) or count in expected:
        return None
    told = " or ".join(map(str, sorted(set(known))))
    return (
        f"config.json says groups of {told}, but there are scales for {count} groups in {width} "
        "inputs: a program that goes by config.json cannot load it"
    )


def strips(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows in strips of about :data:`STRIP` numbers: the first row of each, and how many it has.

    Args:
        start: The first row.
        stop: The first one that is not wanted.
        width: Numbers in a row.

    Yields:
        First row and count.
    """
    step = max(1, STRIP // width)
    for at in range(start, stop, step):
        yield at, min(step, stop - at)


def unpacked(content: bytearray, bits: int) -> Tensor:
    """The codes in some bytes, the first in the lowest bits.

    Args:
        content: The bytes.
        bits: Of a code, 1, 2, 4 or 8.

    Returns:
        Shape ``(codes,)``, uint8.
    """
    import torch

    packed = torch.frombuffer(content, dtype=torch.uint8)
    shifts = range(0, 8, bits)
    return torch.stack([(packed >> s) & (2**bits - 1) for s in shifts], dim=1).flatten()
