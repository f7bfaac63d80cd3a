"""A frontier in a terminal, as a table for spreadsheets, and as one page."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bulkedge._errors import count, printable
from bulkedge.records.frontier import Arm, FrontierRecord, Gain, Measured

from .parts import document, part
from .static import without_script
from .table import cell

NAMED = 2
"""So many points that beat another are named in a table."""
COLOURS = {
    "scaled": "light-dark(#b35c00, #e69f00)",
    "protected": "light-dark(#0072b2, #56b4e9)",
}
"""The colours of both ways, distinguishable without colour vision."""
LABELS: dict[Arm, str] = {"trained": "as trained", "base": "base"}


def frontier_headline(record: FrontierRecord) -> str:
    """Whether protecting gains on scaling at equal retention, in one sentence.

    Args:
        record: The frontier.

    Returns:
        The sentence.
    """
    task, keep = printable(record.axes.task), printable(record.axes.keep)
    within = [gain for gain in record.gains if gain.gain is not None]
    if not within:
        return (
            f"No strength of protecting and of scaling reached the same {keep}: nothing to compare"
        )
    best = max(within, key=_height)
    where = f"of {count(len(within), 'strength', 'strengths')} that can be compared"
    if _height(best) <= 0:
        return f"At the same {keep}, protecting is not better at {task} than scaling at any {where}"
    better = sum(_height(gain) > 0 for gain in within)
    return (
        f"At the same {keep}, protecting is better at {task} than scaling at {better} {where}, "
        f"most at λ = {_strength(record, best)}: {_height(best):.3g}"
    )


def frontier_remarks(record: FrontierRecord) -> list[str]:
    """What else is to be known of a frontier.

    Args:
        record: The frontier.

    Returns:
        Sentences.
    """
    found = [_listed(record, [g for g in record.gains if _height(g) < 0], "It is worse at λ = ")]
    above = [gain for gain in record.gains if gain.reach == "above"]
    below = [gain for gain in record.gains if gain.reach == "below"]
    found += [
        _listed(record, above, "It retains more than scaling did at any strength at λ = "),
        _listed(record, below, "It retains less than scaling did at any strength at λ = "),
        *_doubts(record),
        "Each number is that of one evaluation: a difference within its noise is none.",
    ]
    return [sentence for sentence in found if sentence]


def frontier_csv(record: FrontierRecord) -> str:
    """A row for each point, from the least retention to the most.

    Args:
        record: The frontier.

    Returns:
        Text with a heading; text that begins like a formula has a quotation mark in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    names = list(record.points[0].values)
    head = ["point", "arm", "strength", *names]
    head += ["scaled_there", "gain", "beaten_by", "refused", "drift", "seconds", "command"]
    writer.writerow([cell(name) for name in head])
    for point in record.in_order:
        gain = _gain_of(record, point)
        row = [point.name, point.arm, point.strength, *(point.values[name] for name in names)]
        row += [gain and gain.scaled, gain and gain.gain, " ".join(_beaten_by(record, point))]
        row += [len(point.refused), point.drift, point.seconds, point.command]
        writer.writerow([cell(value) for value in row])
    return text.getvalue()


def print_frontier(record: FrontierRecord, console: Console, *, brief: bool = False) -> None:
    """Print the points in order, and what follows from them.

    Args:
        record: What to show.
        console: Where.
        brief: The headline alone.
    """
    if not brief:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        first, *columns = _columns(record)
        table.add_column(Text(first), overflow="fold")
        for column in columns:
            table.add_column(Text(column), justify="right")
        for point in record.in_order:
            table.add_row(Text(point.name), *map(Text, _cells(record, point)))
        console.print(table)
        console.print()
    _print(console, frontier_headline(record) + ".")
    if not brief:
        for sentence in frontier_remarks(record):
            _print(console, sentence)


def frontier_page(record: FrontierRecord) -> str:
    """One self-contained page: the points, drawn, with the commands that make them.

    Args:
        record: The frontier.

    Returns:
        HTML.  A policy in it forbids every request and every script but its own.

    Raises:
        InputError: If the package is damaged.
    """
    name, shown = printable(Path(record.tuned.path).name or "tuned"), _shown(record)
    rows = [[printable(point.name), *_cells(record, point)] for point in record.in_order]
    return document(
        part("frontier.html"),
        "frontier",
        title=name,
        subtitle=name,
        script="frontier.js",
        css=part("report.css") + _styles(),
        shown=shown,
        unscripted=without_script(
            shown["headline"],
            shown["explanation"],
            table=[shown["columns"], *rows],
            about=shown["about"],
        ),
    )


