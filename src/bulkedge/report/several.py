"""Several fine-tunes of one base side by side: in a terminal and for spreadsheets.

The page of several records is that of :mod:`bulkedge.report.html`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bulkedge._errors import count, printable
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Record, differences

from .columns import over_top_k_threshold, worst_score
from .doubts import doubts
from .table import cell
from .terminal import warning_lines

Named = Mapping[str, Record]
"""The records by the names of their fine-tunes."""


@dataclass(frozen=True)
class _Column:
    """One number of a fine-tune.

    Attributes:
        name: For programs.
        heading: For people.
        value: The number; None where there is none.
        digits: After the decimal point; None of a count.
    """

    name: str
    heading: str
    value: Callable[[Record], float | None]
    digits: int | None = None

    def shown(self, record: Record) -> str:
        """The number as text."""
        value = self.value(record)
        if value is None:
            return ""
        return str(value) if self.digits is None else f"{value:.{self.digits}f}"


def _of_verdict(verdict: Verdict) -> _Column:
    name = verdict.value
    return _Column(name, name, lambda record: record.summary.verdicts[verdict])


def _most(of: Callable[[Any], float | None], pick: Callable[..., Any]) -> Callable[[Record], Any]:
    """The largest or the smallest of what is known of the matrices."""
    return lambda record: pick(
        (v for m in record.matrices if (v := of(m)) is not None), default=None
    )


def _mean_drift(record: Record) -> float | None:
    """None without moments."""
    return None if record.summary.drift is None else record.summary.drift.mean


COLUMNS = (
    _Column("audited", "matrices", lambda record: record.summary.audited),
    _Column("directions", "directions", lambda record: sum(record.summary.verdicts.values())),
    _Column("new", "new", lambda record: record.summary.new_directions),
    *map(_of_verdict, (*COUNTED, Verdict.UNDECIDED)),
    _Column("worst_score", "worst score", _most(worst_score, min), 3),
    _Column("over_top_k_threshold", "max ΔW/θ_k", _most(over_top_k_threshold, max), 2),
    _Column(
        "beyond_top_k_threshold",
        "spikes > θ_k",
        lambda record: record.summary.beyond_top_k_threshold,
    ),
    _Column("drift", "drift", _mean_drift, 4),
    _Column("lost", "lost", lambda record: record.summary.lost + record.summary.not_audited),
)
"""Every column but the name of the fine-tune."""
UNCHANGED = _Column("unchanged", "unchanged", lambda record: record.summary.unchanged or None)
"""The matrices that ``audited`` does not count, since they equal the base's; None for none."""


def several_line(records: Named) -> str:
    """How many of the fine-tunes have new directions, in one sentence.

    Args:
        records: By fine-tune.

    Returns:
        The sentence.
    """
    new = [name for name, record in records.items() if record.summary.new_directions]
    line = f"{len(new)} of {count(len(records), 'fine-tune')} have new leading directions"
    if new:
        most = max(new, key=lambda name: records[name].summary.new_directions)
        line += f", most of them {printable(most)}: {records[most].summary.new_directions}"
    if open_ := [name for name, record in records.items() if not record.summary.complete]:
        line += f"; of {len(open_)} not everything could be judged: {printable(', '.join(open_))}"
    return line


def print_several(records: Named, console: Console, *, brief: bool = False) -> None:
    """Print a row for each fine-tune, and what they come to.

    Args:
        records: By fine-tune.
        console: Where.
        brief: What they come to alone, and what may change what a reader makes of it.
    """
    if not brief:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("fine-tune", overflow="fold")
        columns = columns_of_several(records)
        for column in columns:
            table.add_column(column.heading, justify="right")
        for name, record in records.items():
            table.add_row(Text(printable(name)), *(column.shown(record) for column in columns))
        console.print(table)
        console.print()
    for line in differences(records):
        console.print(Text(f"WARNING: {line}"), soft_wrap=True)
    console.print(Text(several_line(records)), soft_wrap=True)
    for line in warnings_of(records):
        console.print(Text(line), soft_wrap=True)


def warnings_of(records: Named) -> list[str]:
    """What may change what a reader makes of the verdicts; what several share is said once.

    Args:
        records: By fine-tune.

    Returns:
        Lines.
    """
    found: dict[str, list[str]] = {}
    for name, record in records.items():
        for line in warning_lines(record):
            found.setdefault(line, []).append(name)
    return [
        line if len(names) == len(records) else f"{printable(', '.join(names))}: {line}"
        for line, names in found.items()
    ]


def several_csv(records: Named) -> str:
    """A row for each fine-tune.

    Args:
        records: By fine-tune.

    Returns:
        Text with a heading; text that begins like a formula has a quotation mark in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(["fine-tune", *(column.name for column in COLUMNS), "doubts"])
    for name, record in records.items():
        numbers = [cell(column.value(record)) for column in COLUMNS]
        writer.writerow([cell(name), *numbers, cell(" ".join(doubts(record).values()))])
    return text.getvalue()


def columns_of_several(records: Named) -> list[_Column]:
    """The columns in which any fine-tune has a number.

    Args:
        records: By fine-tune.

    Returns:
        Some of ``COLUMNS``.
    """
    return [c for c in COLUMNS if any(c.value(record) is not None for record in records.values())]
