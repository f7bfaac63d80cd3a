"""Layers and matrices selected by patterns of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from bulkedge._globs import as_globs, check_globs, matches

LAYERS = ("layer that can be held or watched", "print the names with model.named_modules()")
"""What error messages call the candidates, and how to list their names."""

T = TypeVar("T")


def select(
    patterns: str | Sequence[str], candidates: Iterable[T], name: Callable[[T], str]
) -> list[T]:
    """The candidates whose name matches a pattern.

    Args:
        patterns: One or several.
        candidates: What may be selected; if there are none, none are selected, without an error.
        name: Gives the name of a candidate.

    Returns:
        The selected candidates, in their order.

    Raises:
        RecipeError: If a pattern matches no candidate.
    """
    globs, known = as_globs(patterns), list(candidates)
    if known:
        check_globs(globs, [name(one) for one in known], *LAYERS)
    return [one for one in known if matches((name(one),), globs)]
