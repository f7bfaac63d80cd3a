"""What the commands share: exit codes, streams, files."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bulkedge._errors import InputError, OutputError
from bulkedge._fields import DEFAULT_EPSILON
from bulkedge._verdict import COUNTED

from ._gate import GATE_FIELDS, check_settings, gate_options
from ._settings import settings_of

if TYPE_CHECKING:
    from bulkedge.records import Recipe, Record
    from bulkedge.records.document import Document
    from bulkedge.repairing import RepairRecord
    from bulkedge.report import Gate

CLEAN, FAILURE, INTERRUPTED, TERMINATED = 0, 2, 130, 143

STDOUT = Path("-")
"""The file name that means standard output."""

COUNTED_NAMES = [verdict.value for verdict in COUNTED]
"""The verdicts that an option may name, the mildest first."""

Command = TypeVar("Command", bound=Callable[..., None])


def recipe_options(command: Command) -> Command:
    """The options of a command that audits: what a recipe has."""
    options = (
        click.option(
            "-k",
            "--top-k",
            type=int,
            help="How many leading directions to judge in each matrix.  [default: 10]",
        ),
        click.option(
            "--epsilon",
            type=float,
            help=f"Score below which a direction is new.  [default: {DEFAULT_EPSILON}]",
        ),
        click.option(
            "--side",
            type=click.Choice(["left", "right", "both"]),
            help="Which singular vectors to compare.  [default: left]",
        ),
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Judge only these tensors; repeatable."
        ),
        click.option(
            "--exclude", multiple=True, metavar="GLOB", help="Leave these tensors out; repeatable."
        ),
        click.option(
            "--partial",
            is_flag=True,
            default=None,
            help="TUNED stores only some weights and is loaded over BASE.  [default: False]",
        ),
        click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]"),
        click.option("--seed", type=int, help="Seed of the random start vectors.  [default: 0]"),
        click.option(
            "--recipe",
            type=click.Path(path_type=Path),
            help="Settings in YAML, in place of the project's; options override them.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def recipe_of(options: dict[str, Any]) -> Recipe:
    """The recipe file's settings, overridden by what was given on the command line."""
    from bulkedge.records import Recipe, make_recipe

    fields = Recipe.model_fields  # what is no option is for the file
    settings, path = settings_of(options, (*fields, *(set(GATE_FIELDS) & set(options))))
    check_settings(settings, path, list(fields), options)
    asked = {name: value for name, value in settings.items() if name not in GATE_FIELDS}
    given = {n: v for n, v in options.items() if n in fields and v not in (None, ())}
    spelled = {name: f"--{name.replace('_', '-')}" for name in given}
    beside = () if path is None else GATE_FIELDS
    return make_recipe(asked | given, str(path or "options"), spelled, beside)


def _names_of_columns(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[str, ...]:
    """Names of columns, each of which there is."""
    if value is None:
        return ()
    from bulkedge.report.columns import CHOICES

    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in CHOICES:
            raise click.BadParameter(f"expected names of {', '.join(CHOICES)}, got {name!r:.40}")
    return names


columns_option = click.option(
    "--columns",
    callback=_names_of_columns,
    metavar="NAME,…",
    help="More columns for the table, such as over_threshold.",
)
"""The option of a command that shows a table of matrices."""


def verdict_options(command: Command) -> Command:
    """The options of a command that shows a record and judges it."""
    options = (
        click.option("--force", is_flag=True, help="Write into an output folder that exists."),
        click.option("--json", "as_json", is_flag=True, help="Print the record as JSON."),
        click.option(
            "--csv",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write one row per direction, and one for each matrix without any, for "
            "spreadsheets; - for stdout.",
        ),
        click.option(
            "--report",
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="FILE",
            help="Write a report: .html (a page), .md, .xml (JUnit), .sarif or .parquet; "
            "repeatable.",
        ),
        columns_option,
        click.option("-q", "--quiet", is_flag=True, help="Print the verdict and its doubts alone."),
    )
    command = gate_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def take_stdout(options: dict[str, Any]) -> None:
    """Take ``-`` for stdout: of ``--output`` it is the record, as with ``--json``."""
    if options["output"] == STDOUT:
        options |= {"output": None, "as_json": True}
    to_stdout = _files(options).count(STDOUT)
    if to_stdout + options["as_json"] > 1:
        raise click.UsageError("only one output can go to stdout (-): give the others a file")


def refuse_stdout(path: Path | None, kind: str) -> None:
    """UsageError for ``-`` where what is written cannot go to stdout."""
    if path == STDOUT:
        raise click.UsageError(f"--output -: stdout cannot hold {kind}; name a place on the disk")


def check_folder(
    output: Path,
    force: bool,
    *,
    kind: type[Document],
    resume: bool = False,
    folders: Sequence[Path] = (),
) -> None:
    """Whether a record may be written into a folder, or one into each of the folders in it."""
    from bulkedge.auditing import JOURNAL_NAME, refuse_held, refuse_other_kind
    from bulkedge.checkpoint.write import check_writable

    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; give a folder")
    if (output / kind.file_name).is_dir():
        raise OutputError(f"{output}: {kind.file_name} in it is a folder; give another")
    refuse_other_kind(output, kind)
    used = output.exists() and any(output.iterdir())
    if resume and used and not (output / JOURNAL_NAME).exists():
        raise OutputError(f"{output}: exists without a {JOURNAL_NAME} to resume; give another")
    if used and not (force or resume):
        more = ""
        started = any((folder / JOURNAL_NAME).exists() for folder in folders or [output])
        if started and "resume" in _own_options():
            more = ", or --resume to resume from its journal"
        raise OutputError(
            f"{output}: exists; give another folder, or --force to write into it{more}"
        )
    refuse_held(output)
    check_writable(output / kind.file_name)


def _own_options() -> set[str | None]:
    """The options of the command that runs: a message advises no others."""
    context = click.get_current_context(silent=True)
    return set() if context is None else {option.name for option in context.command.params}


def check_file(path: Path, force: bool) -> None:
    """Whether a file may be written."""
    from bulkedge.auditing import refuse_held
    from bulkedge.checkpoint.write import check_writable

    if path == STDOUT:
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path}: exists; give another file, or --force to replace it")
    check_writable(path)
    refuse_held(next(folder for folder in path.absolute().parents if folder.exists()))


