"""``bulkedge merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import InputError

from ._gate import end, gate_of
from ._output import (
    check_file,
    check_folder,
    show,
    take_stdout,
    verdict_options,
    write_all,
    written_files,
)

if TYPE_CHECKING:
    from bulkedge.records import Record


@click.command(short_help="Join the records of `audit --shard` into one.")
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for record.json; - prints the record as JSON.",
)
@verdict_options
def merge(parts: tuple[Path, ...], **options: Any) -> None:
    """Join the records of all shards into one, and judge it.

    PARTS are the output folders of `audit --shard`, in any order.
    """
    from bulkedge.auditing import hold, merge_shards
    from bulkedge.records import Record

    take_stdout(options)
    gate = gate_of(options)
    output: Path | None = options["output"]
    if output is not None:
        check_folder(output, options["force"], kind=Record)
    for file in written_files(options):
        check_file(file, options["force"])
    record = merge_shards(parts)
    if options["max_drift"] is not None:
        _check_moments(record)
    with hold(output):
        write_all(record, options, gate)
        show(record, options)
    end({"": record}, gate)


def _check_moments(record: Record) -> None:
    """A limit on drift that was not measured would be no limit."""
    if record.inputs.moments is None:
        raise InputError(
            "--max-drift: the parts were audited without moments; audit them again with "
            "--moments FILE"
        )
