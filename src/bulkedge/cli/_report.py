"""``bulkedge report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ._gate import gate_of, gate_options
from ._output import STDOUT, check_file, columns_option, format_by_ending, write

FORMATS = ("html", "markdown", "junit", "sarif", "csv", "parquet")
"""The keys of ``bulkedge.report.FORMATS``, here because that takes a second to import."""


@click.command(short_help="Write saved records as a page, for CI, or for a spreadsheet.")
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE",
              help="The file to write; - for stdout, which needs --format.")  # fmt: skip
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="The format.  [default: by the ending: .html .md .xml .sarif .csv .parquet]",
)
@click.option("--label", "labels", multiple=True, metavar="NAME",
              help="Name of a record on the page; give one for each, in order.")  # fmt: skip
@columns_option
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@gate_options
def report(
    records: tuple[Path, ...],
    output: Path,
    kind: str | None,
    labels: tuple[str, ...],
    columns: tuple[str, ...],
    force: bool,
    **options: Any,
) -> None:
    """Write saved records as one page that opens offline, for CI, or for a spreadsheet.

    RECORDS are record.json files, or the output folders that hold them; several are shown side by
    side on one page. A repaired folder, or its repair.json, stands for both of its audits.
    --fail-on, --max-drift and --fail-on-doubt say what a report shows as a failure; the exit code
    is 0.
    """
    from bulkedge.report import read, render

    kind = kind or format_by_ending(output, ", or --format")
    _check_count(len(records), kind)
    check_file(output, force)
    gate = gate_of(options)
    shown = render([read(path) for path in records], kind, list(labels) or None, columns, gate)
    write(output, shown)
    if output != STDOUT:
        click.echo(f"report written to {output}", err=True)


def _check_count(records: int, kind: str) -> None:
    if kind in ("csv", "parquet") and records > 1:
        raise click.UsageError(
            f"{kind} is of one record, got {records}; html, markdown, junit and sarif show several"
        )
