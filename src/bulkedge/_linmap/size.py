"""How large the products of a map are, and what is wrong where they are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._guard import all_finite

from .base import LinearMap
from .counted import Counted
from .dense import Dense
from .scaled import Scaled, lift
from .sums import Adjoint


def image_exponent(A: LinearMap, x: Tensor) -> int | None:
    """How large a product is, also where its numbers are beyond those of the dtype.

    Args:
        A: The map, shape ``(m, n)``.
        x: A unit or Gaussian vector, shape ``(n, 1)``.

    Returns:
        The e with ``2ᵉ⁻¹ ≤ max |A x| < 2ᵉ``; None where the product is zero.

    Raises:
        not_finite: An InputError, if it is not finite.
    """
    limits, shift = torch.finfo(A.dtype), 0
    largest = float(A.matmat(x).abs().max())
    if not math.isfinite(largest):  # NaN, too: of two infinities
        shift = math.frexp(lift(A.dtype))[1] - 1
    elif largest < 2 * limits.tiny**0.5:  # the product itself may have underflowed
        shift = 1 - math.frexp(lift(A.dtype))[1]
    if shift:
        largest = float(A.matmat(x * 2.0**-shift).abs().max())
    if not math.isfinite(largest):
        raise not_finite(A)
    return math.frexp(largest)[1] + shift if largest else None


def not_finite(A: LinearMap) -> InputError:
    """The error for a map with products that are not finite: its entries, or numbers too large.

    Args:
        A: The map, whatever solvers have put around it.

    Returns:
        What was expected, what was found, and what to do.
    """
    A = innermost(A)
    bad = [i for i, tensor in enumerate(A.tensors) if not all_finite(tensor)]
    if bad:
        where = "the matrix" if isinstance(A, Dense) else f"tensors[{bad[0]}] of {A!r}"
        return InputError(
            f"expected finite entries, got NaN or Inf in {where}; look for what made them"
        )
    told = f"expected finite products, got NaN or Inf from {A!r}, whose tensors are finite"
    if isinstance(A, Dense):
        return InputError(f"{told}: they are too large for {A.dtype}; {remedy(A.dtype)}")
    return InputError(
        f"{told}; if they are too large for {A.dtype}, {remedy(A.dtype)}, else look at its matmat "
        "and rmatmat"
    )


def innermost(A: LinearMap) -> LinearMap:
    """The map that a person has made, without what solvers have put around it."""
    while isinstance(A, (Adjoint, Counted, Scaled)):
        A = A.inner
    return A


def remedy(dtype: torch.dtype) -> str:
    """What helps where the numbers of a dtype are not large enough."""
    divide = "divide the matrix by a large number"
    return divide if dtype is torch.float64 else f"convert it to float64, or {divide}"
