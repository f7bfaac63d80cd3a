"""The columns of a table of matrices: for a terminal, Markdown, CSV, Parquet and the page.

Every view takes its columns from this list, in its order: a new column has one entry here.  A row
begins with the name of its matrix, which each view writes in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bulkedge._errors import InputError
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Matrix
from bulkedge.records.rows import CriticalScale

from .verdicts import APPEARANCE, REPORTED

TERMINAL, MARKDOWN, CSV, PAGE = "terminal", "markdown", "csv", "page"
"""The views; a Parquet file has the columns of a CSV."""
TABLES = frozenset({TERMINAL, MARKDOWN, PAGE})
EVERYWHERE = TABLES | {CSV}
TOO_LONG = 1e6
"""From here on a number is shown by its power of ten."""
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
        optional: Whether a table has it only where it is asked for by its name.
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
    optional: bool = False


def number(
    name: str, heading: str, value: Callable[[Matrix], float | None], digits: int, **look: Any
) -> Column:
    """A column of numbers with so many digits after the point."""

    def show(matrix: Matrix) -> str:
        found = value(matrix)
        if found is None:
            return NOTHING
        if found >= TOO_LONG and not math.isinf(found):
            return f"{found:.3g}"
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
    """How many directions of a matrix have a verdict; what is new is shown everywhere."""
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


def over_top_k_threshold(matrix: Matrix) -> float | None:
    """Strength of the update, in units of θ_k: beyond 1 it is among the leading directions."""
    return ratio(matrix.spectral_norm_update, matrix.top_k_threshold)


def over_threshold(matrix: Matrix) -> float | None:
    """Strength of the update, in units of θ_c: beyond 1 it makes an outlier."""
    return ratio(matrix.spectral_norm_update, matrix.threshold)


def critical_scale(matrix: Matrix) -> float | None:
    """The critical scale of the update: the low end of the bracket, else what is expected."""
    found = matrix.critical_scale
    if found is None:
        return None
    return found.expected if found.low is None else found.low


def told_scale(found: CriticalScale | None) -> str:
    """A critical scale: both ends of the bracket, else the number that is expected."""
    if found is None or (found.low is None and found.expected is None):
        return NOTHING
    if found.low is None:
        return f"{found.expected:.2f}"
    return f"> {found.low:.3g}" if found.high is None else f"{found.low:.3g}–{found.high:.3g}"


def of_scale(part: str) -> Column:
    """A part of the critical scale, for other programs."""
    return number(
        f"critical_{part}",
        f"critical scale, {part}",
        lambda matrix: getattr(matrix.critical_scale, part, None),
        digits=3,
        views=frozenset({CSV}),
    )


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
    number("over_top_k_threshold", "ΔW/θ_k", over_top_k_threshold, 2, views=EVERYWHERE, wide=True),
    number(
        "over_threshold", "ΔW/θ_c", over_threshold, 2, views=EVERYWHERE, optional=True, wide=True
    ),
    Column(
        "critical_scale",
        "critical scale",
        critical_scale,
        lambda matrix: told_scale(matrix.critical_scale),
        views=frozenset({MARKDOWN, PAGE}),
        short="scale",
        low_first=True,
        wide=True,
    ),
    *map(of_scale, ("expected", "low", "high")),
    number(
        "energy_new", "energy of new", lambda m: m.energy_new, 2, views=EVERYWHERE, optional=True
    ),
    number("in_use", "rank in use", lambda m: m.in_use, 0, views=EVERYWHERE, optional=True),
    number(
        "effective_rank",
        "effective rank",
        lambda m: m.effective_rank,
        1,
        views=EVERYWHERE,
        optional=True,
    ),
    number(
        "stable_rank", "stable rank", lambda m: m.stable_rank, 1, views=EVERYWHERE, optional=True
    ),
    number(
        "beyond_top_k_threshold",
        "spikes > θ_k",
        lambda m: m.beyond_top_k_threshold,
        0,
        views=EVERYWHERE,
        optional=True,
    ),
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
    field("top_k_threshold"),
    field("note"),
    field("drift_note"),
)
"""Every column but the name of the matrix, from left to right."""
CHOICES = tuple(c.name for c in COLUMNS if c.optional or 0 < len(TABLES & c.views) < len(TABLES))
"""The columns that not every table has, which it has where they are asked for."""


def columns_of(view: str, *, moments: bool = True, chosen: Sequence[str] = ()) -> list[Column]:
    """The columns of one view.

    Args:
        view: Which.
        moments: Whether the audit had moments; without, columns that need them are left out.
        chosen: Names of columns that a table has besides its usual ones.

    Returns:
        The columns, from left to right.

    Raises:
        InputError: If there is no column of a chosen name.
    """
    if unknown := [name for name in chosen if name not in CHOICES]:
        raise InputError(f"expected columns of {', '.join(CHOICES)}, got {unknown[0]!r:.40}")
    return [c for c in COLUMNS if _is_shown(c, view, moments=moments, chosen=chosen)]


def _is_shown(column: Column, view: str, *, moments: bool, chosen: Sequence[str]) -> bool:
    """Whether a view has a column."""
    if column.of_moments and not moments:
        return False
    if view in TABLES and column.name in chosen:
        return True
    return view in column.views and (view == CSV or not column.optional)
