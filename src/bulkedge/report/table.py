"""A record as a table for other programs: CSV, or Parquet.

Names come out of files that strangers made: a spreadsheet gets them as text, never as a formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from enum import Enum

from bulkedge._errors import MissingExtraError, install, printable
from bulkedge.records import Record
from bulkedge.records.rows import Direction

from .columns import CSV, columns_of

# what makes a cell a formula, also where tabs or full-width signs are taken for it
FORMULA_SIGNS = tuple("=+-@\t\r\n＝＋－＠")
LEADING = ("tuned_name", "status")
"""The columns of a matrix that stand before those of its directions."""
OF_DIRECTION = tuple(Direction.model_fields)


def to_csv(record: Record) -> str:
    """One row per direction; a matrix without any, and what is lost, has a row too.

    Such a matrix is unchanged, or could not be judged.

    Args:
        record: What to write.

    Returns:
        CSV with a header: ``matrix``, ``tuned_name``, ``status``, every field of a direction, then
        norms, threshold and note of its matrix.  ``status`` is the matrix's, or ``lost``.
    """
    text = io.StringIO()
    # quotes around all text: another program may take semicolons for the end of a cell
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(_names())
    for row in _rows(record):
        writer.writerow([cell(row.get(name)) for name in _names()])
    return text.getvalue()


def to_parquet(record: Record) -> bytes:
    """The same rows as :func:`to_csv`, in columns of their own types.

    Args:
        record: What to write.

    Returns:
        A Parquet file.

    Raises:
        MissingExtraError: Without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            f"expected pyarrow for Parquet, found none; {install('parquet')}"
        ) from None
    rows = list(_rows(record))
    columns = {name: [_plain(row.get(name)) for row in rows] for name in _names()}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _names() -> list[str]:
    """The header: a matrix, one of its directions, and more of the matrix."""
    of_matrix = [column.name for column in columns_of(CSV)]
    rest = [name for name in of_matrix if name not in LEADING]
    return ["matrix", *LEADING, *OF_DIRECTION, *rest]


def _rows(record: Record) -> Iterator[dict[str, object]]:
    """The values of each row by the names of their columns; what is not named is empty."""
    for matrix in record.matrices:
        of_matrix = {column.name: column.value(matrix) for column in columns_of(CSV)}
        for found in matrix.directions or [None]:
            direction = {} if found is None else {n: getattr(found, n) for n in OF_DIRECTION}
            yield {"matrix": matrix.name, **of_matrix, **direction}
    for row in record.skipped:
        if row.lost:
            yield {"matrix": "", "tuned_name": row.name, "status": "lost", "note": row.reason}


def _plain(value: object) -> object:
    """The word of a verdict, and anything else as it is."""
    return value.value if isinstance(value, Enum) else value


def cell(value: object) -> object:
    """A number as it is; text that no program takes for anything else.

    Args:
        value: What a cell is to hold.

    Returns:
        The same for a table that other programs read.
    """
    value = _plain(value)
    if not isinstance(value, str):
        return "" if value is None else value
    return ("'" if value.startswith(FORMULA_SIGNS) else "") + printable(value)
