"""A record for those who work in Python: a few lines, a notebook's table, a data frame."""

from __future__ import annotations

import html
from typing import Any, Protocol

from bulkedge._errors import InputError, count, printable
from bulkedge._verdict import COUNTED, Verdict

from .frame import data_frame
from .recipe import Recipe
from .row import Row
from .rows import Bulk, CriticalScale, Direction, Matrix

MOST_SHOWN = 10
"""So many matrices a notebook shows, the worst first."""
LISTS = ("shape", "directions", "angles", "spectrum", "predicted", "drift_parts", "scale_curve")
"""The fields of a matrix that hold many values; a data frame leaves them out."""
PARTS: dict[str, type[Row]] = {"bulk": Bulk, "critical_scale": CriticalScale}
"""The fields that hold a few single values; a data frame has a column ``bulk_edge`` for each."""


class Audited(Protocol):
    """What a view or a comparison needs of a record."""

    @property
    def inputs(self) -> Any:
        """What was compared."""
        ...

    @property
    def recipe(self) -> Recipe:
        """The settings."""
        ...

    @property
    def summary(self) -> Any:
        """The counts."""
        ...

    @property
    def matrices(self) -> list[Matrix]:
        """One row per matrix."""
        ...


def summary_of(record: Audited) -> str:
    """What a record says, in three lines.

    Args:
        record: An audit.

    Returns:
        What was found, of what, and how to see more.
    """
    inputs, recipe = record.inputs, record.recipe
    return (
        f"{found_in(record)}\n"
        f"  {printable(inputs.tuned.path)} against {printable(inputs.base.path)}: "
        f"top_k={recipe.top_k}, epsilon={recipe.epsilon:g}, side={recipe.side}\n"
        "  see .summary, .matrices, .to_pandas(), .compare(other), .to_json()"
    )


def found_in(record: Audited) -> str:
    """The counts of a record, in a sentence without a full stop.

    Args:
        record: An audit.

    Returns:
        How many new directions there are, and what was not judged.
    """
    summary = record.summary
    affected = sum(matrix.new_directions > 0 for matrix in record.matrices)
    counts = ", ".join(f"{summary.verdicts[verdict]} {verdict.value}" for verdict in COUNTED)
    judged = sum(summary.verdicts.values())
    audited = count(summary.audited, "audited matrix", "audited matrices")
    line = (
        f"{summary.new_directions} new of {count(judged, 'leading direction')}"
        f" ({counts}), in {affected} of {audited}"
    )
    for number, what in (
        (summary.verdicts[Verdict.UNDECIDED], "undecided"),
        (summary.not_audited, "not audited"),
        (summary.lost, "lost"),
    ):
        line += f"; {number} {what}" if number else ""
    return line


def as_html(record: Audited) -> str:
    """The same with its worst matrices, for a notebook.

    Args:
        record: An audit.

    Returns:
        HTML without scripts.
    """
    first, second, _ = summary_of(record).splitlines()
    worst = sorted((m for m in record.matrices if m.new_directions), key=_worst)
    rows = "".join(_html_row(matrix) for matrix in worst[:MOST_SHOWN])
    heads = "".join(f"<th>{head}</th>" for head in ("matrix", *_counted(), "worst score"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    rest = len(worst) - MOST_SHOWN
    more = f"<p>and {count(rest, 'more matrix', 'more matrices')}</p>" if rest > 0 else ""
    return f"<p><b>{_escaped(first)}</b><br>{_escaped(second.strip())}</p>{table}{more}"


def _html_row(matrix: Matrix) -> str:
    """A matrix as a row of a notebook's table."""
    name = _escaped(printable(matrix.name.removesuffix(".weight")))
    found = [sum(d.verdict is verdict for d in matrix.directions) for verdict in COUNTED]
    cells = "".join(f"<td>{cell}</td>" for cell in (*found, f"{_worst(matrix):.3f}"))
    return f"<tr><th>{name}</th>{cells}</tr>"


def _counted() -> list[str]:
    return [verdict.value for verdict in COUNTED]


def _escaped(text: str) -> str:
    return html.escape(text)


def _worst(matrix: Matrix) -> float:
    """The lowest score; 1 where nothing was judged."""
    return min((row.score for row in matrix.directions), default=1.0)


def as_frame(record: Audited, rows: str) -> Any:
    """One row per matrix, or one per direction.

    Args:
        record: An audit.
        rows: ``"matrices"`` or ``"directions"``.

    Returns:
        A ``pandas.DataFrame``.

    Raises:
        InputError: If ``rows`` is neither.
        MissingExtraError: Without pandas.
    """
    if rows not in ("matrices", "directions"):
        raise InputError(f"expected rows 'matrices' or 'directions', got {rows!r:.40}")
    if rows == "directions":
        found = [_direction(matrix, row) for matrix in record.matrices for row in matrix.directions]
        columns = ["matrix", *Direction.model_fields]
    else:
        found = [_flat(matrix) for matrix in record.matrices]
        columns = list(_flat(Matrix.model_construct(shape=(1, 1), directions=[])))
    return data_frame(found, columns)


def _direction(matrix: Matrix, row: Direction) -> dict[str, Any]:
    """A direction with the name of its matrix."""
    return {"matrix": matrix.name, **row.model_dump(mode="json")}


def _flat(matrix: Matrix) -> dict[str, Any]:
    """The single values of a matrix, and what its directions amount to."""
    fields = (name for name in Matrix.model_fields if name not in (*LISTS, *PARTS))
    scores = [row.score for row in matrix.directions]
    return {
        **{name: getattr(matrix, name, None) for name in fields},
        **{
            f"{part}_{name}": getattr(getattr(matrix, part, None), name, None)
            for part, kind in PARTS.items()
            for name in kind.model_fields
        },
        "rows": matrix.shape[0],
        "columns": matrix.shape[1],
        **{v.value: sum(row.verdict is v for row in matrix.directions) for v in Verdict},
        "worst_score": min(scores) if scores else None,
    }
