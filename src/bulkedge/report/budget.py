"""A budget in a terminal, and as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bulkedge._errors import count, printable
from bulkedge.records.budget import BudgetRecord, MatrixBudget

from .terminal import MAX_ROWS

Value = float | int | str | None
NOISE = {True: "yes", False: "no", None: "?"}


@dataclass(frozen=True)
class _Column:
    """One column: its name for programs, its heading for people, its value."""

    name: str
    heading: str
    value: Callable[[MatrixBudget], Value]


def _allowed(field: str) -> Callable[[MatrixBudget], Value]:
    return lambda row: getattr(row.allowed, field) if row.allowed else None


def _used(row: MatrixBudget) -> float | None:
    """ΔW/θ_k: the strongest spike of an adapter, in units of the limit at level 1."""
    if (
        row.allowed is None
        or row.allowed.spectral_norm_update is None
        or row.top_k_threshold is None
    ):
        return None
    return row.allowed.spectral_norm_update / row.top_k_threshold


LIMITS = (
    _Column("sigma_1", "σ₁", lambda row: row.sigma_1),
    _Column("sigma_k", "σ_k", lambda row: row.sigma_k),
    _Column("threshold", "θ_c", lambda row: row.threshold),
    _Column("top_k_threshold", "θ_k", lambda row: row.top_k_threshold),
    _Column("noise", "noise", lambda row: NOISE[row.noise] if row.bulk else None),
)
ALLOWED = (
    _Column("rank", "r", _allowed("rank")),
    _Column("scale", "scale", _allowed("scale")),
    _Column("max_ba_norm", "max ‖BA‖", _allowed("max_ba_norm")),
    _Column("spectral_norm_update", "ΔW", _allowed("spectral_norm_update")),
    _Column("used", "ΔW/θ_k", _used),
    _Column("alpha", "α", _allowed("alpha")),
)
ASIDE = ("rank", "scale", "spectral_norm_update")
"""What a terminal has no room for."""


def budget_csv(record: BudgetRecord) -> str:
    """A row for each matrix.

    Args:
        record: The budget.

    Returns:
        Text with a heading; what is not known is empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = (*LIMITS, *ALLOWED)
    writer.writerow(["name", "rows", "columns", "status", *(c.name for c in columns), "note"])
    for row in record.matrices:
        values = ["" if (v := column.value(row)) is None else v for column in columns]
        writer.writerow([row.name, *row.shape, row.status, *values, row.note or ""])
    return text.getvalue()


def print_budget(record: BudgetRecord, console: Console, *, brief: bool = False) -> None:
    """Print the limit of each matrix, and what has none.

    Args:
        record: What to show.
        console: Where.
        brief: The last line alone.
    """
    if not brief:
        console.print(_table(record))
        if (more := len(record.matrices) - MAX_ROWS) > 0:
            console.print(f"… and {count(more, 'more matrix', 'more matrices')}: see the record")
        console.print()
        for line in _skipped(record):
            _print(console, line)
    if (part := record.base.part) is not None:
        _print(console, f"PART: the base is file {part} of a model, and nothing else is measured")
    for row in record.unanswered:
        what = "NO LIMIT" if row.top_k_threshold is None else "NO α"
        _print(console, f"{what}: {row.name}: {row.note}")
    _print(console, budget_line(record))


def budget_line(record: BudgetRecord) -> str:
    """What a budget says, in one sentence."""
    limits = sorted(
        row.top_k_threshold for row in record.matrices if row.top_k_threshold is not None
    )
    have = "has" if len(record.matrices) == 1 else "have"
    line = f"{len(limits)} of {count(len(record.matrices), 'matrix', 'matrices')} {have} a limit"
    if limits:
        line += f", θ_k from {limits[0]:.3g} to {limits[-1]:.3g}"
    if missing := len(record.unanswered) - (len(record.matrices) - len(limits)):
        line += f"; {count(missing, 'update')} of these without an α"
    if record.like is not None:
        limit = "θ_k" if record.settings.level == 1 else f"{record.settings.level:g} θ_k"
        line += f"; as trained {count(len(record.above), 'update')} of these above {limit}"
    if lost := sum(row.lost for row in record.skipped):
        line += f"; {count(lost, 'tensor')} could NOT be used"
    return line


def _table(record: BudgetRecord) -> Table:
    """One row per matrix, the smallest limits first."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("matrix", overflow="fold")
    rows = sorted(record.matrices, key=lambda row: row.top_k_threshold or 0.0)
    columns = [*LIMITS, *(c for c in ALLOWED if c.name not in ASIDE)]
    columns = [c for c in columns if any(c.value(row) is not None for row in rows)]
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    aside = {row.name for row in record.untrained}  # no settings name them
    for row in rows[:MAX_ROWS]:
        name = Text(printable(row.name.removesuffix(".weight")))
        values = (
            None if row.name in aside and column in ALLOWED else column.value(row)
            for column in columns
        )
        table.add_row(name, *map(_shown, values))
    return table


def _shown(value: Value) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3g}"


def _skipped(record: BudgetRecord) -> list[str]:
    """One line per reason, but for what was to be left out."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for row in record.skipped:
        if not row.accepted:
            groups.setdefault((row.lost, row.reason.partition(" (")[0]), []).append(row.name)
    lines = []
    for (lost, reason), names in groups.items():
        first = f"{len(names)}, such as {names[0]}" if len(names) > 1 else names[0]
        lines.append(f"{'NOT usable' if lost else 'skipped'}: {first}: {reason}")
    return lines


def _print(console: Console, text: str) -> None:
    """Print text without markup; a pipe gets it on one line."""
    console.print(Text(printable(text), overflow="fold"), soft_wrap=not console.is_terminal)
