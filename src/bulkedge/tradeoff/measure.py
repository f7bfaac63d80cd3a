"""The points of a frontier, evaluated one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bulkedge._errors import InputError
from bulkedge.auditing import Notice
from bulkedge.auditing.inputs import Watch
from bulkedge.auditing.journal import Journal, digest
from bulkedge.records.frontier import FRONTIER_VERSION, Axes, Measured
from bulkedge.repairing import RepairRecord

from .copies import Copies
from .evaluation import Command, Failed, Function
from .points import Point


@dataclass(frozen=True)
class Wanted:
    """Which numbers are drawn: names, or None for the first ones.

    Attributes:
        task: What the fine-tune was for.
        keep: What is to be kept.
        lower: The numbers of which less is better.
    """

    task: str | None
    keep: str | None
    lower: tuple[str, ...]

    def axes(self, values: Iterable[str]) -> Axes:
        """The axes among the numbers that an evaluation gives.

        Args:
            values: Their names, in order.

        Returns:
            The axes.

        Raises:
            InputError: If a name that was asked for is none of them, or both axes are one.
        """
        names = list(values)
        for name in filter(None, (self.task, self.keep, *self.lower)):
            if name not in names:
                raise InputError(
                    f"the evaluation gives no number {name!r:.60}, but {', '.join(names):.200}; "
                    "name one of these"
                )
        task = self.task or next(name for name in names if name != self.keep)
        keep = self.keep or next(name for name in names if name != task)
        if task == keep:
            raise InputError(f"expected two numbers to compare, got {task!r:.60} twice")
        return Axes(task=task, keep=keep, lower=self.lower)


class Evaluations:
    """The points, and the rows of those that are finished.

    Args:
        points: All of them, in order.
        copies: What makes their copies.
        evaluation: What gives their numbers.
        watch: Of the files of both inputs.
        wanted: Which numbers are the axes.

    Attributes:
        told: How the points are evaluated, for the record.
        done: The finished rows, by the position of their point.
    """

    def __init__(
        self,
        points: list[Point],
        copies: Copies,
        evaluation: Command | Function,
        watch: Watch,
        wanted: Wanted,
    ) -> None:
        self.points, self.copies, self.evaluation = points, copies, evaluation
        self.watch, self.wanted = watch, wanted
        self.described = evaluation.for_record()
        self.keys: list[str] = []
        self.done: dict[int, Measured] = {}

    @property
    def rows(self) -> list[Measured]:
        """The finished ones in order."""
        return [self.done[i] for i in sorted(self.done)]

    @property
    def axes(self) -> Axes:
        """Those that were asked for, among the numbers of the first point."""
        return self.wanted.axes(self.rows[0].values)

    def go_on(self, book: Journal[Measured], inputs: dict[str, Any]) -> int:
        """Take what an earlier run has finished.

        Args:
            book: The journal.
            inputs: Everything that copies depend on, but for their strengths.

        Returns:
            How many points that is.
        """
        common = {
            "schema": FRONTIER_VERSION,
            "inputs": inputs,
            "evaluation": self.described.model_dump(mode="json"),
        }
        self.keys = [digest(common | {"point": point.name}) for point in self.points]
        taken = book.take(self.keys)
        # a row without its copy is of no use: the copy is what people want
        self.done = {
            i: row for i, row in taken.items() if self.copies.model(self.points[i]).exists()
        }
        if self.done:
            self._check_names(self.rows)
            self.wanted.axes(self.rows[0].values)
        return len(self.done)

    def go(
        self,
        book: Journal[Measured],
        progress: Callable[[str, int, int], None] | None,
        notice: Notice | None,
    ) -> None:
        """Make and evaluate the others, each on disk before the next.

        Args:
            book: The journal.
            progress: Called after each point.
            notice: Called with a line for each point that was evaluated.
        """
        total = len(self.points)
        for i, point in enumerate(self.points):
            if i not in self.done:
                row = self._measured(point)
                self._check_names([*self.rows, row])
                self.watch.check()  # numbers of what was changed meanwhile must not be kept
                book.append(self.keys[i], row)
                self.done[i] = row
                self.wanted.axes(row.values)  # a wrong name costs no evaluation
                if notice is not None:
                    notice(f"{len(self.done)} of {total}: {_line(row)}")
            if progress is not None:
                progress(point.name, len(self.done), total)

    def _measured(self, point: Point) -> Measured:
        """One point: its copy, and its numbers."""
        made = self.copies.make(point) if point.is_copy else None
        model, clock = self.copies.model(point), time.perf_counter()
        try:
            values = self.evaluation.run(model, self.copies.folder.log(point.name))
        except Failed as error:
            raise InputError(f"the evaluation of {point.name}: {error}. {self._left()}") from None
        return Measured(
            name=point.name,
            arm=point.arm,
            strength=point.strength,
            command=self.copies.files.command(point),
            evaluated=self.evaluation.call_of(model),
            values=values,
            seconds=round(time.perf_counter() - clock, 3),
            refused=[] if made is None else _refused(made),
            drift=None if made is None else _drift(made),
        )

    def _check_names(self, rows: list[Measured]) -> None:
        """Raise unless all points have the numbers of the first."""
        first, *others = rows
        for row in others:
            if set(row.values) != set(first.values):
                odd = sorted(set(row.values) ^ set(first.values))[0]
                raise InputError(
                    f"the evaluation of {row.name}: expected the numbers that {first.name} has, "
                    f"only one of the two has {odd!r:.60}: {row.evaluated}. {self._left()}"
                )

    def _left(self) -> str:
        return (
            f"{len(self.done)} of {len(self.points)} points are finished and kept; correct the "
            "evaluation, and repeat the command"
        )


def _refused(made: RepairRecord) -> list[str]:
    """The changed matrices that stayed as they were."""
    return [row.name for row in made.matrices if row.status == "refused"]


def _drift(made: RepairRecord) -> float | None:
    """The mean drift of a copy, where it was measured."""
    known = [row.drift_after for row in made.matrices if row.drift_after is not None]
    return sum(known) / len(known) if known else None


def _line(row: Measured) -> str:
    """A point on one line."""
    return f"{row.name}: " + ", ".join(f"{name} {x:.4g}" for name, x in row.values.items())
