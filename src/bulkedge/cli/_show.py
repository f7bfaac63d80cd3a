"""``bulkedge show``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click

from ._output import columns_option, show_as


@click.command(short_help="Print a saved record.")
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@columns_option
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict and its doubts alone.")
def show(record: Path, as_json: bool, columns: tuple[str, ...], quiet: bool) -> None:
    """Print a saved record as its command did.

    RECORD is the output folder of `audit` or `merge`, the copy that `repair` wrote, or the record's
    file.  The exit code is 0: `audit --fail-on` and `merge --fail-on` are the gates.
    """
    from bulkedge.records import Record
    from bulkedge.report import print_record, print_repair, read

    found = read(record)
    options = {"as_json": as_json, "quiet": quiet}
    if isinstance(found, Record):
        print_ = partial(print_record, columns=columns, taken=os.path.lexists)
        show_as(found, print_, options)
    else:
        show_as(found, print_repair, options)
