"""The tensors of one comparison, as matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._linmap import Dense, LinearMap, LowRank, Scaled, Sum, Widened
from bulkedge.checkpoint import LoraFactors

from .plan import Comparison


@dataclass(frozen=True)
class Pair:
    """A base matrix and its update as ``(out, in)``, full tensors in the dtype they are stored in.

    Attributes:
        base: W0.
        replaced: The full tensor that stands in its place, if any.
        factors: The low-rank update on top, if any, in float64.
    """

    base: Tensor
    replaced: Tensor | None
    factors: LowRank | None

    def base_map(self, dtype: torch.dtype) -> LinearMap:
        """W0 with products in ``dtype``; never a second whole copy."""
        return _map(self.base, dtype)

    def tuned_map(self, dtype: torch.dtype) -> LinearMap:
        """``W = (replaced or base) + s·B·A`` with products in ``dtype``, not formed."""
        dense = _map(self.base if self.replaced is None else self.replaced, dtype)
        return Sum([dense, _converted(self.factors, dtype)]) if self.factors else dense

    def update_map(self, dtype: torch.dtype) -> LinearMap | None:
        """``W − W0`` with products in ``dtype``, not formed; None without a difference."""
        if self.replaced is None:
            return _converted(self.factors, dtype) if self.factors else None
        update: LinearMap = Sum([_map(self.replaced, dtype), Scaled(_map(self.base, dtype), -1.0)])
        return Sum([update, _converted(self.factors, dtype)]) if self.factors else update

    @property
    def low_rank(self) -> LowRank | None:
        """The whole update where it is a product of stored factors, in float64."""
        return self.factors if self.replaced is None else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that was read, under the names of a message."""
        parts = {"base": self.base, "tuned": self.replaced}
        if self.factors:
            parts |= {"A": self.factors.A, "B": self.factors.B}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}


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
    factors = _load_factors(comparison.factors, device) if comparison.factors else None
    return Pair(base, replaced, factors)


def _load_factors(factors: LoraFactors, device: torch.device) -> LowRank:
    """The factors as a map of the shape of the weight."""
    B, A, scale = factors.read()
    return LowRank(B.to(device), A.to(device), scale)


def _converted(factors: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(factors.B.to(dtype), factors.A.to(dtype), factors.scale)


def _map(matrix: Tensor, dtype: torch.dtype) -> LinearMap:
    """The matrix with products in ``dtype``, widened in tiles where it is stored in another."""
    return Dense(matrix) if matrix.dtype == dtype else Widened(matrix, dtype)
