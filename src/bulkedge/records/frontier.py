"""The record of a frontier: what each weaker copy of a fine-tune does, and what follows from it.

A document of its own, with a schema version of its own: a field may be added within a version,
never change its meaning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from .document import Document
from .ranges import Fraction, Real, Size
from .record import Run, Tool
from .row import Row
from .source import File, Source

if TYPE_CHECKING:
    from typing_extensions import Self

FRONTIER_VERSION = "1"
DIGITS = 1e-9
"""How far a stored gain may be from what its points give: more than numbers in text lose."""
Arm = Literal["base", "trained", "scaled", "protected"]


class FrontierSettings(Row):
    """What was asked for."""

    scales: tuple[Fraction, ...] = Field(description="Factors s of uniform scaling.")
    strengths: tuple[Size, ...] = Field(description="Strengths λ of protecting.")
    balance: str = Field(description="Of protecting, as for a repair.")
    with_base: bool = Field(description="Whether the base was evaluated, too.")
    partial: bool = Field(description="Whether the fine-tune stores some weights only.")


class Evaluation(Row):
    """How the numbers came about."""

    by: Literal["command", "function"]
    text: str = Field(description="The command with `{model}` in it, or the function's name.")
    files: list[File] = Field(description="The files that the command names.")


class Axes(Row):
    """Which of the numbers are drawn against each other."""

    task: str = Field(description="What the fine-tune was for.")
    keep: str = Field(description="What is to be kept.")
    lower: tuple[str, ...] = Field(description="The numbers of which less is better.")

    def sign(self, name: str) -> int:
        """1 where more is better, −1 where less is."""
        return -1 if name in self.lower else 1

    def place(self, point: Measured) -> tuple[float, float]:
        """``(keep, task)`` of a point, so that more is better of both."""
        keep, task = (self.sign(name) * point.values[name] for name in (self.keep, self.task))
        return keep, task


class Measured(Row):
    """One model that was evaluated."""

    name: str = Field(description="Such as `scaled-0.5`; of a copy also the name of its folder.")
    arm: Arm = Field(description="`trained`: the fine-tune as it is.")
    strength: Size | None = Field(description="s or λ; null of the base and as trained.")
    command: str | None = Field(description="What makes the copy; null where there is none.")
    evaluated: str = Field(description="How it was evaluated: the command, or the function.")
    values: dict[str, Real] = Field(description="The numbers, by the names that they came with.")
    seconds: Size = Field(description="What the evaluation took.")
    refused: list[str] = Field(description="Changed matrices that stayed as they were.")
    drift: Size | None = Field(description="Mean drift of a protected copy, as in `repair.json`.")

    @property
    def status(self) -> str:
        """For a journal: what is in it is done."""
        return "done"


class Gain(Row):
    """A protected copy against uniform scaling at the same retention."""

    point: str = Field(description="Which.")
    reach: Literal["within", "above", "below"] = Field(
        description="Whether scaling reached that retention: `above`, the copy retains more than "
        "scaling did at any strength; `below`, less than even the fine-tune."
    )
    scaled: Real | None = Field(
        description="What scaling keeps of the task there, between the neighbouring points; null "
        "where it did not reach it."
    )
    gain: Real | None = Field(description="How much better the copy is; negative where worse.")


class FrontierRecord(Document):
    """The result of :func:`bulkedge.frontier`."""

    kind: ClassVar = "frontier"
    file_name: ClassVar = "frontier.json"
    made_by: ClassVar = "bulkedge frontier BASE TUNED -o DIR --evaluate COMMAND"
    rows_in: ClassVar = "points"

    schema_version: Literal["1"] = FRONTIER_VERSION
    tool: Tool
    base: Source
    tuned: Source
    moments: Source
    task_moments: Source | None
    settings: FrontierSettings
    evaluation: Evaluation
    axes: Axes
    points: list[Measured] = Field(min_length=1)
    dominated: dict[str, list[str]] = Field(
        description="Each point that another one beats: at least as good on both axes, better on "
        "one; with all that do."
    )
    gains: list[Gain] = Field(description="One for each protected copy.")
    run: Run

    @model_validator(mode="after")
    def _follows(self) -> Self:
        """What is said of the points follows from their numbers."""
        names = [point.name for point in self.points]
        if len(set(names)) < len(names):
            raise ValueError("expected points of different names")
        for point in self.points:
            if not {self.axes.task, self.axes.keep} <= set(point.values):
                raise ValueError(f"expected {point.name!r:.60} to have both axes")
        if self.dominated != dominated(self.points, self.axes):
            raise ValueError("expected as dominated those that other points beat")
        expected = gains(self.points, self.axes)
        if len(expected) != len(self.gains) or not all(map(_same, expected, self.gains)):
            raise ValueError("expected the gains that follow from the points")
        return self

    @property
    def in_order(self) -> list[Measured]:
        """The points from the least retention to the most."""
        return sorted(self.points, key=self.axes.place)


def _same(a: Gain, b: Gain) -> bool:
    """Whether two gains are one, but for digits."""
    pairs = ((a.scaled, b.scaled), (a.gain, b.gain))
    close = (
        x == y if x is None or y is None else math.isclose(x, y, rel_tol=DIGITS, abs_tol=DIGITS)
        for x, y in pairs
    )
    return (a.point, a.reach) == (b.point, b.reach) and all(close)


def dominated(points: Sequence[Measured], axes: Axes) -> dict[str, list[str]]:
    """The points that others beat: at least as good on both axes, and better on one.

    Args:
        points: All of them.
        axes: What counts.

    Returns:
        The name of each, with those of all that beat it.

    Example:
        >>> axes = Axes(task="t", keep="k", lower=())
        >>> def point(name, task, keep):
        ...     return Measured(name=name, arm="scaled", strength=1, command=None, evaluated="",
        ...         values={"t": task, "k": keep}, seconds=0, refused=[], drift=None)
        >>> dominated([point("a", 1, 1), point("b", 1, 2), point("c", 2, 0)], axes)
        {'a': ['b']}
    """
    places = {point.name: axes.place(point) for point in points}
    found = {
        name: [other for other, better in places.items() if _beats(better, place)]
        for name, place in places.items()
    }
    return {name: others for name, others in found.items() if others}


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] >= b[0] and a[1] >= b[1]


def gains(points: Sequence[Measured], axes: Axes) -> list[Gain]:
    """Each protected point against the line through the scaled ones, at the same retention.

    The line goes from the fine-tune (s = 1) through the scaled points, by s, to the base (s = 0) if
    that was evaluated.  Where it passes a retention more than once, its best counts.

    Args:
        points: All of them.
        axes: What counts.

    Returns:
        One gain for each protected point, in their order.
    """
    line = [axes.place(point) for point in _by_scale(points)]
    found = []
    for point in points:
        if point.arm == "protected":
            keep, task = axes.place(point)
            scaled = max(_crossings(line, keep), default=None)
            found.append(_gain(point.name, task, scaled, axes.sign(axes.task), keep, line))
    return found


def _gain(
    name: str,
    task: float,
    scaled: float | None,
    sign: int,
    keep: float,
    line: list[tuple[float, float]],
) -> Gain:
    if scaled is not None:
        return Gain(point=name, reach="within", scaled=sign * scaled, gain=task - scaled)
    above = keep > max(x for x, _ in line)
    return Gain(point=name, reach="above" if above else "below", scaled=None, gain=None)


def _by_scale(points: Sequence[Measured]) -> list[Measured]:
    """What uniform scaling passes, from the fine-tune to the base."""
    ends = {"trained": 1.0, "base": 0.0}
    passed = [point for point in points if point.arm != "protected"]
    return sorted(passed, key=lambda point: -ends.get(point.arm, point.strength or 0.0))


def _crossings(line: list[tuple[float, float]], keep: float) -> Iterator[float]:
    """The heights at which a line of straight pieces passes a place."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if min(x0, x1) <= keep <= max(x0, x1):
            yield max(y0, y1) if x0 == x1 else y0 + (y1 - y0) * (keep - x0) / (x1 - x0)
