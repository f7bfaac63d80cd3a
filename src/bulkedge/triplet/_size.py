"""The power of two by which a matrix is divided, so that solvers see numbers of order one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap, image_exponent, times_power

from .solver._start import generic

LARGEST_DIVISOR = 2.0**1000
"""A matrix is divided by no larger number, and by none smaller than one over it: both are finite,
and what is left has squares that are finite, too."""

NEAR_ONE = 7
"""A norm between 2⁻⁷ and 2⁷ is of order one.  Refinement in float32 squares products of a matrix
and a residual of 10⁻⁷ of it: at 2⁻¹⁹ they underflow."""


def size_of(A: LinearMap) -> float:
    """A power of two; of A over it no square in a norm under- or overflows."""
    probe = generic(A.shape[1], 1, torch.empty(0, dtype=A.dtype, device=A.device))
    exponent = image_exponent(A, probe)
    if exponent is None:
        return 1.0
    largest = exponent - 1 + math.log2(A.shape[1]) / 2  # within a factor of two
    return 1.0 if abs(largest) < NEAR_ONE else _divisor_of(round(largest))


def divisor(x: float) -> float:
    """The power of two to divide a matrix of norm x by."""
    return _divisor_of(math.frexp(x)[1] - 1) if x else 1.0


def _divisor_of(exponent: int) -> float:
    """``2^exponent``, within :data:`LARGEST_DIVISOR` and one over it."""
    largest = exponent_of(LARGEST_DIVISOR)
    return 2.0 ** min(max(exponent, -largest), largest)


def power_of_two(x: float) -> float:
    """The largest power of two that is at most x, 1 for 0: dividing by it rounds nothing."""
    return 2.0 ** (math.frexp(x)[1] - 1) if x else 1.0


def times_power_of_two(x: Tensor, power: float) -> Tensor:
    """``power · x`` for a power of two, which alone may be beyond the numbers of the dtype."""
    return times_power(x, exponent_of(power))


def exponent_of(power: float) -> int:
    """That of a power of two."""
    return math.frexp(power)[1] - 1
