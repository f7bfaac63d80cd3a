"""Layers and matrices selected by patterns of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from bulkedge._errors import InputError
from bulkedge._globs import as_globs, check_globs, matches

LAYERS = ("layer that can be held or watched", "print the names with model.named_modules()")
"""What error messages call the candidates, and how to list their names."""

T = TypeVar("T")


def members(given: object, method: str) -> list[Any]:
    """The matrices of a sequence that is given in place of a model.

    Args:
        given: What the caller gives.
        method: What each of them must have, besides a name.

    Returns:
        The matrices.

    Raises:
        InputError: If it is no sequence, or one of its members is no such matrix.
    """
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else None
    odd = [x for x in found or () if not _has(x, method)]
    if found is None or odd:
        got = f"a {type(given).__name__}" + (f" with a {type(odd[0]).__name__}" if odd else "")
        raise InputError(
            f"expected a model that PEFT has wrapped, or a list of matrices with {method}(), got "
            f"{got}; AdaptedMatrix is such a matrix"
        )
    return found


def _has(x: object, method: str) -> bool:
    """Whether it has a name, and a method."""
    return hasattr(x, "name") and callable(getattr(x, method, None))


def select(
    candidates: Iterable[T],
    name: Callable[[T], str],
    include: str | Sequence[str],
    exclude: str | Sequence[str],
) -> list[T]:
    """The candidates whose name matches a pattern, without those that another one leaves out.

    Args:
        candidates: What may be selected; if there are none, none are selected, without an error.
        name: Gives the name of a candidate.
        include: One pattern or several.
        exclude: One pattern or several, of what is left out again.

    Returns:
        The selected candidates, in their order.

    Raises:
        RecipeError: If a pattern matches no candidate.
    """
    wanted, unwanted, known = as_globs(include), as_globs(exclude), list(candidates)
    if known:
        check_globs((*wanted, *unwanted), [name(one) for one in known], *LAYERS)
    return [
        one
        for one in known
        if matches((name(one),), wanted) and not matches((name(one),), unwanted)
    ]
