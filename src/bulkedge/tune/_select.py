"""Layers and matrices selected by patterns of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from bulkedge._errors import InputError
from bulkedge._globs import as_globs, check_globs, matches
from bulkedge.moments._watched import plain_name

LAYERS = ("layer that can be held or watched", "print the names with model.named_modules()")
"""What error messages call the candidates, and how to list their names."""

T = TypeVar("T")


def members(given: object, *methods: str) -> list[Any]:
    """The matrices of a sequence that is given in place of a model.

    Args:
        given: What the caller gives.
        methods: What each of them must have one of, besides a name.

    Returns:
        The matrices.

    Raises:
        InputError: If it is no sequence, or one of its members is no such matrix.
    """
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else None
    odd = [x for x in found or () if not any(_has(x, method) for method in methods)]
    if found is None or odd:
        got = f"a {type(given).__name__}" + (f" with a {type(odd[0]).__name__}" if odd else "")
        raise InputError(
            "expected a model that PEFT has wrapped, or a list of matrices with "
            f"{methods[0]}(), got {got}; AdaptedMatrix is such a matrix"
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
    names = [names_of(name(one)) for one in known]
    if known:
        check_globs((*wanted, *unwanted), [x for both in names for x in both], *LAYERS)
    return [
        one
        for one, both in zip(known, names, strict=True)
        if matches(both, wanted) and not matches(both, unwanted)
    ]


def names_of(name: str) -> tuple[str, str]:
    """The names by which patterns may choose a matrix: its own, and that of an audit.

    Args:
        name: Such as ``base_model.model.encoder.0.query``.

    Returns:
        The name itself, and ``encoder.0.query.weight``.
    """
    plain = plain_name(name.removesuffix(".weight"))
    return name, plain if plain.endswith("]") else f"{plain}.weight"