def _files(options: dict[str, Any]) -> list[Path]:
    """The files beside the output."""
    files = [options.get(name) for name in ("csv", "peft", "record")]
    return [*(file for file in files if file is not None), *options.get("report", ())]


def written_files(options: dict[str, Any], own: Sequence[Path] = ()) -> list[Path]:
    """The files beside the output that were asked for, the ending of a report checked.

    Args:
        options: The options of the command.
        own: More files that the command writes by itself.

    Returns:
        The files, each once.
    """
    for report in options["report"]:
        format_by_ending(report)
    files = _files(options)
    # a repair's folder is a copy of the fine-tune, and holds no record of its own
    refuse_twice(files, None if "record" in options else options["output"], own)
    return files


def refuse_twice(
    files: Sequence[Path], folder: Path | None = None, own: Sequence[Path] = ()
) -> None:
    """OutputError where one file is to be written twice, or over the record in the output."""
    from bulkedge.auditing import JOURNAL_NAME
    from bulkedge.budgeting import BudgetRecord
    from bulkedge.records import Record

    names = (Record.file_name, BudgetRecord.file_name, JOURNAL_NAME)
    own = [*own, *(folder / name for name in names)] if folder else own
    places = [os.path.realpath(place) for place in own]
    for file in files:
        if (place := os.path.realpath(file)) in places:
            raise OutputError(f"{file}: would be written twice; give each output a file of its own")
        places.append(place)


def keep_out_of_copy(files: Sequence[Path], copy: Path) -> None:
    """Refuse files in a folder whose content is another command's, or that stand in its place.

    Args:
        files: The files beside it.
        copy: The folder, which need not exist.

    Raises:
        OutputError: If one is it, lies in it, or would have to be a folder that it lies in.
    """
    home = Path(os.path.realpath(copy))
    for file in files:
        if file == STDOUT:
            continue
        # a link in the place of the file is replaced, not followed; those above it are followed
        place = Path(os.path.realpath(file.absolute().parent)) / file.name
        if place.is_relative_to(home) or home.is_relative_to(place):
            raise OutputError(
                f"{file}: lies in the folder of the copy, {copy}, whose files it could replace; "
                "write it elsewhere"
            )


def format_by_ending(path: Path, remedy: str = "") -> str:
    """The format that a report's ending means; a wrong one is a wrong option."""
    from bulkedge.report import format_of

    try:
        return format_of(path)
    except InputError as error:
        raise click.UsageError(f"{error}{remedy}") from None


def write_all(record: Record, options: dict[str, Any], gate: Gate) -> None:
    """The record, its table as CSV, and its reports, where they were asked for."""
    output: Path | None = options["output"]
    if output is not None:
        write(output / record.file_name, record.to_json())
        if not options["quiet"]:
            click.echo(f"record written to {output / record.file_name}", err=True)
    if options["csv"] is not None:
        from bulkedge.report import to_csv

        write(options["csv"], to_csv(record))
    write_reports(record, options, gate)


def write_reports(
    records: Record | RepairRecord | Sequence[Record],
    options: dict[str, Any],
    gate: Gate,
    labels: Sequence[str] | None = None,
) -> None:
    """The reports that were asked for."""
    from bulkedge.report import format_of, render

    for file in options["report"]:
        columns = options.get("columns", ())
        write(file, render(records, format_of(file), labels, columns, gate))
        if not options["quiet"] and file != STDOUT:
            click.echo(f"report written to {file}", err=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; a link in its place is replaced, not followed."""
    from bulkedge.checkpoint.write import umask

    if path == STDOUT:
        click.echo(content, nl=False)
        sys.stdout.flush()
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def show(record: Record, options: dict[str, Any]) -> None:
    """The record on stdout, as JSON or as a table."""
    from functools import partial

    from bulkedge.report import print_record

    print_ = partial(print_record, columns=options["columns"], taken=os.path.lexists)
    show_as(record, print_, options)


def show_as(record: Any, print_: Callable[..., None], options: dict[str, Any]) -> None:
    """A record on stdout, as JSON or as ``print_`` shows it, unless a file is to go there."""
    if STDOUT in _files(options):
        return
    if options["as_json"]:
        text = record.to_json()
        if sys.stdout.isatty():  # names may hold characters that act on a terminal
            text = json.dumps(json.loads(text), indent=2) + "\n"
        click.echo(text, nl=False)
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:  # a pipe has no edge to fold at
            console = Console(width=160)
        print_(record, console, brief=options["quiet"])
    sys.stdout.flush()  # a full disk must be noticed here, not at exit


def default_to_one_thread() -> None:
    """Use one thread unless the user has set how many, as two on a busy machine are slower."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
