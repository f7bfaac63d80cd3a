"""Rows of a record as a data frame."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from bulkedge._errors import MissingExtraError, install

from .row import Row

SHAPE = "shape"
"""The one field of several values that a data frame has, as ``rows`` and ``columns``."""


def data_frame(found: Sequence[dict[str, Any]], columns: Sequence[str]) -> Any:
    """A data frame.

    Args:
        found: The rows.
        columns: All columns, in order.

    Returns:
        A ``pandas.DataFrame``.

    Raises:
        MissingExtraError: Without pandas.
    """
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError as error:
        raise MissingExtraError(f"to_pandas() needs pandas: {install('pandas')}") from error
    return pandas.DataFrame(list(found), columns=list(columns))


def frame_of(rows: Sequence[Row]) -> Any:
    """Rows of one kind, with every field that is a single value.

    Args:
        rows: Such as the matrices of a budget.

    Returns:
        A ``pandas.DataFrame``; the fields of a part, and the numbers of a table, are named after
        it, such as ``bulk_edge``.
    """
    parts = {name for row in rows for name in type(row).model_fields if _is_part(row, name)}
    found = [dict(_values(row, parts)) for row in rows]
    return data_frame(found, list(dict.fromkeys(name for row in found for name in row)))


def _is_part(row: Row, name: str) -> bool:
    """Whether a field of a row is a row itself."""
    return isinstance(getattr(row, name), Row)


def _values(row: Row, parts: set[str], before: str = "") -> Iterator[tuple[str, Any]]:
    """The single values of a row by their columns; of a part that it lacks none."""
    for name in type(row).model_fields:
        value = getattr(row, name)
        if isinstance(value, Row):
            yield from _values(value, parts, f"{before}{name}_")
        elif name == SHAPE:
            yield from zip((f"{before}rows", f"{before}columns"), value, strict=True)
        elif isinstance(value, dict):
            yield from ((f"{before}{name}_{key}", x) for key, x in value.items())
        elif name not in parts and not isinstance(value, (list, tuple)):
            yield f"{before}{name}", value
