"""A record as a table for other programs: CSV, or Parquet.

Names come out of files that strangers made: a spreadsheet gets them as text, never as a formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from enum import Enum

from bulkedge._errors import MissingExtraError, printable
from bulkedge.records import Record
from bulkedge.records.rows import Direction

# what makes a cell a formula, also where tabs or full-width signs are taken for it
FORMULA_SIGNS = tuple("=+-@\t\r\n＝＋－＠")
OF_MATRIX = ("status", "spectral_norm_base", "spectral_norm_update", "threshold", "note")
OF_DIRECTION = tuple(Direction.model_fields)


def to_csv(record: Record) -> str:
    """One row a direction; what could not be judged has a row too, without a direction.

    Args:
        record: What to write.

    Returns:
        CSV with a header: ``matrix``, ``tuned_name``, ``status``, every field of a direction, then
        norms, threshold and note of its matrix.  ``status`` is the matrix's, or ``lost``.
    """
    text = io.StringIO()
    # quotes around all text: another program may take semicolons for the end of a cell
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(["matrix", "tuned_name", OF_MATRIX[0], *OF_DIRECTION, *OF_MATRIX[1:]])
    for row in _csv_rows(record):
        writer.writerow([_cell(value) for value in row])
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
            "expected pyarrow for Parquet, found none; pip install 'bulkedge[parquet]'"
        ) from None
    names = ["matrix", "tuned_name", OF_MATRIX[0], *OF_DIRECTION, *OF_MATRIX[1:]]
    columns = zip(*_csv_rows(record), strict=True)
    plain = [[x.value if isinstance(x, Enum) else x for x in column] for column in columns]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, plain, strict=True))), file)
    return file.getvalue()


def _csv_rows(record: Record) -> Iterator[list[object]]:
    """The values of each row."""
    for matrix in record.matrices:
        status, *rest = (getattr(matrix, name) for name in OF_MATRIX)
        for found in matrix.directions or [None]:
            direction = [getattr(found, name, None) for name in OF_DIRECTION]
            yield [matrix.name, matrix.tuned_name, status, *direction, *rest]
    for row in record.skipped:
        if row.lost:
            nothing = [None] * (len(OF_DIRECTION) + len(OF_MATRIX) - 2)
            yield ["", row.name, "lost", *nothing, row.reason]


def _cell(value: object) -> object:
    """A number as it is; text that no program takes for anything else."""
    if isinstance(value, Enum):
        value = value.value
    if not isinstance(value, str):
        return "" if value is None else value
    return ("'" if value.startswith(FORMULA_SIGNS) else "") + printable(value)
