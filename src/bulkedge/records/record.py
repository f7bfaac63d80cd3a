"""The record: the product of an audit, of which every report is a view.

One row per matrix, one per direction.  The schema is versioned: a field may be added within a
version, never change its meaning.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bulkedge._fields import SCHEMA_VERSION

from .compare import RecordComparison, compare
from .directions import check_directions
from .document import Document
from .ranges import Count, Moment, Positive, Size
from .recipe import Recipe
from .row import Row
from .rows import Matrix
from .source import Inputs
from .summary import Summary, summarise
from .tensors import Skipped, Stored
from .views import as_frame, as_html, summary_of

if TYPE_CHECKING:
    from typing_extensions import Self

OF_SPIKES = ("spikes", "supercritical", "beyond_top_k_threshold")
"""The counts of a summary that a matrix may have none for, not even zero."""
MAX_SHARDS, MAX_MATRICES = 2**20, 2**24  # records are merged by counting up to them


class Tool(Row):
    """What made the record."""

    name: str = "bulkedge"
    version: str
    torch: str


class Run(Row):
    """How the computation went: what alone differs between equal audits on equal processors."""

    started: Moment = Field(description="UTC, ISO 8601.")
    seconds: Size
    engine: str = Field("local", description="Where rows were computed.")
    jobs: Positive | None = Field(description="Worker processes; null where a cluster decides.")
    resumed: Count = Field(0, description="Rows taken from the journal of an earlier run.")


class Part(Row):
    """Which part of an audit a record has."""

    index: int = Field(ge=1, le=MAX_SHARDS, description="Which, counted from 1.")
    count: int = Field(ge=1, le=MAX_SHARDS, description="Of how many.")
    positions: list[Count] = Field(description="The place of each row in the whole audit.")
    matrices: int = Field(ge=0, le=MAX_MATRICES, description="How many rows the whole audit has.")

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        """One of the parts, and places in the whole."""
        if self.index > self.count:
            raise ValueError(f"expected a part of {self.count}, got number {self.index}")
        if sorted(set(self.positions)) != self.positions or self.positions[-1:] >= [self.matrices]:
            raise ValueError(f"expected places below {self.matrices} in order")
        return self


class Record(Document):
    """The result of :func:`bulkedge.audit`."""

    kind: ClassVar = "bulkedge record"
    file_name: ClassVar = "record.json"
    made_by: ClassVar = "bulkedge audit BASE TUNED -o DIR"

    schema_version: Literal["2"] = SCHEMA_VERSION
    tool: Tool
    inputs: Inputs
    recipe: Recipe
    shard: Part | None = Field(None, description="Null for a whole audit.")
    summary: Summary
    skipped: list[Skipped]
    tensors: list[Stored] = Field(
        description="Every tensor of two or more dimensions of either side, once."
    )
    matrices: list[Matrix]
    run: Run

    @model_validator(mode="after")
    def _counts_all(self) -> Self:
        """The counts are those of the lists."""
        part = self.shard is not None or self.summary.tensors is None
        tensors = None if part else self.tensors
        places = range(len(self.matrices))
        if any(i not in places for row in tensors or () for i in row.rows):
            raise ValueError("expected tensors of the matrices that are here, got others")
        if self.shard and len(self.shard.positions) != len(self.matrices):
            raise ValueError("matrices and places do not add up; was a record.json edited?")
        moments = self.inputs.moments is not None
        counts = summarise(self.matrices, self.skipped, tensors, moments=moments)
        if self.summary != counts:
            # earlier versions wrote 0 where no matrix has spikes
            absent = [name for name in OF_SPIKES if counts[name] is None]
            same = self.summary.model_copy(update=dict.fromkeys(absent)) == counts
            if not same or any(self.summary[name] for name in absent):
                raise ValueError("expected the counts of the rows listed, got others")
            object.__setattr__(self, "summary", counts)
        if twice := [n for n, found in Counter(m.name for m in self.matrices).items() if found > 1]:
            raise ValueError(f"expected each matrix once, got {twice[0]!r:.60} twice")
        for matrix in self.matrices:
            check_directions(matrix, self.recipe)
            counted = sum(row.score < self.recipe.epsilon for row in matrix.directions)
            if matrix.new_directions != counted:
                raise ValueError(f"expected {counted} new directions of {matrix.name!r:.60}")
            told = (matrix.drift is not None) + (matrix.drift_note is not None)
            if told != (moments and matrix.status in ("audited", "unchanged")):
                raise ValueError(
                    f"expected the drift of {matrix.name!r:.60}, or why it is not known, where "
                    "there are moments"
                )
        return self

    def __repr__(self) -> str:
        """What was found, of what, and how to see more: three lines."""
        return summary_of(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The same in a notebook, with the worst matrices."""
        return as_html(self)

    def to_pandas(self, rows: Literal["matrices", "directions"] = "matrices") -> Any:
        """The record as a data frame.

        Args:
            rows: ``"matrices"`` for one row per matrix, ``"directions"`` for one per direction.

        Returns:
            A ``pandas.DataFrame`` of every field that is a single value.

        Raises:
            InputError: If ``rows`` is neither.
            MissingExtraError: Without pandas.

        Example:
            >>> record.to_pandas().nsmallest(3, "worst_score")  # doctest: +SKIP
        """
        return as_frame(self, rows)

    def compare(self, other: Record) -> RecordComparison:
        """What this audit and another found in the matrices that both have.

        Args:
            other: An audit by the same ``top_k``, ``epsilon`` and ``side``.

        Returns:
            A row for each matrix, which print as a short summary.

        Raises:
            InputError: If the settings differ.

        Example:
            >>> before.compare(after)  # doctest: +SKIP
            8 new directions first, 0 second, in 37 matrices that both have
        """
        return compare(self, other)
