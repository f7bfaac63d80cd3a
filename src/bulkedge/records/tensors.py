"""What a record says of tensors: those that were left out, and what became of each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .ranges import Count, Size
from .row import Row

InputSide = Literal["base", "tuned"]
Fate = Literal["judged", "kept", "lost", "excluded", "apart"]


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
    relative_change: Size | None = Field(
        default=None,
        description="Of the vectors of a norm: ‖w − w0‖ / ‖w0‖ of its weight, ‖b − b0‖ / ‖w0‖ of "
        "its bias; null of others.",
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
