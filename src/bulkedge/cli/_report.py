"""``bulkedge report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._output import check_file, write

if TYPE_CHECKING:
    from bulkedge import Record

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
    side on one page.
    """
    kind = kind or kind_of(output)
    _check_counts(len(records), kind, len(labels))
    check_file(output, force)
    write(output, render([_read(path) for path in records], kind, list(labels) or None))
    click.echo(f"report written to {output}", err=True)


def _check_counts(records: int, kind: str, labels: int) -> None:
    """What does not go together."""
    if kind != "html" and records > 1:
        raise click.UsageError(f"{kind} is of one record, got {records}; html shows several")
    if labels not in (0, records):
        raise click.UsageError(f"expected a --label for each of {records} records, got {labels}")


def render(records: list[Record], kind: str, labels: list[str] | None = None) -> str | bytes:
    """What a report's file holds."""
    from bulkedge import report as views

    if kind == "html":
        return views.to_html(records, labels)
    one = {
        "markdown": views.to_markdown,
        "junit": views.to_junit,
        "csv": views.to_csv,
        "parquet": views.to_parquet,
    }
    return one[kind](records[0])


def kind_of(output: Path) -> str:
    """The format that a file's ending means."""
    endings = {".html": "html", ".htm": "html", ".md": "markdown", ".xml": "junit", ".csv": "csv"}
    endings[".parquet"] = "parquet"
    kind = endings.get(output.suffix.lower())
    if kind is None:
        raise click.UsageError(
            f"{output.name}: expected a name that ends in .html, .md, .xml, .csv or .parquet, "
            "or --format"
        )
    return kind


def _read(path: Path) -> Record:
    """A record, or the one in an output folder."""
    from bulkedge import Record

    from ._output import RECORD_NAME

    return Record.from_json(path / RECORD_NAME if path.is_dir() else path)
