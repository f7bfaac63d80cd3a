"""The counts of a record, from its rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from bulkedge.intruder import Verdict

from .ranges import Count, Fraction, Size
from .row import Row
from .rows import Matrix
from .tensors import Skipped, Stored

if TYPE_CHECKING:
    from typing_extensions import Self


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
