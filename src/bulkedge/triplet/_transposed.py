"""Maps whose two products do not belong to one matrix, as may happen to a map of the user's own."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap, innermost
from bulkedge._precision import exact

BEYOND_ROUNDING = 200
"""Products disagree by more than rounding from this on, in units of eps ‖A‖_F; ten is usual."""


def require_promised(A: LinearMap, residuals: Tensor, promised: float) -> None:
    """InputError if measured residuals contradict recurrences that take rmatmat for the transpose.

    Cost: none, unless it looks as if they did.

    Args:
        A: The map.
        residuals: As measured, shape ``(k,)``.
        promised: What the recurrences promise.
    """
    excess = float(residuals.max()) - promised
    require_agreement(A, excess, float(residuals.max()))


def require_agreement(A: LinearMap, difference: float, size: float) -> None:
    """InputError if the two products of a map differ by more than rounding.

    Args:
        A: The map.
        difference: Between two computations of the same numbers, one by each product.
        size: A lower bound on ‖A‖_F, with which it is seldom computed.

    Raises:
        not_transposed: An InputError, if so.
    """
    unit = BEYOND_ROUNDING * torch.finfo(A.dtype).eps
    if difference > unit * size and difference > unit * A.rounding_scale():
        raise not_transposed(A)


def require_transposed(A: LinearMap, u: Tensor, v: Tensor) -> None:
    """InputError unless ``uᵀ(A v) = (Aᵀu)ᵀv`` to rounding; two passes.

    Args:
        A: The map, shape ``(m, n)``.
        u: Unit vectors, shape ``(m, k)``.
        v: Unit vectors, shape ``(n, k)``.
    """
    one = exact(u).mT @ exact(A.matmat(v))
    other = exact(A.rmatmat(u)).mT @ exact(v)
    difference = float((one - other).abs().max())
    require_agreement(A, difference, float(one.abs().max()))


def not_transposed(A: LinearMap) -> InputError:
    """The error that names the map, without what solvers have put around it."""
    return InputError(
        f"expected rmatmat of {innermost(A)!r} to be the transpose of its matmat, got products "
        f"that disagree beyond the rounding of {A.dtype}; compare both with to_dense()"
    )