def _shown(record: FrontierRecord) -> dict[str, Any]:
    """What the page shows."""
    axes = record.axes
    ends = [point.name for point in record.points if point.arm == "trained"]
    base = [point.name for point in record.points if point.arm == "base"]
    ways = {arm: [p.name for p in record.points if p.arm == arm] for arm in COLOURS}
    return {
        "headline": frontier_headline(record) + ".",
        "explanation": frontier_remarks(record),
        "task": {"name": printable(axes.task), "lower": axes.task in axes.lower},
        "keep": {"name": printable(axes.keep), "lower": axes.keep in axes.lower},
        "columns": _columns(record),
        "lines": {arm: [*ends, *names, *base] for arm, names in ways.items()},
        "points": [_point(record, point) for point in record.in_order],
        "about": f"Made by bulkedge {record.tool.version}, run on {record.run.started[:10]}: "
        f"{printable(record.tuned.path)} against {printable(record.base.path)}.",
    }


def _point(record: FrontierRecord, point: Measured) -> dict[str, Any]:
    """What the page shows of a point."""
    return {
        "name": printable(point.name),
        "arm": point.arm,
        "label": LABELS.get(point.arm),
        "strength": _short(point.strength),
        "task": point.values[record.axes.task],
        "keep": point.values[record.axes.keep],
        "cells": _cells(record, point),
        "beaten": bool(_beaten_by(record, point)),
        "command": None if point.command is None else printable(point.command),
        "evaluated": printable(point.evaluated),
    }


def _columns(record: FrontierRecord) -> list[str]:
    """The headings of the table: the axes first, and what else was measured."""
    names = [f"{printable(name)}{_less(record, name)}" for name in _names(record)]
    drift = ["drift"] if any(point.drift is not None for point in record.points) else []
    return ["point", *names, "scaled there", "gain", *drift, "beaten by"]


def _cells(record: FrontierRecord, point: Measured) -> list[str]:
    """The cells of a row, but for the name."""
    gain = _gain_of(record, point)
    numbers = [*(point.values[name] for name in _names(record)), gain and gain.scaled]
    change = "" if gain is None or gain.gain is None else f"{gain.gain:+.3g}"
    found = [*map(_short, numbers), change]
    if any(other.drift is not None for other in record.points):
        found.append(_short(point.drift))
    others = _beaten_by(record, point)
    more = f" +{len(others) - NAMED}" if len(others) > NAMED else ""
    return [*found, ", ".join(others[:NAMED]) + more]


def _names(record: FrontierRecord) -> list[str]:
    """The numbers, the axes first."""
    first = [record.axes.task, record.axes.keep]
    return first + [name for name in record.points[0].values if name not in first]


def _less(record: FrontierRecord, name: str) -> str:
    return " (less is better)" if name in record.axes.lower else ""


def _gain_of(record: FrontierRecord, point: Measured) -> Gain | None:
    return next((gain for gain in record.gains if gain.point == point.name), None)


def _beaten_by(record: FrontierRecord, point: Measured) -> list[str]:
    return [printable(name) for name in record.dominated.get(point.name, [])]


def _height(gain: Gain) -> float:
    """How much better; 0 where it cannot be compared."""
    return gain.gain or 0.0


def _strength(record: FrontierRecord, gain: Gain) -> str:
    return next(_short(point.strength) for point in record.points if point.name == gain.point)


def _listed(record: FrontierRecord, found: list[Gain], words: str) -> str:
    """A sentence about some strengths; nothing about none."""
    return f"{words}{', '.join(_strength(record, gain) for gain in found)}." if found else ""


def _doubts(record: FrontierRecord) -> list[str]:
    """What was not changed, and what was not given."""
    lines = []
    refused = {name: point for point in record.points for name in point.refused}
    if refused:
        name = next(iter(refused))
        lines.append(
            f"{count(len(refused), 'matrix', 'matrices')} could NOT be changed in some copies, "
            f"such as {printable(name)} in {refused[name].name}: see its repair.json."
        )
    if record.task_moments is None:
        lines.append(
            "Without moments of the task every input direction counts equally for it, which "
            "costs protecting much of it."
        )
    return lines


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


def _styles() -> str:
    """The colours of both ways, and what else this page alone has."""
    colours = "".join(f"  --{arm}: {colour};\n" for arm, colour in COLOURS.items())
    arms = "".join(f".arm.{arm} {{ color: var(--{arm}); }}\n" for arm in COLOURS)
    return (
        f":root {{\n{colours}}}\n{arms}.beaten td {{ color: var(--faint); }}\n"
        ".chart > div { height: 28rem; }\ndd { margin: .2rem 0 .2rem 1.2rem; }\n"
    )


def _print(console: Console, text: str) -> None:
    """Print text without markup; a pipe gets it on one line."""
    console.print(Text(printable(text), overflow="fold"), soft_wrap=not console.is_terminal)
