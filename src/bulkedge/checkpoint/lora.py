"""LoRA: the stored factors of one low-rank update, ``s·B·A``, whatever they are the update of.

Hu et al., arXiv:2106.09685; of a convolution B is a kernel of size one; of stacked experts PEFT
keeps A expert by expert and B rank by rank; with a magnitude it is DoRA, Liu et al.,
arXiv:2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .elements import read_elements, read_tensor, rounding_of, torch_dtypes
from .header import TensorInfo

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

FROM_THE_BASE = {"pissa": "PiSSA", "olora": "OLoRA"}
"""Initialisations that take a product of factors off the base which the base alone determines."""

CONVERTED = (
    "convert it where it was trained, with peft_model.save_pretrained(OUT, "
    "path_initial_model_for_weight_conversion=INITIAL), INITIAL being the adapter as it was saved "
    "before training"
)
CONVERT = f"{CONVERTED}; or audit the merged checkpoint"
"""What to do with an adapter that is relative to a changed base."""
RELATIVE = "relative to what {} took from the base"
"""Why the factors of such an adapter hold no correction of the base's update."""


def scale_of(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """The number in front of ``B A``: ``α/r``, or ``α/√r`` under rsLoRA.

    Args:
        alpha: α.
        rank: r.
        rslora: Whether the scale is rank-stabilised.

    Returns:
        The scale.

    References:
        Hu et al., arXiv:2106.09685; Kalajdzievski, arXiv:2312.03732.

    Example:
        >>> scale_of(16, 4), scale_of(16, 4, rslora=True)
        (4.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if rslora else rank)


def alpha_of(scale: float, rank: int, *, rslora: bool = False) -> float:
    """The α of a scale and a rank, the inverse of :func:`scale_of`.

    Args:
        scale: The number in front of ``B A``.
        rank: r.
        rslora: Whether the scale is rank-stabilised.

    Returns:
        α.

    Example:
        >>> alpha_of(scale_of(16, 4), 4)
        16.0
    """
    return scale * (math.sqrt(rank) if rslora else rank)


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
            PEFT writes what was true of the last layer that it wrapped, so this is only a hint.
        magnitude: The norms of the tuned rows, one per output: DoRA.  The tuned weight is
            ``diag(magnitude / ‖rows‖) (W0 + s·B·A)``; of an embedding the columns are scaled.
        experts: How many experts A and B are stacked for; 0 for a layer of its own.
        expert: Which of them is meant; None for all.
        grouped: Whether column j of B belongs to expert ``j // r``, not to ``j % E`` as in PEFT.
        flipped: Whether the update is ``s·Aᵀ·Bᵀ``, as PEFT trained parameters before 0.19.
        rows: The rows of B that update the matrix in question, a block of a fused one.
        alpha: The stored number that the scale comes from, α/r, if it is a tensor.
        note: What a reader should know about the update.
        fixed: Why no correction can be stored in it; None if one can.
        initial: ``"pissa"`` or ``"olora"``, if factors of that initialisation were subtracted from
            the base: the update is ``s·(B·A − B0·A0)``, and :meth:`read` gives B and A.
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
    fixed: str | None = None
    initial: str | None = None
    kind = "lora"

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
        # a convolution with a kernel of size one is a linear layer, and may be stored as one
        return self._fits(stored[:2]) and all(size == 1 for size in stored[2:])

    def _fits(self, stored: tuple[int, ...]) -> bool:
        """The same for one matrix; only an embedding has a fixed orientation."""
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

    def correctable(self) -> LoraFactors | str:
        """Itself, unless other factors would not give another update."""
        if self.initial:
            reason = RELATIVE.format(FROM_THE_BASE[self.initial])
            return f"{reason}; merge it into the model first, or {CONVERTED}"
        return self.fixed or ("a scale of zero" if self.scale == 0 else self)

    @property
    def rounding(self) -> float:
        """The machine epsilon of the factors."""
        return rounding_of(self.A)

    def whole(self) -> LoraFactors:
        """The factors of all experts and all rows."""
        return replace(self, expert=None, rows=None)

    def stored(
        self, factors: Sequence[tuple[Tensor, Tensor]], magnitude: Tensor | None
    ) -> dict[str, Tensor]:
        """New factors in the layout and the dtypes of the file: the inverse of :meth:`read`.

        Args:
            factors: B and A as ``(out, in)``, s divided out, all of one rank: one pair for each
                expert in order, or one pair.
            magnitude: The norms of all rows; None without.

        Returns:
            Tensors by name.
        """
        import torch

        if self.embedding or self.flipped:
            factors = [(A.mT, B.mT) for B, A in factors]
        # the columns of B lie expert by expert if grouped, else rank by rank
        B = torch.stack([B for B, _ in factors], dim=1 if self.grouped else 2).flatten(1)
        A = torch.cat([A for _, A in factors])
        tensors = {
            self.A.name: A.reshape(-1, *self.A.shape[1:]),
            self.B.name: B.reshape(len(B), -1, *self.B.shape[2:]),
        }
        if self.magnitude is not None and magnitude is not None:
            tensors[self.magnitude.name] = magnitude.reshape(self.magnitude.shape)
        dtypes = {info.name: torch_dtypes()[info.dtype] for info in self.infos}
        return {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}

    def rounded(
        self, B: Tensor, A: Tensor, magnitude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Factors as ``(out, in)``, and norms, in the dtypes that :meth:`stored` gives them."""
        left, right = (torch_dtypes()[info.dtype] for info in (self.B, self.A))
        if self.embedding or self.flipped:
            left, right = right, left
        if self.magnitude is not None and magnitude is not None:
            magnitude = magnitude.to(torch_dtypes()[self.magnitude.dtype])
        return B.to(left), A.to(right), magnitude

    def alpha_for(self, rank: int) -> dict[str, Tensor]:
        """The stored α, if α is a tensor, that keeps s for another rank; else nothing."""
        import torch

        if self.alpha is None:
            return {}
        value = torch.full(self.alpha.shape, alpha_of(self.scale, rank), dtype=torch.float64)
        stored = value.to(torch_dtypes()[self.alpha.dtype])
        # an integer dtype, or half precision, may not hold it exactly
        return {self.alpha.name: stored if torch.equal(stored.double(), value) else value.float()}
