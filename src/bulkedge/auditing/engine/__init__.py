"""Where rows are computed: this process, several of this machine's, or a cluster's.

What travels are paths and names, never tensors; a row is the same wherever it is computed, but for
what the rounding of another kind of processor changes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from bulkedge.comparison.plan import Comparison
from bulkedge.records.recipe import Recipe
from bulkedge.records.rows import Matrix

from .local import LocalEngine
from .ray import RayEngine

__all__ = ["Engine", "LocalEngine", "RayEngine"]


class Engine(Protocol):
    """A way to compute rows."""

    @property
    def name(self) -> str:
        """Its name in the record."""
        ...

    @property
    def jobs(self) -> int | None:
        """Worker processes; None where a cluster decides."""
        ...

    def check(self, recipe: Recipe) -> None:
        """Raise ``InputError`` where a recipe cannot be computed here, before the first matrix."""
        ...

    def rows(
        self, comparisons: Sequence[Comparison], recipe: Recipe
    ) -> Generator[tuple[int, Matrix]]:
        """``(position, row)`` as rows are finished; closing the iterator ends the work at once."""
        ...
