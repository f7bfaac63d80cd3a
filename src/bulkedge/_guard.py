"""What every public function asks of the numbers it is given, and the precision it works in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ._errors import InputError
from ._precision import full_precision

P = ParamSpec("P")
R = TypeVar("R")


def precise(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose products are taken in the precision of their dtype.

    Whatever the caller asked of torch: autocast, TF32, bfloat16 for float32.

    Args:
        function: Of tensors, or of objects with a ``device``; the first one's counts.

    Returns:
        The same function.
    """

    @functools.wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (getattr(x, "device", None) for x in (*args, *kwargs.values()))
        device = next((x for x in given if x is not None), torch.device("cpu"))
        with full_precision(device):
            return function(*args, **kwargs)

    return within


def matrix(name: str, x: Tensor, dims: int | None = 2) -> Tensor:
    """A real tensor with finite floating-point entries, at least one of them.

    Args:
        name: What a message calls it.
        x: What the caller gave.
        dims: How many dimensions it must have; None for two or more.

    Returns:
        x.

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(x, Tensor):
        raise InputError(
            f"expected {name} to be a torch tensor, got {type(x).__name__}; torch.as_tensor "
            "converts arrays and lists"
        )
    wanted = "two or more dimensions" if dims is None else f"{dims} dimension{'s'[: dims - 1]}"
    fits = x.ndim >= 2 if dims is None else x.ndim == dims
    if not fits or x.numel() == 0 or not x.is_floating_point():
        raise InputError(
            f"expected {name} of {wanted} with real floating-point entries, got shape "
            f"{tuple(x.shape)} of {x.dtype}; reshape or convert it"
        )
    require_strided(name, x)
    return finite(name, x)


def require_strided(name: str, x: Tensor) -> None:
    """InputError for a sparse tensor.

    Args:
        name: What a message calls it.
        x: What the caller gave.

    Raises:
        InputError: If it is not dense.
    """
    if x.layout is not torch.strided:
        raise InputError(
            f"expected {name} as a dense tensor, got {x.layout}; to_dense() converts it.  Where it "
            "is too large for that, write its products as a LinearMap: the page "
            "docs/triplets.md has one for sparse matrices"
        )


def finite(name: str, x: Tensor) -> Tensor:
    """A tensor without NaN and infinities, as far as its entries can be looked at.

    Args:
        name: What a message calls it.
        x: Any shape and dtype.

    Returns:
        x.

    Raises:
        InputError: If an entry is not finite.
    """
    if not torch.compiler.is_compiling() and not all_finite(x):
        raise InputError(
            f"expected finite entries, got NaN or Inf in {name}; look for what made them, or leave "
            "it out"
        )
    return x


def all_finite(x: Tensor) -> bool:
    """Whether they are; True inside vmap, where nothing can be looked at."""
    try:
        return bool(torch.isfinite(x).all())
    except RuntimeError:
        return True
