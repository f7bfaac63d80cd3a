"""``bulkedge compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._output import STDOUT, check_file, show_as, write

if TYPE_CHECKING:
    from bulkedge.records import Record

PAGES = (".html", ".htm")
ENDINGS = (*PAGES, ".json")


@click.command(short_help="Show what changed between two saved records.")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a page of both (.html), or the comparison (.json).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.option("--label", "labels", multiple=True, metavar="NAME",
              help="What to call a record; give one for each, in order.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@click.option("-q", "--quiet", is_flag=True, help="Print what changed in one line.")
def compare(
    first: Path,
    second: Path,
    output: Path | None,
    as_json: bool,
    labels: tuple[str, ...],
    force: bool,
    quiet: bool,
) -> None:
    """Show what changed between two saved records: counts, and matrix by matrix.

    FIRST and SECOND are output folders of `audit` or `merge`, copies that `repair` wrote, or the
    files of records.  A repaired copy stands for the audit after its repair.  Both audits must have
    judged the same directions by the same ε.  The exit code is 0 whatever changed.
    """
    from bulkedge.report import SideBySide, print_comparison, render

    if output == STDOUT:
        output, as_json = None, True
    if output is not None:
        _check_ending(output)
        check_file(output, force)
    records = _labelled([first, second], labels)
    both = SideBySide(records)
    if output is not None:
        page = output.suffix.lower() in PAGES
        columns = list(records.values()), "html", list(records)
        write(output, render(*columns) if page else both.to_json())
    show_as(both, print_comparison, {"as_json": as_json, "quiet": quiet})
    if output is not None and not quiet:
        click.echo(f"comparison written to {output}", err=True)


def _check_ending(output: Path) -> None:
    if output.suffix.lower() not in ENDINGS:
        raise click.UsageError(
            f"{output.name}: expected a name that ends in .html or .json; `bulkedge report` writes "
            "other formats of one record"
        )


def _labelled(paths: list[Path], labels: tuple[str, ...]) -> dict[str, Record]:
    """Both records by what to call them: as asked, else by their folders, as short as differs."""
    from bulkedge.records import Record
    from bulkedge.report import read

    if labels and len(labels) != len(paths):
        raise click.UsageError(f"expected two labels, one for each record, got {len(labels)}")
    found = [read(path) for path in paths]
    names = list(labels) or [_name(path) for path in paths]
    if names[0] == names[1] and not labels:
        names = list(map(os.fspath, paths))
    if names[0] == names[1]:
        names = [
            f"{name} ({place})" for name, place in zip(names, ("first", "second"), strict=True)
        ]
    audits = [x if isinstance(x, Record) else x.after or x.before for x in found]
    return dict(zip(names, audits, strict=True))


def _name(path: Path) -> str:
    """The folder of a record, or its file where that has a name of its own."""
    own = ("record.json", "repair.json")
    place = path.absolute().parent if path.name in own else path.absolute()
    return place.name or os.fspath(path)
