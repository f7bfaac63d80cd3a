"""What an experiment is, and the table that comes out of one."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bulkedge import __version__
from bulkedge._errors import InputError, problems

from . import _draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = int | float | str | None
Row = dict[str, Any]
"""Columns of one row and their values: numbers, truth values or text."""
Progress = Callable[[str, int, int], object]
"""Called with the experiment's name, how many repeats are done, and of how many."""
Several = Field(min_length=1, max_length=1000)
Strengths = Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], Several]
"""Strengths of spikes or norms of updates, over the threshold."""
Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Several]
LEAVE_A_BULK = frozenset({"rank", "ranks", "tracked", "signals", "top_k"})
"""Settings that are at most half the size."""


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


class Experiment(BaseModel, ABC):
    """A question to random matrices: settings in, a table and a figure out.

    A subclass draws one sample of everything in ``trial``; the table has the mean and the standard
    deviation over the repeats, beside what theory says.  The same settings give the same table, and
    more repeats go on where fewer stop.

    Attributes:
        name: As it is called on the command line.
        keys: Columns that tell one row from another, and what they mean.
        measured: Columns with a mean over the repeats; ``…_sd`` beside each is their spread.
        predicted: Columns that :meth:`theory` gives.
        quick: Settings with which it takes a second.
        repeats: How often everything is drawn.
        seed: Seed of the random numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    measured: ClassVar[Mapping[str, str]]
    predicted: ClassVar[Mapping[str, str]] = {}
    quick: ClassVar[Mapping[str, Any]]

    repeats: int = Field(10, ge=1, le=100_000, description="How often everything is drawn.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the random numbers.")

    @model_validator(mode="before")
    @classmethod
    def _shorten(cls, settings: Any) -> Any:
        """Defaults that a small matrix has no room for are cut; what was given is only checked."""
        try:
            # a size below 20 is refused anyway, and that is enough to say
            most = max(int(settings["size"]), 20) // 2
        except (KeyError, TypeError, ValueError, OverflowError):
            return settings
        names = LEAVE_A_BULK & cls.model_fields.keys()
        return {name: _cut(cls.model_fields[name].default, most) for name in names} | settings

    @field_validator(*LEAVE_A_BULK, check_fields=False)
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> Any:
        """Ranks and counts of directions leave a bulk."""
        most = info.data.get("size", math.inf) // 2
        if max(value if isinstance(value, tuple) else (value,)) > most:
            raise ValueError(f"expected at most size/2 = {most}")
        return value

    @classmethod
    def summary(cls) -> str:
        """What it shows, in one line."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def columns(cls) -> dict[str, str]:
        """Name and meaning of each column of its table."""
        means = {
            key: text
            for name, told in cls.measured.items()
            for key, text in ((name, told), (f"{name}_sd", f"standard deviation of {name}"))
        }
        return {**cls.keys, **means, **cls.predicted}

    @abstractmethod
    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """Draw everything once: rows of keys and measured columns, NaN for nothing to measure."""

    def theory(self, key: Row) -> Row:
        """What is predicted for a row with these keys."""
        return {}

    @abstractmethod
    def paint(self, table: Table) -> Figure:
        """The figure, inside the style that :meth:`draw` sets."""

    def run(self, progress: Progress | None = None) -> Table:
        """Draw, measure, average.

        Args:
            progress: Called after each repeat.

        Returns:
            The table.
        """
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[tuple[Any, ...], list[Row]] = {}
        for done in range(1, self.repeats + 1):
            for row in self.trial(generator):
                found.setdefault(tuple(row[key] for key in self.keys), []).append(row)
            if progress is not None:
                progress(self.name, done, self.repeats)
        columns = self.columns()
        averaged = (self._average(key, rows) for key, rows in found.items())
        return Table(
            experiment=self.name,
            version=__version__,
            config=self.model_dump(mode="json"),
            columns=columns,
            rows=tuple(tuple(_plain(row[name]) for name in columns) for row in averaged),
        )

    def draw(self, table: Table) -> Figure:
        """The figure of a table; needs matplotlib.

        Args:
            table: What :meth:`run` gave.

        Returns:
            The figure, which knows how to save itself; see also :func:`bulkedge.simulate.to_svg`.

        Raises:
            InputError: If it is the table of another experiment.
            MissingExtraError: Without matplotlib.
        """
        if table.experiment != self.name:
            raise InputError(f"expected a table of {self.name!r}, got one of {table.experiment!r}")
        with _draw.style():
            return self.paint(table)

    def _average(self, key: tuple[Any, ...], rows: list[Row]) -> Row:
        """One row of the table."""
        result = dict(zip(self.keys, key, strict=True))
        for name in self.measured:
            values = np.array([row[name] for row in rows], dtype=np.float64)
            values = values[~np.isnan(values)]
            result[name] = values.mean() if len(values) else math.nan
            result[f"{name}_sd"] = values.std(ddof=1) if len(values) > 1 else math.nan
        told = self.theory(dict(zip(self.keys, key, strict=True)))
        return result | {name: told.get(name, math.nan) for name in self.predicted}


def _cut(value: Any, most: int) -> Any:
    """A count, or the counts of a row, of at most so many."""
    return tuple(x for x in value if x <= most) if isinstance(value, tuple) else min(value, most)


def _plain(value: Any) -> Value:
    """A number as JSON knows it."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return value
    return None if math.isnan(value) else float(value)
