"""The record of a repair: what was done to each matrix, between an audit before and one after."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from typing_extensions import Self, TypedDict

from bulkedge.intruder import COUNTED, Verdict
from bulkedge.records import Record
from bulkedge.records.document import Document
from bulkedge.records.ranges import MOST, ROUNDING, Count, Fraction, Positive, Real, Size
from bulkedge.records.record import SCHEMA_VERSION, Tool
from bulkedge.records.rows import Row

from .method import METHODS

HALF = 0.5
"""A share of the update whose loss deserves a warning."""


def _settings(method: dict[str, Any]) -> dict[str, Any]:
    """A method's name, and settings that it takes; those of a method of others may be any."""
    if not isinstance(method.get("name"), str):
        raise ValueError("expected the name of a method")
    kind = METHODS.get(method["name"])
    if kind is None:
        return method
    settings = {name: value for name, value in method.items() if name != "name"}
    for name, value in settings.items():
        if value is not None and not (isinstance(value, int | float) and abs(value) <= MOST):
            raise ValueError(f"expected a number for {name}, got {value!r:.40}")
    try:
        kind(**settings)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return method


def _counted(word: str) -> str:
    """The word of a verdict that counts as new."""
    words = [verdict.value for verdict in COUNTED]
    if word not in words:
        raise ValueError(f"expected one of {', '.join(words)}, got {word!r:.40}")
    return word


class Choice(TypedDict):
    """Which directions are treated."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportGeneralTypeIssues]

    select: Annotated[str, AfterValidator(_counted)]
    significance: Fraction | None


class Treated(Row):
    """One direction that was treated."""

    round: Positive = Field(description="In which round, from 1.")
    index: Count = Field(description="Rank of its singular value at that time, 0 the largest.")
    side: Literal["left", "right"]
    sigma: Size = Field(description="Singular value.")
    score: Fraction
    subspace_overlap: Fraction
    verdict: Verdict
    base_share: Real = Field(
        description="uᵀW0v/σ: the base's part of it, which only scaling removes, too."
    )


class RepairedMatrix(Row):
    """What was done to one matrix."""

    name: str = Field(description="As in the audits.")
    tuned_name: str
    shape: tuple[Positive, Positive]
    status: Literal["repaired", "left", "refused"] = Field(
        description="Left, if no direction is as significant as asked for, or the method leaves it."
    )
    note: str | None = Field(description="Why it was refused; for a repaired one, remarks.")
    rounds: Count = Field(description="How often it was treated.")
    directions: list[Treated]
    intruders_before: Count = Field(description="Directions to be treated, in the audit before.")
    intruders_after: Count | None = Field(description="The same in the audit after; null if dry.")
    rank_before: Count | None = Field(description="Of the stored factors; null for a full matrix.")
    rank_after: Count | None
    update_norm: Size = Field(description="‖W − W0‖_F before.")
    change: Size = Field(description="‖W' − W‖_F over that norm.")
    energy_removed: Real = Field(
        le=1 + ROUNDING,
        description="1 − ‖W' − W0‖²/‖W − W0‖²; negative where more was added than taken.",
    )
    loss: Size = Field(
        description="The error from dtype and rank: ‖stored − meant‖_F / ‖W − W0‖_F."
    )
    strength: Size | None = Field(None, description="λ in this layer; null of other methods.")
    drift_before: Size | None = Field(
        None,
        description="tr(ΔW C ΔWᵀ)/tr(W0 C W0ᵀ) on the base's inputs; null where not measured.",
    )
    drift_after: Size | None = Field(None, description="The same of the repaired update.")
    task_change: Size | None = Field(
        None,
        description="tr((W' − W) C (W' − W)ᵀ)/tr(ΔW C ΔWᵀ), on the task's inputs; else null.",
    )


class Cost(Row):
    """What a repair took from the updates that it changed: ‖W' − W‖_F / ‖W − W0‖_F."""

    mean: Size = Field(description="Over the repaired matrices.")
    most: Size = Field(description="Of the matrix that lost most.")
    matrix: str = Field(description="Which that is.")

    @property
    def heavy(self) -> Literal["mean", "most"] | None:
        """What exceeds one half: the mean, or else the most; None if neither does."""
        if self.mean > HALF:
            return "mean"
        return "most" if self.most > HALF else None


def cost_of(matrices: list[RepairedMatrix]) -> Cost | None:
    """What a repair took.

    Args:
        matrices: All of them.

    Returns:
        The cost; None where nothing was changed.
    """
    done = [row for row in matrices if row.status == "repaired"]
    if not done:
        return None
    worst = max(done, key=lambda row: row.change)
    mean = sum(row.change for row in done) / len(done)
    return Cost(mean=mean, most=worst.change, matrix=worst.name)


class RepairRecord(Document):
    """The result of :func:`bulkedge.repair`."""

    kind: ClassVar = "repair record"
    file_name: ClassVar = "repair.json"
    made_by: ClassVar = "bulkedge repair BASE TUNED -o DIR"

    schema_version: Literal["2"] = SCHEMA_VERSION
    tool: Tool
    method: Annotated[dict[str, Any], AfterValidator(_settings)] = Field(
        description="Its name and settings."
    )
    selection: Choice = Field(description="Which directions were to be treated.")
    max_rank: Positive | None
    output: str | None = Field(description="What was written; null of a dry run.")
    left_behind: list[str] = Field(description="Files of the input that were not carried over.")
    before: Record
    matrices: list[RepairedMatrix]
    cost: Cost | None = Field(None, description="How much was changed; null if nothing was.")
    after: Record | None = Field(
        description="The audit of what was written; null of a dry run, and in a frontier."
    )

    def _in_brief(self) -> str:
        """See :meth:`Document._in_brief`: the method, and new directions before and after."""
        after = "not written" if self.after is None else self.after.summary.new_directions
        found = f"{self.before.summary.new_directions} → {after}"
        return f"{self.method['name']}, new directions {found}; "

    @model_validator(mode="after")
    def _check_cost(self) -> Self:
        if self.cost is not None and self.cost.matrix not in {row.name for row in self.matrices}:
            raise ValueError(
                f"the cost is of {self.cost.matrix!r}, which is not one of its matrices"
            )
        return self
