"""The interval that a certificate returns, and the checks that every certificate makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap
from bulkedge.triplet._tracing import require_numbers


@dataclass(frozen=True)
class NormBound:
    """An interval that holds ‖A‖₂.

    Attributes:
        lower: At most ‖A‖₂.
        upper: At least ‖A‖₂, but for the ``failure``.
        failure: The probability, over the random start, that ‖A‖₂ exceeds ``upper``; 0 if proved.
        passes: How often A was read: products with A or Aᵀ, of one vector each but for a Gram
            matrix.
    """

    lower: float
    upper: float
    failure: float
    passes: int


class Certificate(Protocol):
    """A method that bounds ‖A‖₂ from above."""

    def bound(
        self, A: LinearMap, v: Tensor | None = None, generator: torch.Generator | None = None
    ) -> NormBound:
        """The interval; ``v``, shape ``(n,)``, is a guess of the leading right singular vector."""
        ...


def check(A: LinearMap, v: Tensor | None) -> None:
    """InputError if the map is empty or has no values, or if the guess does not fit."""
    if 0 in A.shape:
        raise InputError(f"expected a matrix with entries, got shape {A.shape}")
    if not torch.compiler.is_compiling():
        for tensor in A.tensors:
            require_numbers(tensor, "a certificate")
    if v is not None and (v.numel() != A.shape[1] or not bool(v.isfinite().all())):
        raise InputError(
            f"expected v finite and of shape ({A.shape[1]},), a right vector of a map of shape "
            f"{A.shape}; got shape {tuple(v.shape)}"
        )


def unscale(x: float, exponent: int, towards: float) -> float:
    """x·2ᵉ, rounded in the direction of ``towards``."""
    try:
        x = math.ldexp(x, exponent)
    except OverflowError:
        x = math.inf
    return math.nextafter(x, towards)
