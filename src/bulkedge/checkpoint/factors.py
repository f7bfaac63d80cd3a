"""The stored factors of one low-rank update, ``s·B·A``, whatever they are the update of.

Hu et al., arXiv:2106.09685; of a convolution B is a kernel of size one; of stacked experts PEFT
keeps A expert by expert and B rank by rank; with a magnitude it is DoRA, Liu et al.,
arXiv:2402.09353.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .header import TensorInfo
from .matrix import read_elements
from .read import read_tensor

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor


@dataclass(frozen=True)
class LoraFactors:
    """The stored factors of one low-rank update.

    Attributes:
        A: Shape ``(r, in)``, or ``(r, in, kh, kw)`` of a convolution; for an embedding
            ``(r, vocab)``; of E experts ``(E·r, in)``, expert by expert.
        B: Shape ``(out, r)``, or ``(out, r, 1, 1)``; for an embedding ``(dim, r)``; of E experts
            ``(out, r·E)``, rank by rank, or expert by expert if ``grouped``.
        scale: The number in front of ``B A``.
        embedding: Whether the weight is ``(vocab, dim)`` and the update ``s·Aᵀ·Bᵀ``.
        fan_in_fan_out: Whether the adapter says that the base stores weights as ``(in, out)``.
            PEFT writes what held for the last layer it wrapped: a hint, no more.
        magnitude: The norms of the tuned rows, one an output: DoRA.  The tuned weight is
            ``diag(magnitude / ‖rows‖) (W0 + s·B·A)``; of an embedding the columns are scaled.
        experts: How many experts A and B are stacked for; 0 for a layer of its own.
        expert: Which of them is meant; None for all.
        grouped: Whether column j of B belongs to expert ``j // r``, not to ``j % E`` as in PEFT.
        flipped: Whether the update is ``s·Aᵀ·Bᵀ``, as PEFT trained parameters before 0.19.
        rows: The rows of B that update the matrix in question, a block of a fused one.
        alpha: The stored number that the scale comes from, α/r, if it is a tensor.
        note: What a reader should know about the update.
    """

    A: TensorInfo
    B: TensorInfo
    scale: float
    embedding: bool = False
    fan_in_fan_out: bool = False
    magnitude: TensorInfo | None = None
    experts: int = 0
    expert: int | None = None
    grouped: bool = False
    flipped: bool = False
    rows: tuple[int, int] | None = None
    alpha: TensorInfo | None = None
    note: str | None = None

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        return (self.A, self.B) + ((self.magnitude,) if self.magnitude else ())

    @property
    def rank(self) -> int:
        """The rank r of the factors."""
        return self.A.shape[0] // (self.experts or 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that they update: ``(out, in)``, or ``(vocab, dim)``."""
        rows, columns = self.B.shape[0], math.prod(self.A.shape[1:])
        if self.embedding or self.flipped:
            rows, columns = columns, rows
        return (rows, columns) if self.rows is None else (self.rows[1] - self.rows[0], columns)

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a base tensor of the shape ``stored`` can be what they update."""
        if self.experts > 1:
            return len(stored) == 3 and stored[0] == self.experts and self._fits(stored[1:])
        kernel = self.A.shape[2:]
        if any(size > 1 for size in kernel):
            return stored == (self.B.shape[0], *self.A.shape[1:])
        # a kernel of size one is a linear layer, and either is trained as the other
        return self._fits(stored[:2]) and all(size == 1 for size in stored[2:])

    def _fits(self, stored: tuple[int, ...]) -> bool:
        """The same for one matrix; only an embedding tells its orientation."""
        return stored == self.shape or (not self.embedding and stored == self.shape[::-1])

    def of(self, *, expert: int | None = None, rows: tuple[int, int] | None = None) -> LoraFactors:
        """The factors of one expert, or of a range of output rows, or of both."""
        return replace(
            self,
            expert=self.expert if expert is None else expert,
            rows=self.rows if rows is None else rows,
        )

    def noted(self, *notes: str) -> LoraFactors:
        """The same with more notes."""
        return replace(self, note="; ".join(filter(None, (self.note, *notes))) or None)

    def read(self) -> tuple[Tensor, Tensor, float]:
        """``(B, A, s)`` with ``s·B·A`` the update of the matrix as ``(out, in)``.

        Returns:
            B ``(out, r)`` and A ``(r, in)`` in float64, and the scale.

        Raises:
            CheckpointError: If the file has changed or cannot be read any more.
        """
        A, B = self._read_A().double(), read_tensor(self.B).double().flatten(1)
        if self.experts > 1:
            each = (self.experts, self.rank) if self.grouped else (self.rank, self.experts)
            B = B.unflatten(1, each).select(1 if self.grouped else 2, self.expert or 0)
        if self.embedding or self.flipped:
            A, B = B.mT, A.mT
        return (B if self.rows is None else B[slice(*self.rows)]), A, self.scale

    def read_magnitude(self) -> Tensor | None:
        """The norms of the tuned rows in float64, those of :attr:`rows` alone; None without."""
        if self.magnitude is None:
            return None
        norms = read_tensor(self.magnitude).double().flatten()
        return norms if self.rows is None else norms[slice(*self.rows)]

    def _read_A(self) -> Tensor:
        """A as a matrix ``(r, in)``, that of one expert alone."""
        if self.experts > 1:
            count = self.rank * self.A.shape[1]
            part = read_elements(self.A, (self.expert or 0) * count, count)
            return part.reshape(self.rank, -1)
        return read_tensor(self.A).flatten(1)
