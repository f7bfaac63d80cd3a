"""Layers and matrices chosen by patterns of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from bulkedge._globs import as_globs, check_globs, matches

LAYERS = ("layer that can be held or watched", "print the names with model.named_modules()")
"""What patterns are matched with, for messages."""

T = TypeVar("T")


def chosen(
    patterns: str | Sequence[str], candidates: Iterable[T], name: Callable[[T], str]
) -> list[T]:
    """The candidates whose name a pattern matches.

    Args:
        patterns: One or several.
        candidates: What there is; nothing is chosen from nothing.
        name: The name of one.

    Returns:
        The chosen ones, in their order.

    Raises:
        RecipeError: If a pattern matches none.
    """
    globs, known = as_globs(patterns), list(candidates)
    if known:
        check_globs(globs, [name(one) for one in known], *LAYERS)
    return [one for one in known if matches((name(one),), globs)]
