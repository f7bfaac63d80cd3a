"""Numbers, NumPy arrays or torch tensors in, the same out; float64 tensors in between."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bulkedge._errors import InputError

Array = float | complex | Sequence[Any] | np.ndarray | Tensor
"""What the laws take: a number, a list, a NumPy array, a torch tensor."""


def enter(x: Array) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """``x`` as a tensor in float64 or complex128, and the way back of an answer to the kind of x.

    A tensor goes back to a tensor of its device and precision (float64 for integers); anything
    else to a NumPy array, or to a Python number if it has no dimensions.  Gradients pass.

    Args:
        x: Any shape.

    Returns:
        The tensor, and a function of the answer, real or complex, of any shape.

    Raises:
        InputError: If x does not hold numbers.

    Example:
        >>> x, leave = enter([1, 2])
        >>> leave(x / 2)
        array([0.5, 1. ])
    """
    if isinstance(x, Tensor):
        precision = torch.empty((), dtype=x.dtype).real.dtype
        precision = precision if precision.is_floating_point else torch.float64
        return _widen(x), lambda y: _narrow(y, precision)
    try:
        array = np.asarray(x)
        array = array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected numbers, got {type(x).__name__}: {error}") from error
    return torch.from_numpy(array), _to_numpy


def elementwise(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Array], Any]:
    """A method on float64 (complex128) tensors, made to take and give what :func:`enter` does.

    Args:
        method: Of an object and one tensor.

    Returns:
        Of an object and one number, array or tensor.
    """

    @functools.wraps(method)
    def wrapped(self: Any, x: Array) -> Any:
        tensor, leave = enter(x)
        return leave(method(self, tensor))

    return wrapped


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _narrow(y: Tensor, precision: torch.dtype) -> Tensor:
    if y.dtype == torch.bool:
        return y
    return y.to(precision.to_complex() if y.is_complex() else precision)


def _to_numpy(y: Tensor) -> Any:
    return y.detach().cpu().numpy() if y.ndim else y.item()
