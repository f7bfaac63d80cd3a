"""``bulkedge report``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bulkedge._errors import CheckpointError

from ._output import check_file, write

if TYPE_CHECKING:
    from bulkedge.records import Record
    from bulkedge.repairing import RepairRecord

FORMATS = ("html", "markdown", "junit", "csv", "parquet")


@click.command()
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE",
              help="The file to write.")  # fmt: skip
@click.option("--format", "kind", type=click.Choice(FORMATS),
              help="Which.  [default: by the ending: .html .md .xml .csv .parquet]")  # fmt: skip
@click.option("--label", "labels", multiple=True, metavar="NAME",
              help="What to call a record, once for each, in their order.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def report(
    records: tuple[Path, ...], output: Path, kind: str | None, labels: tuple[str, ...], force: bool
) -> None:
    """Show records as one page that opens offline, or for CI and spreadsheets.

    RECORDS are record.json files, or the output folders that hold them; several are shown side by
    side on one page. A repaired folder, or its repair.json, stands for both of its audits.
    """
    kind = kind or kind_of(output, or_format=True)
    _check_count(len(records), kind)
    check_file(output, force)
    write(output, render([read(path) for path in records], kind, list(labels) or None))
    click.echo(f"report written to {output}", err=True)


def _check_count(records: int, kind: str) -> None:
    if kind != "html" and records > 1:
        raise click.UsageError(f"{kind} is of one record, got {records}; html shows several")


def render(
    records: list[Record | RepairRecord], kind: str, labels: list[str] | None = None
) -> str | bytes:
    """What a report's file holds; but for HTML, of what a repair wrote."""
    from bulkedge import RepairRecord
    from bulkedge import report as views

    if kind == "html":
        return views.to_html(records, labels)
    one = {
        "markdown": views.to_markdown,
        "junit": views.to_junit,
        "csv": views.to_csv,
        "parquet": views.to_parquet,
    }
    first = records[0]
    return one[kind]((first.after or first.before) if isinstance(first, RepairRecord) else first)


def kind_of(output: Path, *, or_format: bool = False) -> str:
    """The format that a file's ending means."""
    endings = {".html": "html", ".htm": "html", ".md": "markdown", ".xml": "junit", ".csv": "csv"}
    endings[".parquet"] = "parquet"
    kind = endings.get(output.suffix.lower())
    if kind is None:
        raise click.UsageError(
            f"{output.name}: expected a name that ends in .html, .md, .xml, .csv or .parquet"
            + (", or --format" if or_format else "")
        )
    return kind


def read(path: Path) -> Record | RepairRecord:
    """A record, that of a repair, or the one in an output folder.

    Args:
        path: The file, or the folder.

    Returns:
        What it holds.

    Raises:
        CheckpointError: If that is no record.
    """
    from bulkedge.records import Record
    from bulkedge.repairing import RepairRecord

    if path.is_dir():
        here = [kind for kind in (Record, RepairRecord) if (path / kind.file_name).exists()]
        path = path / (here or [Record])[0].file_name
    kinds = (Record, RepairRecord)
    if path.name == RepairRecord.file_name:
        kinds = kinds[::-1]
    try:
        return kinds[0].from_json(path)
    except CheckpointError:
        with suppress(CheckpointError):
            return kinds[1].from_json(path)
        raise  # of the kind that its name means
