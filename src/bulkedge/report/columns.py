"""The columns of a table of matrices: for a terminal, Markdown, CSV, Parquet and the page.

Every view takes its columns from this list, in its order: a new column has one entry here.  A row
begins with the name of its matrix, which each view writes in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Matrix

from .verdicts import APPEARANCE, REPORTED

TERMINAL, MARKDOWN, CSV, PAGE = "terminal", "markdown", "csv", "page"
"""The views; a Parquet file has the columns of a CSV."""
TABLES = frozenset({TERMINAL, MARKDOWN, PAGE})
EVERYWHERE = TABLES | {CSV}
NOTHING = "–"
"""What a table shows where there is no value."""


@dataclass(frozen=True)
class Column:
    """A column of a table of matrices.

    Attributes:
        name: Its name in files for other programs.
        heading: Its heading for people.
        value: What a matrix has in it: a number, a text or None.  CSV has it as it is.
        show: The same as text.
        views: Which views have the column.
        short: Its heading in a terminal, where there is little room; ``heading`` if None.
        style: Style of a value that is not zero, as rich names it.
        low_first: Whether the low values are the interesting ones, when the page sorts by it.
        wide: Whether a page on a small screen leaves it out.
        if_any: Whether the page leaves it out where every value is zero.
        of_moments: Whether only an audit with moments has it; other programs always get it.
    """

    name: str
    heading: str
    value: Callable[[Matrix], Any]
    show: Callable[[Matrix], str]
    views: frozenset[str] = TABLES
    short: str | None = None
    style: str = ""
    low_first: bool = False
    wide: bool = False
    if_any: bool = False
    of_moments: bool = False


def number(
    name: str, heading: str, value: Callable[[Matrix], float | None], digits: int, **look: Any
) -> Column:
    """A column of numbers with so many digits after the point."""

    def show(matrix: Matrix) -> str:
        found = value(matrix)
        if found is None:
            return NOTHING
        return "∞" if math.isinf(found) else f"{found:.{digits}f}"

    return Column(name, heading, value, show, **look)


def field(name: str) -> Column:
    """A field of the record as it is, for other programs."""
    return Column(
        name,
        name,
        lambda matrix: getattr(matrix, name),
        lambda matrix: str(getattr(matrix, name)),
        views=frozenset({CSV}),
    )


def counts(verdict: Verdict) -> Column:
    """How many directions of a matrix have a verdict; the paper's count is shown everywhere."""
    counted = verdict in COUNTED
    return number(
        verdict.value,
        verdict.value,
        lambda matrix: sum(direction.verdict is verdict for direction in matrix.directions),
        digits=0,
        views=TABLES if counted else frozenset({PAGE}),
        style=APPEARANCE[verdict].style,
        if_any=not counted,
    )


def worst_score(matrix: Matrix) -> float | None:
    """The lowest score of a matrix; None where nothing was judged."""
    return min((direction.score for direction in matrix.directions), default=None)


def over_base(matrix: Matrix) -> float | None:
    """Strength of the update, in spectral norms of the base."""
    return ratio(matrix.spectral_norm_update, matrix.spectral_norm_base)


def over_threshold(matrix: Matrix) -> float | None:
    """Strength of the update, in thresholds θ_c."""
    return ratio(matrix.spectral_norm_update, matrix.threshold)


def drift_of(matrix: Matrix) -> float | None:
    """What part of the mean square of the outputs the update changes."""
    return matrix.drift


def told_drift(drift: float | None) -> str:
    """A drift in three digits: it may be of any order."""
    return NOTHING if drift is None else f"{drift:.3g}"


def ratio(update: float | None, unit: float | None) -> float | None:
    """A strength in some unit; infinite where that is zero, None where one is unknown."""
    if update is None or unit is None:
        return None
    return update / unit if unit else math.inf


COLUMNS = (
    field("tuned_name"),
    field("status"),
    Column(
        "shape",
        "shape",
        lambda matrix: math.prod(matrix.shape),
        lambda matrix: " × ".join(map(str, matrix.shape)),
        views=frozenset({PAGE}),
        wide=True,
    ),
    number("ratio", "ΔW/W₀", over_base, 2, views=frozenset({TERMINAL, PAGE}), wide=True),
    number("over", "ΔW/θ_c", over_threshold, 2),
    *map(counts, REPORTED),
    number("worst", "worst score", worst_score, 3, short="worst", low_first=True),
    Column(
        "drift",
        "drift",
        drift_of,
        lambda matrix: told_drift(matrix.drift),
        views=EVERYWHERE,
        of_moments=True,
    ),
    field("spectral_norm_base"),
    field("spectral_norm_update"),
    field("threshold"),
    field("note"),
    field("drift_note"),
)
"""Every column but the name of the matrix, from left to right."""


def columns_of(view: str, *, moments: bool = True) -> list[Column]:
    """The columns of one view; without moments, those that need none."""
    return [c for c in COLUMNS if view in c.views and (moments or not c.of_moments)]
