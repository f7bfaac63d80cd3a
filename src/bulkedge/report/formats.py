"""Records in, the content of a report out; and records read from where commands left them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bulkedge._errors import CheckpointError, InputError
from bulkedge.records import Record
from bulkedge.records.document import file_of
from bulkedge.repairing import RepairRecord

from .checks import to_junit
from .gate import Gate, Refused
from .html import Shown, named_audits, to_html
from .markdown import to_markdown
from .repairs import cost_lines, repair_line
from .sarif import to_sarif
from .table import to_csv, to_parquet

KINDS = (Record, RepairRecord)


@dataclass(frozen=True)
class Format:
    """A kind of report.

    Attributes:
        endings: The endings of its files, the usual one first.
        render: Its content, from one record, or from several by name where it shows several; None
            for the page.
        has_table: Whether it has a table of matrices, whose columns may be chosen.
        is_gate: Whether it shows what fails a build, and several records.
    """

    endings: tuple[str, ...]
    render: Callable[..., str | bytes] | None
    has_table: bool = False
    is_gate: bool = False


FORMATS = {
    "html": Format((".html", ".htm"), None, has_table=True),
    "markdown": Format((".md",), to_markdown, has_table=True, is_gate=True),
    "junit": Format((".xml",), to_junit, is_gate=True),
    "sarif": Format((".sarif",), to_sarif, is_gate=True),
    "csv": Format((".csv",), to_csv),
    "parquet": Format((".parquet",), to_parquet),
}
"""Every format by its name; a new one has one entry here."""


def render(
    records: Shown | Sequence[Shown],
    format: str = "html",
    labels: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    gate: Gate | None = None,
) -> str | bytes:
    """The content of a report's file: what ``bulkedge report`` writes.

    Args:
        records: The record of an audit or a repair, or several of them.  Formats other than HTML
            show what a repair left, or would begin with where it wrote nothing; Markdown, JUnit and
            SARIF also say what it did, and show each matrix that it refused.  CSV and Parquet are
            of one record.
        format: A key of ``FORMATS``: ``"html"``, ``"markdown"``, ``"junit"``, ``"sarif"``,
            ``"csv"`` or ``"parquet"``.
        labels: What to call the audits where there are several.
        columns: Names of columns that the table of a page or of Markdown has besides its usual
            ones, such as ``"over_threshold"``; CSV and Parquet have every column.
        gate: What fails the build: Markdown, JUnit and SARIF show it, ``Gate()`` if None, and
            so does a page, if it is given.

    Returns:
        Text, or bytes for Parquet.

    Raises:
        InputError: If there is no such format, no column of a name, no record, or more records than
            it shows.
        MissingExtraError: For Parquet without pyarrow.

    Example:
        >>> text = render(read("out"), "markdown")  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise InputError(f"expected a format of {', '.join(FORMATS)}, got {format!r}")
    given = [records] if isinstance(records, KINDS) else list(records)
    known = FORMATS[format]
    if known.render is None:
        return to_html(given, labels, columns, gate)
    audits = [r if isinstance(r, Record) else r.after or r.before for r in given]
    if known.is_gate and len(given) > 1:
        names = named_audits(given, labels)
        shown: Record | dict[str, Record] = dict(zip(names, audits, strict=True))
    elif len(given) != 1:
        several = ", ".join(n for n, f in FORMATS.items() if f.is_gate or f.render is None)
        raise InputError(f"{format} is of one record, got {len(given)}; of several: {several}")
    else:
        names, (shown,) = [""], audits
    more: dict[str, object] = {"columns": columns} if known.has_table else {}
    if known.is_gate:
        more |= {"gate": gate, "refused": dict(zip(names, map(_refused, given), strict=True))}
        more["repairs"] = dict(zip(names, map(_repair, given), strict=True))
    return known.render(shown, **more)


def _refused(record: Shown) -> Refused:
    """The matrices that a repair refused, and why."""
    if isinstance(record, Record):
        return {}
    return {row.name: row.note or "" for row in record.matrices if row.status == "refused"}


def _repair(record: Shown) -> list[str]:
    """What a repair did: its method, new directions before and after, and what it cost."""
    return [] if isinstance(record, Record) else [repair_line(record), *cost_lines(record)]


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that the ending of a file's name means.

    Args:
        path: The file, which need not exist.

    Returns:
        A key of ``FORMATS``.

    Raises:
        InputError: If it is the ending of none.

    Example:
        >>> format_of("summary.md")
        'markdown'
    """
    ending = Path(path).suffix.lower()
    for name, known in FORMATS.items():
        if ending in known.endings:
            return name
    *most, last = (known.endings[0] for known in FORMATS.values())
    raise InputError(f"{Path(path).name}: expected a name that ends in {', '.join(most)} or {last}")


def read(path: str | os.PathLike[str]) -> Record | RepairRecord:
    """The record of an audit or a repair, from its file or from the folder that holds it.

    Args:
        path: A ``record.json``, a ``repair.json``, or the output folder of either command.

    Returns:
        The record.

    Raises:
        CheckpointError: If there is none, or the file is no record.
    """
    file = file_of(path, KINDS)
    kinds = KINDS[::-1] if file.name == RepairRecord.file_name else KINDS
    try:
        return kinds[0].from_json(file)
    except CheckpointError:
        with suppress(CheckpointError):
            return kinds[1].from_json(file)
        raise  # of the kind that its name means
