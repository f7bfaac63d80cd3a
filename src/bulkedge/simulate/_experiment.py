"""The base class of experiments: settings in, a table and a figure out."""

from __future__ import annotations

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
    ValidationInfo,
    field_validator,
    model_validator,
)

from bulkedge import __version__
from bulkedge._errors import InputError
from bulkedge._fields import no_truth_value

from . import _draw
from ._table import Table, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""Columns of one row and their values: numbers, truth values or text."""
Progress = Callable[[str, int, int], object]
"""Called with the experiment's name, how many repeats are done, and of how many."""
_NonEmpty = Field(min_length=1, max_length=1000)
Strengths = Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], _NonEmpty]
"""Strengths of spikes or norms of updates, in units of the threshold."""
Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], _NonEmpty]
"""Ranks of updates."""
AT_MOST_HALF_THE_SIZE = frozenset({"rank", "ranks", "tracked", "signals", "top_k"})
"""Settings that may be at most half the size, so that the rest of a spectrum is a bulk."""


class Experiment(BaseModel, ABC):
    """An experiment with random matrices: settings in, a table and a figure out.

    A subclass declares its settings as fields and its columns as class variables, and implements
    :meth:`trial` (one random sample of all rows), :meth:`plot` and, if there is one,
    :meth:`theory`.  The table has means and standard deviations over the repeats, beside the
    predictions.  The same settings give the same table, and the first repeats of a longer run are
    those of a shorter one.

    Attributes:
        name: The name on the command line.
        keys: The columns that identify a row, and their meanings.
        measured: The columns that are averaged over the repeats, and their meanings; each has a
            column ``…_sd`` with the standard deviation beside it.
        predicted: The columns that :meth:`theory` gives, and their meanings.
        quick: Settings with which the experiment takes a second, for tests.
        repeats: How often everything is drawn.
        seed: The seed of the random numbers.

    Example:
        >>> from bulkedge.simulate import Transition
        >>> table = Transition(size=40, repeats=2, strengths=[0.5, 2.0]).run()
        >>> table.where(shape="square").column("strength")
        [0.5, 2.0]
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
    def _limit_defaults(cls, settings: Any) -> Any:
        """Lower the defaults that are too large for the size; given values are only checked."""
        try:
            # a size below 20 is refused, whatever the other settings are
            largest = max(int(settings["size"]), 20) // 2
        except (KeyError, TypeError, ValueError, OverflowError):
            return settings
        names = AT_MOST_HALF_THE_SIZE & cls.model_fields.keys()
        defaults = {name: cls.model_fields[name].default for name in names}
        return {name: _limited(value, largest) for name, value in defaults.items()} | settings

    _numbers = field_validator("*", mode="before")(no_truth_value)

    @field_validator(*AT_MOST_HALF_THE_SIZE, check_fields=False)
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ranks and counts of directions beyond half the size."""
        largest = info.data.get("size", math.inf) // 2
        if max(value if isinstance(value, tuple) else (value,)) > largest:
            raise ValueError(f"expected at most size/2 = {largest}")
        return value

    @classmethod
    def summary(cls) -> str:
        """What the experiment shows, in one line: the first of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def columns(cls) -> dict[str, str]:
        """The name and the meaning of each column of the table."""
        means = {
            key: text
            for name, meaning in cls.measured.items()
            for key, text in ((name, meaning), (f"{name}_sd", f"standard deviation of {name}"))
        }
        return {**cls.keys, **means, **cls.predicted}

    @abstractmethod
    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """Draw everything once: rows with the keys and measured columns, NaN for no measurement."""

    def theory(self, key: Row) -> Row:
        """The predicted columns of a row with these keys."""
        return {}

    @abstractmethod
    def plot(self, table: Table) -> Figure:
        """The figure of a table; :meth:`draw` calls this within its style."""

    def run(self, progress: Progress | None = None) -> Table:
        """Run all trials and average them.

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
            table: The result of :meth:`run`.

        Returns:
            The figure; :func:`bulkedge.simulate.to_svg` makes an SVG of it.

        Raises:
            InputError: If it is the table of another experiment.
            MissingExtraError: Without matplotlib.
        """
        if table.experiment != self.name:
            raise InputError(f"expected a table of {self.name!r}, got one of {table.experiment!r}")
        with _draw.style():
            return self.plot(table)

    def _average(self, key: tuple[Any, ...], rows: list[Row]) -> Row:
        """The row of the table with these keys: means, standard deviations, predictions."""
        result = dict(zip(self.keys, key, strict=True))
        for name in self.measured:
            values = np.array([row[name] for row in rows], dtype=np.float64)
            values = values[~np.isnan(values)]
            result[name] = values.mean() if len(values) else math.nan
            result[f"{name}_sd"] = values.std(ddof=1) if len(values) > 1 else math.nan
        theory = self.theory(dict(zip(self.keys, key, strict=True)))
        return result | {name: theory.get(name, math.nan) for name in self.predicted}


def _limited(value: Any, largest: int) -> Any:
    """A count lowered to the largest allowed, or a tuple without the counts beyond it."""
    if isinstance(value, tuple):
        return tuple(x for x in value if x <= largest)
    return min(value, largest)


def _plain(value: Any) -> Value:
    """A value as JSON has it: None for NaN, a float for a truth value."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return value
    return None if math.isnan(value) else float(value)
