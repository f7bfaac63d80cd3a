"""The record of a repair: what was done to each matrix, between an audit before and one after."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from bulkedge._audit import Record
from bulkedge._audit.record import SCHEMA_VERSION, Document, Row, Tool
from bulkedge.intruder import Verdict


class Treated(Row):
    """One direction that was treated."""

    round: int = Field(description="In which round, from 1.")
    index: int = Field(description="Rank of its singular value at that time, 0 the largest.")
    side: Literal["left", "right"]
    sigma: float = Field(description="Singular value.")
    score: float
    subspace_overlap: float
    verdict: Verdict
    base_share: float = Field(
        description="uᵀW0v/σ: what part of it was the base's; removed with it by scaling alone."
    )


class RepairedMatrix(Row):
    """What was done to one matrix."""

    name: str = Field(description="As in the audits.")
    tuned_name: str
    shape: tuple[int, int]
    status: Literal["repaired", "left", "refused"] = Field(
        description="Left, if no direction is as significant as asked for, or the method leaves it."
    )
    note: str | None = Field(description="Why it was refused.")
    rounds: int = Field(description="How often it was treated.")
    directions: list[Treated]
    intruders_before: int = Field(description="Directions to be treated, in the audit before.")
    intruders_after: int | None = Field(description="The same in the audit after; null if dry.")
    rank_before: int | None = Field(description="Of the stored factors; null for a full matrix.")
    rank_after: int | None
    update_norm: float = Field(description="‖W − W0‖_F before.")
    change: float = Field(description="‖W' − W‖_F over that norm.")
    energy_removed: float = Field(
        description="1 − ‖W' − W0‖²/‖W − W0‖²; negative where more was added than taken."
    )
    loss: float = Field(
        description="What dtype and rank leave out: ‖stored − meant‖_F / ‖W − W0‖_F."
    )


class RepairRecord(Document):
    """The result of :func:`bulkedge.repair`."""

    kind: ClassVar = "repair record"

    schema_version: Literal["2"] = SCHEMA_VERSION
    tool: Tool
    method: dict[str, Any] = Field(description="Its name and settings.")
    selection: dict[str, Any] = Field(description="Which directions were to be treated.")
    max_rank: int | None
    output: str | None = Field(description="What was written; null of a dry run.")
    left_behind: list[str] = Field(description="Files of the input that were not carried over.")
    before: Record
    matrices: list[RepairedMatrix]
    after: Record | None = Field(description="The audit of what was written; null of a dry run.")
