"""The table that comes out of an experiment."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bulkedge._errors import InputError, problems

Value = int | float | str | None
Row = dict[str, Any]
"""One row, by column: numbers, truth values or text."""


class Table(BaseModel):
    """The result of an experiment: plain numbers, and all that is needed to get them again.

    Attributes:
        experiment: Its name.
        version: Version of bulkedge that made it.
        config: Every setting of the experiment.
        columns: Name and meaning of each column.
        rows: One value a column; None where there is nothing to measure or to predict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: str
    version: str
    config: dict[str, Any]
    columns: dict[str, str]
    rows: tuple[tuple[Value, ...], ...]

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"expected {len(self.columns)} values in every row")
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Value]:
        """The values of one column.

        Args:
            name: The column.

        Returns:
            A value a row.

        Raises:
            InputError: If there is no such column.
        """
        if name not in self.columns:
            raise InputError(f"expected one of the columns {', '.join(self.columns)}, got {name!r}")
        index = list(self.columns).index(name)
        return [row[index] for row in self.rows]

    def numbers(self, name: str) -> np.ndarray:
        """The same as a float64 array, NaN for None; InputError if there is no such column."""
        return np.array(self.column(name), dtype=np.float64)

    def where(self, **values: Value) -> Table:
        """The rows with these values in these columns; InputError if there is no such column."""
        found = list(zip(*map(self.column, values), strict=True))
        wanted = tuple(values.values())
        rows = tuple(row for row, keys in zip(self.rows, found, strict=True) if keys == wanted)
        return self.model_copy(update={"rows": rows})

    def to_json(self) -> str:
        """JSON text, one row of the table on one line, with a final newline."""
        head = json.dumps(self.model_dump(mode="json", exclude={"rows"}), indent=2)
        rows = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        return f'{head.removesuffix("}").rstrip()},\n  "rows": [\n    {rows}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table that :meth:`to_json` wrote.

        Args:
            text: JSON text.

        Returns:
            The table.

        Raises:
            InputError: If it is not one.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InputError(f"expected the table of an experiment: {problems(error)}") from None
