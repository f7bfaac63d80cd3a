"""The points of a frontier: which copies of a fine-tune are made, and how."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bulkedge._errors import InputError, printable
from bulkedge._fields import as_real
from bulkedge.moments import Moments
from bulkedge.records.frontier import Arm
from bulkedge.repairing import Protect, Rescale

SCALES = (0.85, 0.7, 0.5, 0.35, 0.2)
"""The factors that are tried where none are given: from nearly all of the update to a fifth."""
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""The strengths that are tried where none are given: half a decade apart, around 1."""


@dataclass(frozen=True)
class Point:
    """A model to be evaluated.

    Attributes:
        arm: How it came about.
        strength: s or λ; None of the base and of the fine-tune.
    """

    arm: Arm
    strength: float | None = None

    @property
    def name(self) -> str:
        """What it is called, also as a folder."""
        if self.strength is None:
            return "base" if self.arm == "base" else "as-trained"
        return f"{self.arm}-{shown(self.strength)}"

    @property
    def is_copy(self) -> bool:
        """Whether it is to be written."""
        return self.strength is not None


@dataclass(frozen=True)
class Files:
    """The inputs as they were given, for commands.

    Attributes:
        base: The base.
        tuned: The fine-tune.
        moments: Of text to be kept.
        task_moments: Of the task, or None.
        balance: Of protecting.
        partial: Whether the fine-tune stores some weights only.
    """

    base: Path
    tuned: Path
    moments: Path
    task_moments: Path | None
    balance: str
    partial: bool

    @property
    def measured(self) -> list[Path]:
        """The files of moments."""
        return [path for path in (self.moments, self.task_moments) if path is not None]

    def command(self, point: Point) -> str | None:
        """What makes a copy; None where there is none to make."""
        if point.strength is None:
            return None
        words = ["bulkedge", "repair", str(self.base), str(self.tuned)]
        if point.arm == "scaled":
            words += ["--method", "rescale", "--uniform", shown(point.strength)]
        else:
            words += ["--method", "protect", "--moments", str(self.moments)]
            if self.task_moments is not None:
                words += ["--task-moments", str(self.task_moments)]
            words += ["--strength", shown(point.strength)]
            words += [] if self.balance == "output" else ["--balance", self.balance]
        words += ["--partial"] if self.partial else []
        return shlex.join(printable(word) for word in [*words, "-o", point.name])


def shown(strength: float) -> str:
    """A strength with all its digits, and no more."""
    return f"{strength:g}" if float(f"{strength:g}") == strength else repr(strength)


def points_of(scales: Sequence[float], strengths: Sequence[float], with_base: bool) -> list[Point]:
    """All points, in the order in which they are evaluated.

    Args:
        scales: Factors of the update.
        strengths: Of protecting.
        with_base: Whether the base is one of them.

    Returns:
        The fine-tune first, which shows at once whether the evaluation works.

    Raises:
        InputError: If there are none of a kind, one comes twice, or one makes no sense.
    """
    factors = _checked("scales", scales, "between 0 and 1, the ends excluded", 1.0)
    lambdas = _checked("strengths", strengths, "more than 0", float("inf"))
    ends = [Point("trained"), *([Point("base")] if with_base else [])]
    scaled = [Point("scaled", s) for s in sorted(factors, reverse=True)]
    return [*ends, *scaled, *(Point("protected", x) for x in sorted(lambdas))]


def _checked(name: str, given: Sequence[float], limits: str, high: float) -> list[float]:
    """Numbers between 0 and a limit, both excluded, none twice."""
    found = [as_real(x) for x in given]
    kept = [x for x in found if x is not None and 0 < x < high]
    if not found or len(kept) < len(found):
        raise InputError(
            f"expected {name} {limits}, got {list(given)!r:.80}; give one or more such"
        )
    if len(set(kept)) < len(kept):
        raise InputError(f"expected {name} that differ, got {list(given)!r:.80}; give each once")
    return kept


def method_of(
    point: Point, moments: Moments, task_moments: Moments | None, balance: str
) -> Protect | Rescale:
    """What makes the copy of a point.

    Args:
        point: Which.
        moments: Of text to be kept.
        task_moments: Of the task, or None.
        balance: Of protecting.

    Returns:
        The method.
    """
    if point.arm == "scaled":
        return Rescale(uniform=point.strength)
    return Protect(moments, task_moments, strength=point.strength, balance=balance)
