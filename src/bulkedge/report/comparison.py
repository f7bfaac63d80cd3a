"""Two audits side by side: what changed, matrix by matrix, in a terminal and as JSON.

The page of two records is that of :mod:`bulkedge.report.html`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bulkedge._errors import InputError, count, printable
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import MatrixChange, Record, RecordComparison

from .names import short_name
from .several import COLUMNS, UNCHANGED, print_several

COUNTS = (*COUNTED, Verdict.UNDECIDED)
"""The verdicts whose number a comparison shows."""
ENDS = ("first", "second")
MAX_ROWS = 40
SHOWN = 3
"""So many matrices that only one audit has are named."""


@dataclass(frozen=True)
class SideBySide:
    """Two audits by the same settings.

    Attributes:
        records: Both by what to call them, the first one first.

    Raises:
        InputError: If there are not two, or they judged other directions, or by another ε.
    """

    records: Mapping[str, Record]

    def __post_init__(self) -> None:
        if len(self.records) != 2:
            raise InputError(
                f"expected two records of different labels, got {len(self.records)}; give one for "
                "before and one for after"
            )
        _ = self.found  # refuses what cannot be compared

    @cached_property
    def found(self) -> RecordComparison:
        """What both audits found in the same matrices."""
        first, second = self.records.values()
        return first.compare(second)

    def to_json(self) -> str:
        """What both audits found in the same matrices, for other programs.

        Returns:
            Text of an object: what each audit is called, its number of new directions and of each
            verdict (``first``, ``second``); a row for each matrix that both have (``matrices``);
            the names of those that one alone has (``only_first``, ``only_second``).
        """
        ends = {
            end: {
                "label": label,
                "tuned": record.inputs.tuned.path,
                "new_directions": record.summary.new_directions,
                "verdicts": {v.value: record.summary.verdicts[v] for v in COUNTS},
            }
            for end, (label, record) in zip(ENDS, self.records.items(), strict=True)
        }
        return json.dumps(ends | asdict(self.found), indent=2) + "\n"


def print_comparison(both: SideBySide, console: Console, *, brief: bool = False) -> None:
    """Print the counts of two audits, and the matrices in which they differ.

    Args:
        both: The audits.
        console: Where.
        brief: What changed in one sentence, and what may change what a reader makes of it.
    """
    if not brief:
        console.print(_counts(both.records))
        console.print()
        if changed := both.found.changed:
            console.print(_table(changed[:MAX_ROWS]))
            if (rest := len(changed) - MAX_ROWS) > 0:
                console.print(f"… and {count(rest, 'matrix', 'matrices')} more: see --json")
            console.print()
    for line in (_line(both), *_alone(both)):
        console.print(Text(line), soft_wrap=True)
    print_several(both.records, console, brief=True)


def _counts(records: Mapping[str, Record]) -> Table:
    """A row for each number of an audit that either has."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for label in records:
        table.add_column(Text(printable(label)), justify="right")
    for column in (COLUMNS[0], UNCHANGED, *COLUMNS[1:]):
        shown = [column.shown(record) for record in records.values()]
        if any(shown):
            table.add_row(column.heading, *shown)
    return table


def _table(rows: list[MatrixChange]) -> Table:
    """A row for each matrix that differs, with each number before and after."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("matrix", overflow="fold")
    both = [counts for row in rows for counts in (row.verdicts_first, row.verdicts_second)]
    verdicts = [v.value for v in COUNTS if any(counts[v.value] for counts in both)]
    for heading in ("new", *verdicts, "worst score"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(short_name(row.name)),
            _change(row.new_first, row.new_second),
            *(_change(row.verdicts_first[v], row.verdicts_second[v]) for v in verdicts),
            f"{_score(row.worst_first)} → {_score(row.worst_second)}",
        )
    return table


def _change(first: int, second: int) -> str:
    """A count in both; one number where they are equal."""
    return str(first) if first == second else f"{first} → {second}"


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _line(both: SideBySide) -> str:
    """What changed, in one sentence."""
    rows = both.found.matrices
    first, second = map(printable, both.records)
    totals = sum(row.new_first for row in rows), sum(row.new_second for row in rows)
    fewer = sum(row.new_second < row.new_first for row in rows)
    more = sum(row.new_second > row.new_first for row in rows)
    unchanged = len(set.intersection(*map(_unchanged, both.records.values())))
    same = f" ({unchanged} of them unchanged in both)" if unchanged else ""
    return (
        f"from {first} to {second}: {totals[0]} → {count(totals[1], 'new direction')} in "
        f"{count(len(rows), 'matrix that both have', 'matrices that both have')}{same}; "
        f"{fewer} have fewer, {more} more"
    )


def _unchanged(record: Record) -> set[str]:
    """The matrices that equal the base's: the table does not count them among the audited ones."""
    return {matrix.name for matrix in record.matrices if matrix.status == "unchanged"}


def _alone(both: SideBySide) -> list[str]:
    """The matrices that only one of the audits has."""
    lines = []
    for label, names in zip(
        both.records, (both.found.only_first, both.found.only_second), strict=True
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if names[SHOWN:] else ""
            lines.append(
                f"only in {printable(label)}: {', '.join(map(short_name, names[:SHOWN]))}{more}"
            )
    return lines
