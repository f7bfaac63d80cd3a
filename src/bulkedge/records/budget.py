"""The record of a budget: how strong an update of each matrix of a base may be.

A document of its own, with a schema version of its own: a field may be added within a version,
never change its meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from .document import Document
from .ranges import ROUNDING, Count, Dtype, Positive, Size
from .record import Run, Tool
from .row import Row
from .rows import Bulk
from .source import Source
from .tensors import Skipped

if TYPE_CHECKING:
    from typing_extensions import Self

BUDGET_VERSION = "1"
DIGITS = 1e-5
"""How far a limit may be from what it follows from: more than numbers in text lose."""


class BudgetSettings(Row):
    """What was asked for."""

    top_k: Positive = Field(description="How many leading directions an audit judges.")
    level: float = Field(gt=0, allow_inf_nan=False, description="In units of θ_k, what is allowed.")
    rank: Positive | None = Field(description="Of the update to be; null if none was given.")
    alpha: float | None = Field(gt=0, allow_inf_nan=False, description="Its α.")
    rslora: bool = Field(description="Whether its scale is α/√r, not α/r.")
    target: tuple[str, ...] = Field(description="Globs of the matrices that were asked for.")
    exclude: tuple[str, ...] = Field(description="Globs of those that were left out.")
    seed: Count = Field(description="Of the random vectors.")


class Allowance(Row):
    """What the limit of a matrix makes of a LoRA: of any, or of one that was trained."""

    rank: Positive = Field(description="Its rank r.")
    scale: Size = Field(description="The number in front of B·A, by the α given or its own.")
    max_ba_norm: Size = Field(description="Largest ‖B·A‖₂ under that scale: level · θ_k / scale.")
    spectral_norm_update: Size | None = Field(
        description="‖ΔW‖₂ as trained; null without an adapter."
    )
    alpha: Size = Field(
        description="For the whole model: the given α times θ_k over its mean, without matrices "
        "whose base looks untrained.  With an adapter: "
        "the α that keeps the spike below level · θ_k, at most its own."
    )


class MatrixBudget(Row):
    """One matrix of the base."""

    name: str = Field(description="Name of the base tensor, or of a part of it.")
    module: str | None = Field(
        description="The layer's path by which PEFT knows it; null of a bare parameter."
    )
    shape: tuple[Positive, Positive] = Field(description="As it acts: (out, in).")
    dtype: Dtype
    status: Literal["measured", "no_limit", "failed"] = Field(
        description="`no_limit`: the values have no bulk with an edge; see the note."
    )
    note: str | None = Field(None, description="Why there is no limit, or what to know of it.")
    sigma_1: Size | None = Field(None, description="Largest singular value, ‖W0‖₂.")
    sigma_k: Size | None = Field(None, description="The k-th; the smallest if there are fewer.")
    threshold: Size | None = Field(None, description="θ_c: beyond it an outlier is born.")
    top_k_threshold: Size | None = Field(
        None,
        description="θ_k: beyond it the outlier is among the k leading directions; at most σ_k.",
    )
    bulk: Bulk | None = None
    noise: bool | None = Field(
        None, description="Whether the base is noise; null where a quadrature cannot tell."
    )
    passes: Count = Field(0, description="Block products; 0 if all values were computed.")
    allowed: Allowance | None = Field(None, description="Null where no rank and α are known.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """Limits and values in order."""
        if (self.status == "measured") != (self.top_k_threshold is not None):
            raise ValueError(f"expected a limit of {self.name!r:.60} if it was measured")
        if _exceeds(self.sigma_k, self.sigma_1):
            raise ValueError(f"expected σ_k ≤ σ_1 of {self.name!r:.60}")
        if _exceeds(self.top_k_threshold, self.sigma_k):
            raise ValueError(
                f"expected θ_k ≤ σ_k of {self.name!r:.60}; version 0.2 wrote it above: make the "
                "budget anew"
            )
        lowest = [x for x in (self.threshold, self.sigma_k) if x is not None]
        if lowest and _exceeds(min(lowest), self.top_k_threshold):
            raise ValueError(f"expected θ_c ≤ θ_k, or θ_k = σ_k below it, of {self.name!r:.60}")
        return self


def _exceeds(low: float | None, high: float | None) -> bool:
    """Whether what is to be the lower of two numbers is above the other, by more than rounding."""
    return low is not None and high is not None and low > high * (1 + ROUNDING)


def untrained(rows: Sequence[MatrixBudget]) -> list[MatrixBudget]:
    """The matrices with a limit whose base looks untrained; none if all of them do.

    Args:
        rows: The matrices of a budget.

    Returns:
        Some of them.
    """
    limited = [row for row in rows if row.top_k_threshold is not None]
    found = [row for row in limited if row.bulk is not None and row.bulk.looks_untrained]
    return [] if len(found) == len(limited) else found


class BudgetRecord(Document):
    """The result of :func:`bulkedge.budget`."""

    kind: ClassVar = "budget"
    file_name: ClassVar = "budget.json"
    made_by: ClassVar = "bulkedge budget BASE -o DIR"

    schema_version: Literal["1"] = BUDGET_VERSION
    tool: Tool
    base: Source
    like: Source | None = Field(description="The adapter whose α was to be found.")
    settings: BudgetSettings
    skipped: list[Skipped]
    matrices: list[MatrixBudget]
    run: Run

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        """What is allowed follows from the limits."""
        for row in self.matrices:
            found = row.allowed
            if found is None or row.top_k_threshold is None:
                continue
            limit = self.settings.level * row.top_k_threshold
            if not math.isclose(found.max_ba_norm * found.scale, limit, rel_tol=DIGITS):
                raise ValueError(f"expected the largest ‖B·A‖₂ of {row.name!r:.60} to give {limit}")
        return self

    @property
    def unanswered(self) -> list[MatrixBudget]:
        """The matrices that have no limit, or whose update has no α, for whatever reason."""
        asked = self.like is not None
        return [
            r for r in self.matrices if r.top_k_threshold is None or (asked and r.allowed is None)
        ]

    @property
    def untrained(self) -> list[MatrixBudget]:
        """The matrices whose base looks untrained, if nobody has asked for them.

        A limit from noise says nothing of a layer that has nothing to forget: settings for training
        leave it out.
        """
        asked = self.like is not None or bool(self.settings.target)
        return [] if asked else untrained(self.matrices)

    @property
    def complete(self) -> bool:
        """Whether every matrix that was asked for, and every update, has its answer."""
        lost = any(row.lost for row in self.skipped)
        return bool(self.matrices) and not self.unanswered and not lost

    @property
    def above(self) -> list[MatrixBudget]:
        """The matrices whose update, as trained, exceeds what is allowed."""
        level = self.settings.level
        return [
            row
            for row in self.matrices
            if row.allowed
            and row.top_k_threshold
            and (row.allowed.spectral_norm_update or 0) > level * row.top_k_threshold
        ]
