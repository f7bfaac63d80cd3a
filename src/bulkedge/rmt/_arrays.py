"""Numbers, NumPy arrays or torch tensors in, the same out; float64 tensors in between."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bulkedge._errors import InputError
from bulkedge._fields import as_real, as_whole
from bulkedge._guard import finite

Array = float | complex | Sequence[Any] | np.ndarray | Tensor
"""What the laws take: a number, a list, a NumPy array, a torch tensor."""
MIN_SLACK = 1e-14
"""The least relative slack that :func:`slack` allows."""
NUMERIC = "biufcO"
"""Kinds of NumPy dtypes that may hold numbers; an object that holds none fails in the cast."""


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
        wide = array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"expected numbers, got {type(x).__name__}: {error}") from error
    if array.dtype.kind not in NUMERIC:  # NumPy reads text and dates as numbers
        raise InputError(f"expected numbers, got {type(x).__name__}: dtype {array.dtype}")
    return torch.from_numpy(wide), _to_numpy


def enter_real(x: Array) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """:func:`enter` for what has no meaning off the real line.

    Args:
        x: Any shape.

    Returns:
        As :func:`enter`.

    Raises:
        InputError: If x does not hold numbers, or complex ones.
    """
    tensor, leave = enter(x)
    if tensor.is_complex():
        raise InputError("expected real numbers, got complex ones; pass x.real if they are real")
    return tensor, leave


def enter_finite(x: Array, *, complex: bool = False) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """:func:`enter_real`, or :func:`enter`, for what has no meaning at infinity.

    Args:
        x: Any shape.
        complex: Whether complex numbers are allowed.

    Returns:
        As :func:`enter`.

    Raises:
        InputError: If x does not hold numbers, or NaN, or infinities.
    """
    tensor, leave = enter(x) if complex else enter_real(x)
    return finite("the numbers given", tensor), leave


def real(x: Any) -> float:
    """One real number of Python, NumPy or torch, as a float.

    Args:
        x: Anything.

    Returns:
        The number, or NaN if it is not a number.

    Example:
        >>> real(torch.tensor(0.5)), real(np.int64(2)), real("2")
        (0.5, 2.0, nan)
    """
    number = as_real(x)
    return float("nan") if number is None else number


def count(name: str, x: Any, low: int, high: int | None = None) -> int:
    """A whole number of Python, NumPy or torch, as an int.

    Args:
        name: What a message calls it.
        x: What the caller gave.
        low: The least that is allowed.
        high: The most; None for no limit.

    Returns:
        The number.

    Raises:
        InputError: If it is not a whole number, or outside the limits.
    """
    number = as_whole(x)
    if number is None or number < low or (high is not None and number > high):
        limits = f"≥ {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"expected {name} {limits}, got {x!r}; give a whole number")
    return number


def slack(x: Array) -> float:
    """How far rounding to the kind of x may put a number beside a limit, relatively.

    Args:
        x: Any shape.

    Returns:
        Twice the spacing of its numbers, 1e-14 at least.
    """
    if isinstance(x, Tensor):
        dtype = x.dtype if x.dtype.is_floating_point else torch.float64
        return max(MIN_SLACK, 2 * torch.finfo(dtype).eps)
    dtype = np.asarray(x).dtype
    return max(MIN_SLACK, 2 * float(np.finfo(dtype if dtype.kind == "f" else float).eps))


def plain(x: Tensor) -> np.ndarray | None:
    """The numbers of a tensor, for NumPy, whose calls on few numbers cost a tenth of torch's.

    Args:
        x: Any shape.

    Returns:
        The same memory; None where torch has to see what is computed: on another device, for a
        derivative, inside a transform.

    Example:
        >>> plain(torch.ones(2, requires_grad=True)) is None, plain(torch.ones(2))
        (True, array([1., 1.], dtype=float32))
    """
    derived = x.requires_grad and torch.is_grad_enabled()
    if derived or type(x) is not Tensor or x.device.type != "cpu":
        return None
    transforms = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transforms or torch.compiler.is_compiling():
        return None
    return x.detach().numpy()


def elementwise(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Array], Any]:
    """A method on float64 tensors, made to take and give what :func:`enter_real` does.

    Args:
        method: Of an object and one tensor.

    Returns:
        Of an object and one number, array or tensor.
    """
    return _wrapped(method, enter_real)


def analytic(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Array], Any]:
    """The same for a method on complex128 tensors as well.

    Args:
        method: Of an object and one tensor.

    Returns:
        Of an object and one number, array or tensor.
    """
    return _wrapped(method, enter)


def _wrapped(
    method: Callable[[Any, Tensor], Tensor],
    enter: Callable[[Array], tuple[Tensor, Callable[[Tensor], Any]]],
) -> Callable[[Any, Array], Any]:
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
