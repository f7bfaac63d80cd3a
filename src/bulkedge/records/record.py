"""The record: the product of an audit, of which every report is a view.

One row per matrix, one per direction.  The schema is versioned: a field may be added within a
version, never change its meaning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bulkedge._fields import SCHEMA_VERSION
from bulkedge.intruder import Verdict

from .compare import RecordComparison, compare
from .directions import check_directions
from .document import Document
from .ranges import Count, Fraction, Moment, Positive, Size
from .recipe import Recipe
from .row import Row
from .rows import Matrix
from .source import Inputs
from .views import as_frame, as_html, summary_of

if TYPE_CHECKING:
    from typing_extensions import Self

InputSide = Literal["base", "tuned"]
Fate = Literal["judged", "kept", "lost", "excluded", "apart"]
OF_SPIKES = ("spikes", "supercritical", "beyond_top_k_threshold")
"""The counts of a summary that a matrix may have none for, not even zero."""
MAX_SHARDS, MAX_MATRICES = 2**20, 2**24  # records are merged by counting up to them


class Tool(Row):
    """What made the record."""

    name: str = "bulkedge"
    version: str
    torch: str


class Skipped(Row):
    """A tensor that was not audited."""

    name: str = Field(description="Its name in the file that holds it.")
    reason: str
    lost: bool = Field(description="Part of the update of a weight, which went unjudged.")
    side: InputSide = Field(default="tuned", description="Which input holds it.")
    accepted: bool = Field(default=False, description="A weight that the recipe leaves out.")
    changed: bool = Field(
        default=False, description="A vector, such as a bias, that differs; reported with moments."
    )
    missing: bool = Field(
        default=False,
        description="A vector of the base that a full fine-tune does not store, and should.",
    )
    bounded: bool = Field(
        default=False, description="A changed bias that the `drift_bound` of its layer includes."
    )
    zeroed: bool = Field(
        default=False,
        description="A vector, or a tensor that the recipe leaves out, that is all zeros where "
        "that of the base is not.",
    )
    not_finite: str | None = Field(
        default=None,
        description="How many of its numbers are NaN or Inf, where it counts as lost for it; of "
        "what the recipe leaves out, how many are where the base's are finite.",
    )


class Stored(Row):
    """A tensor of two or more dimensions of either side, and what became of it."""

    side: InputSide = Field(description="Which input holds it.")
    name: str = Field(description="Its name in the file that holds it.")
    fate: Fate = Field(
        description="`judged`: read for `rows`; `kept`: a weight of the base that no part of an "
        "adapter updates; `lost`: unjudged; `excluded`: left out by the recipe; `apart`: no "
        "weight, or one that no layer of the other side corresponds to."
    )
    rows: list[Count] = Field([], description="The matrices that it is a part of, by position.")


class Counts(Row):
    """The tensors of two or more dimensions of both sides, each counted once."""

    base: Count = Field(description="Of the base.")
    tuned: Count = Field(description="Of the tuned side.")
    compared: Count = Field(description="Of both, read for a matrix that was audited.")
    equal: Count = Field(description="Proved equal, or kept as they are by an adapter.")
    lost: Count = Field(description="Weights that went unjudged.")
    excluded: Count = Field(description="Left out by the recipe.")
    apart: Count = Field(description="No weights, or new heads beside the base's layers.")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        """Each tensor is counted in one place."""
        counted = self.compared + self.equal + self.lost + self.excluded + self.apart
        if counted != self.base + self.tuned:
            raise ValueError(
                f"expected counts that add up to {self.base + self.tuned} tensors, got {counted}"
            )
        return self


class DriftSummary(Row):
    """How far the outputs of the changed matrices have drifted on the inputs of the moments."""

    measured: Count = Field(description="Changed matrices whose drift is known.")
    unknown: Count = Field(description="Changed matrices whose drift is not: see `drift_note`.")
    vectors: Count = Field(
        0,
        description="Changed vectors, such as norms, whose effect is part of no `drift` and no "
        "`drift_bound`.",
    )
    mean: Size | None = Field(description="Mean of `drift` over those that are known.")
    bound: Size | None = Field(
        None,
        description="Mean of `drift_bound`, or of `drift` where the bias of a layer is unchanged, "
        "over layers with a changed matrix or bias; null where no bias changed.",
    )
    of_sums: Size | None = Field(
        description="Their `output_change` in all over their `output_power` in all."
    )
    along_new: Fraction | None = Field(
        description="The part of a matrix's drift along new directions of its outputs (verdict "
        "rotated or intruder), the mean over those whose outputs' side was judged."
    )


class Summary(Row):
    """The counts."""

    matrices: Count = Field(description="Rows in `matrices`.")
    audited: Count = Field(description="Of these, compared direction by direction.")
    unchanged: Count = Field(description="Of these, equal to the base.")
    not_audited: Count = Field(description="Of these, not finite or failed.")
    new_directions: Count = Field(description="How many directions are new: score < epsilon.")
    verdicts: dict[Verdict, Count] = Field(description="Directions by verdict.")
    skipped: Count = Field(description="Rows in `skipped`.")
    lost: Count = Field(description="Of these, updates of weights, which went unjudged.")
    spikes: Count | None = Field(
        None,
        description="Spikes of low-rank updates in matrices with a threshold; null where no matrix "
        "has both, as in a dense fine-tune.",
    )
    supercritical: Count | None = Field(None, description="Of these, beyond their threshold.")
    beyond_top_k_threshold: Count | None = Field(
        None, description="Of these, beyond `top_k_threshold`."
    )
    tensors: Counts | None = Field(
        None, description="All tensors of two or more dimensions; null of a part of an audit."
    )
    drift: DriftSummary | None = Field(None, description="Null without moments.")

    @field_validator("verdicts")
    @classmethod
    def _all_verdicts(cls, given: dict[Verdict, int]) -> dict[Verdict, int]:
        """Zero of a verdict that was added after the record was written."""
        return {verdict: given.get(verdict, 0) for verdict in Verdict}

    @property
    def complete(self) -> bool:
        """Whether every update was judged and every direction decided."""
        undecided = self.verdicts[Verdict.UNDECIDED]
        judged = sum(self.verdicts.values())
        return judged > 0 and not (self.not_audited or self.lost or undecided)

    @property
    def drift_known(self) -> bool:
        """Whether the drift of every changed matrix was measured, and nothing changed besides."""
        found = self.drift
        return found is not None and found.measured > 0 and not (found.unknown or found.vectors)


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


def count_tensors(tensors: list[Stored], matrices: list[Matrix]) -> Counts:
    """How many tensors were compared, how many are equal, how many lost.

    Args:
        tensors: All tensors of two or more dimensions.
        matrices: All rows of an audit.

    Returns:
        The counts.  One of several matrices counts as lost if one of these could not be audited,
        and as equal only if all are.
    """
    counts = Counter(_fate(row, matrices) for row in tensors)
    sides = Counter(row.side for row in tensors)
    return Counts(
        base=sides["base"],
        tuned=sides["tuned"],
        **{name: counts[name] for name in ("compared", "equal", "lost", "excluded", "apart")},
    )


def _fate(row: Stored, matrices: list[Matrix]) -> str:
    """Where a tensor is counted."""
    if row.fate != "judged":
        return "equal" if row.fate == "kept" else row.fate
    statuses = {matrices[i].status for i in row.rows}
    if not statuses or statuses & {"not_finite", "failed"}:
        return "lost"
    return "equal" if statuses == {"unchanged"} else "compared"


def summarise(
    matrices: list[Matrix],
    skipped: list[Skipped],
    tensors: list[Stored] | None = None,
    *,
    moments: bool = False,
) -> Summary:
    """The counts of a record.

    Args:
        matrices: Its rows.
        skipped: What was left out.
        tensors: All tensors of two or more dimensions; None where not all rows are here.
        moments: Whether drift was to be measured.

    Returns:
        The counts.
    """
    verdicts = dict.fromkeys(Verdict, 0)
    for matrix in matrices:
        for direction in matrix.directions:
            verdicts[direction.verdict] += 1
    statuses = [matrix.status for matrix in matrices]
    audited, unchanged = statuses.count("audited"), statuses.count("unchanged")
    return Summary(
        matrices=len(matrices),
        audited=audited,
        unchanged=unchanged,
        not_audited=len(matrices) - audited - unchanged,
        new_directions=sum(matrix.new_directions for matrix in matrices),
        verdicts=verdicts,
        skipped=len(skipped),
        lost=sum(row.lost for row in skipped),
        spikes=_sum_of_known(m.spikes for m in matrices if m.supercritical is not None),
        supercritical=_sum_of_known(m.supercritical for m in matrices),
        beyond_top_k_threshold=_sum_of_known(m.beyond_top_k_threshold for m in matrices),
        tensors=None if tensors is None else count_tensors(tensors, matrices),
        drift=summarise_drift(matrices, skipped) if moments else None,
    )


def _sum_of_known(counts: Iterable[int | None]) -> int | None:
    """The sum of the counts that there are; None without any, where nothing was counted."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def summarise_drift(matrices: list[Matrix], skipped: list[Skipped]) -> DriftSummary:
    """The drift of all changed matrices together.

    Args:
        matrices: The rows of an audit with moments.
        skipped: What was left out of it.

    Returns:
        Its mean, and how many matrices that is of.
    """
    changed = [matrix for matrix in matrices if matrix.status == "audited"]
    known = [(m, m.drift) for m in changed if m.drift is not None]
    of_biases = [m for m in matrices if m.status == "unchanged" and m.drift_note is not None]
    bounds = [m.drift_bound for m in matrices if m.drift_bound is not None]
    others = [drift for m, drift in known if m.drift_bound is None]
    power = math.fsum(matrix.output_power or 0.0 for matrix, _ in known)
    change = math.fsum(matrix.output_change or 0.0 for matrix, _ in known)
    new = [
        m.drift_along_new / drift for m, drift in known if drift and m.drift_along_new is not None
    ]
    return DriftSummary(
        measured=len(known),
        unknown=len(changed) - len(known) + len(of_biases),
        vectors=sum(row.changed and not row.bounded for row in skipped),
        mean=math.fsum(drift for _, drift in known) / len(known) if known else None,
        bound=math.fsum((*bounds, *others)) / (len(bounds) + len(others)) if bounds else None,
        of_sums=change / power if power else None,
        along_new=math.fsum(new) / len(new) if new else None,
    )
