"""The tensors of one comparison, as matrices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor

from bulkedge._linmap import Dense, Difference, LinearMap, LowRank, RowScaled, Sum, Widened
from bulkedge.update import UpdateSVD, update_svd

from .plan import Comparison

TILE = 1024  # rows that are widened at a time
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bfloat16


@dataclass(frozen=True)
class Pair:
    """A base matrix and its update as ``(out, in)``, full tensors in the dtype they are stored in.

    Attributes:
        base: W0.
        replaced: The full tensor that stands in its place, if any.
        factors: The low-rank update on top, if any, in float64.
        magnitude: The norms of the tuned rows, if they were trained apart (DoRA), in float64.
        columns: Whether they are norms of columns: those of an embedding.
    """

    base: Tensor
    replaced: Tensor | None
    factors: LowRank | None
    magnitude: Tensor | None = None
    columns: bool = False

    def base_map(self, dtype: torch.dtype) -> LinearMap:
        """W0 with products in ``dtype``; never a second whole copy."""
        return _map(self.base, dtype)

    def tuned_map(self, dtype: torch.dtype) -> LinearMap:
        """``W = D ((replaced or base) + s·B·A)`` with products in ``dtype``, not formed."""
        dense = _map(self.start, dtype)
        if self.factors is None:
            return dense
        return self._scaled(Sum([dense, _converted(self.factors, dtype)]), self.row_factors)

    def update_map(self, dtype: torch.dtype = torch.float64) -> LinearMap | None:
        """``W − W0`` with products in ``dtype``, not formed; None without a difference."""
        # a fine-tune may change a weight by less than single precision resolves in its products
        terms: list[LinearMap] = []
        if self.factors is not None:
            terms.append(self._scaled(_converted(self.factors, dtype), self.row_factors))
        if self.replaced is not None:
            terms.append(Difference(self.replaced, self.base, dtype))
        if self.row_factors is not None:
            terms.append(self._scaled(_map(self.start, dtype), self.row_factors - 1))
        return Sum(terms) if len(terms) > 1 else next(iter(terms), None)

    @property
    def low_rank(self) -> LowRank | None:
        """The whole update where it is a product of stored factors, in float64."""
        return self.factors if self.replaced is None and self.magnitude is None else None

    @cached_property
    def spikes(self) -> UpdateSVD | None:
        """Its thin SVD: the spikes and their vectors."""
        update = self.low_rank
        if update is None:
            return None
        return update_svd(update.B, update.A, update.scale, update.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that was read, under the names of a message."""
        parts = {"base": self.base, "tuned": self.replaced, "magnitude": self.magnitude}
        parts["magnitude over norm"] = self.row_factors
        if self.factors:
            parts |= {"A": self.factors.A, "B": self.factors.B}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def seed(self, number: int) -> int:
        """A number that depends on every bit of the update, and on a number.

        Args:
            number: Another makes another seed.

        Returns:
            In ``[0, 2⁶³)``.
        """
        digest = hashlib.sha256(str(number).encode())
        parts: list[Tensor | None] = [self.replaced, self.magnitude]
        if self.factors is not None:
            parts += [self.factors.A, self.factors.B]
        for part in parts:
            if part is not None:
                bits = part.detach().cpu().view(BITS[part.element_size()]).numpy()
                digest.update(numpy.ascontiguousarray(bits).data)
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    @property
    def start(self) -> Tensor:
        """What the low-rank update is added to."""
        return self.base if self.replaced is None else self.replaced

    @cached_property
    def row_factors(self) -> Tensor | None:
        """The diagonal of D, ``magnitude / ‖rows‖``, in float64; None where D = I."""
        if self.magnitude is None or self.factors is None:
            return None
        return self.magnitude / row_norms(self.start, self.factors, self.columns)

    def _scaled(self, inner: LinearMap, factors: Tensor | None) -> LinearMap:
        """``D W`` for the factors on the diagonal of D, ``W D`` for an embedding; W for None."""
        if factors is None:
            return inner
        factors = factors.to(inner.dtype)
        return RowScaled(inner.T, factors).T if self.columns else RowScaled(inner, factors)


def load(comparison: Comparison, device: torch.device) -> Pair:
    """Read the tensors of one comparison.

    Args:
        comparison: What to read.
        device: Where to put it.

    Returns:
        The pair.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    base = comparison.base.read().to(device)
    replaced = comparison.tuned.read().to(device) if comparison.tuned else None
    if replaced is not None and torch.equal(replaced, base):
        replaced = None  # PEFT stores the base of an adapted embedding once more
    stored = comparison.factors
    if stored is None:
        return Pair(base, replaced, None)
    B, A, scale = stored.read()
    magnitude = stored.read_magnitude()
    return Pair(
        base,
        replaced,
        LowRank(B.to(device), A.to(device), scale),
        None if magnitude is None else magnitude.to(device),
        stored.embedding,
    )


def row_norms(start: Tensor, update: LowRank, columns: bool) -> Tensor:
    """The norms of the rows of a sum, in float64, that is not formed.

    Args:
        start: Shape ``(m, n)``, any dtype.
        update: What is added to it, in float64.
        columns: Whether those of the columns are meant.

    Returns:
        Shape ``(m,)``, or ``(n,)``.
    """
    B, A = update.scale * update.B, update.A
    if columns:
        start, B, A = start.mT, A.mT, B.mT
    tiles = zip(start.split(TILE), B.split(TILE), strict=True)
    return torch.cat([torch.linalg.vector_norm(W.double() + b @ A, dim=1) for W, b in tiles])


def _converted(factors: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(factors.B.to(dtype), factors.A.to(dtype), factors.scale)


def _map(matrix: Tensor, dtype: torch.dtype) -> LinearMap:
    """The matrix with products in ``dtype``, widened in tiles where it is stored in another."""
    return Dense(matrix) if matrix.dtype == dtype else Widened(matrix, dtype)
